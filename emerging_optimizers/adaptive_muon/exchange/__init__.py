# SPDX-License-Identifier: Apache-2.0
"""The messages of a step: who orthogonalizes what, and how shards get there and back."""
