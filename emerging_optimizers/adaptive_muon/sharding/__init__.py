# SPDX-License-Identifier: Apache-2.0
"""Where a shard sits in its matrix, and which ranks hold the others."""
