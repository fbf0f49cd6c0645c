# SPDX-License-Identifier: Apache-2.0
"""The tiles of the Triton kernel for symmetric products, which are also needed without Triton."""

__all__ = ["TILE", "lower_tiles"]

TILE = 128  # rows and columns


def lower_tiles(n: int) -> int:
    """Return the number of tiles on and below the diagonal of a matrix with n rows."""
    across = -(-n // TILE)
    return across * (across + 1) // 2
