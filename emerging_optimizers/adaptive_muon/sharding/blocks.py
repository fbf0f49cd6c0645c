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
        """The number of the block's rows above a row of the parameter."""
        patterns, rest = divmod(row, self.period)
        return patterns * (self.stop - self.start) + min(max(rest - self.start, 0), self.stop - self.start)

    def rows_at(self, held: range, device: torch.device) -> slice | torch.Tensor:
        """Which of the rows that are held belong to the block, counted from the first that is held."""
        rows = [row - held.start for row in held if self.start <= row % self.period < self.stop]
        if not rows or rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)
        return torch.tensor(rows, device=device)


def row_blocks(blocks: Any, rows: int, name: str) -> list[RowBlock]:
    """Returns the blocks of a matrix.

    Args:
        blocks: Rows of each block, in a tuple. Where they sum to less than ``rows``, the pattern repeats down the
            matrix and a block is made of its rows in every repetition, as Megatron's fused attention weight has
            queries, keys and values by query group.
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
