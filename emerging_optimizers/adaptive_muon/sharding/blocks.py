# SPDX-License-Identifier: Apache-2.0
"""Fused matrices: the row blocks of a parameter that are matrices of their own."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from emerging_optimizers.adaptive_muon.checks import require


__all__ = ["RowBlock", "row_blocks"]


@dataclass(frozen=True)
class RowBlock:
    """The rows ``start`` to ``stop``, the end excluded, of a pattern of ``period`` rows that repeats down a matrix."""

    start: int
    stop: int
    period: int

    def rows_before(self, row: int) -> int:
        """Return the number of the block's rows above a row of the parameter."""
        patterns, rest = divmod(row, self.period)
        return patterns * (self.stop - self.start) + min(max(rest - self.start, 0), self.stop - self.start)

    def rows_in(self, shard: range, device: torch.device) -> slice | torch.Tensor:
        """Return which rows of a shard belong to the block: a slice where they are adjacent, else their indices.

        Args:
            shard: The rows of the parameter that the shard consists of.
            device: The device of the indices.
        """
        rows = [row - shard.start for row in shard if self.start <= row % self.period < self.stop]
        if not rows or rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)
        return torch.tensor(rows, device=device)


def row_blocks(blocks: Any, rows: int, name: str) -> list[RowBlock]:
    """Return the blocks of a matrix.

    Args:
        blocks: Rows of each block, in a tuple. Where they sum to less than ``rows``, the pattern repeats down the
            matrix, and a block consists of its rows in every repetition. Megatron's fused attention weight has its
            queries, keys and values in this way, one repetition per query group.
        rows: Rows of the whole matrix.
        name: What to call it in an error.

    Raises:
        ValueError: If the blocks do not fit.
    """
    require(
        isinstance(blocks, tuple)
        and len(blocks) > 0
        and all(type(size) is int and size > 0 for size in blocks)
        and rows % sum(blocks) == 0,
        f"the blocks of {name} must be positive row counts whose sum divides its {rows} rows",
        blocks,
        "give the rows of each block, or of each in one group where the groups repeat down the matrix",
    )
    return [RowBlock(start, stop, sum(blocks)) for start, stop in pairwise(accumulate(blocks, initial=0))]
