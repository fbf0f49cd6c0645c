# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for a step on a GPU. Each computes what its caller computes with torch elsewhere."""
