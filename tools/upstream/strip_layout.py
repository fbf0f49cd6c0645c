# SPDX-License-Identifier: Apache-2.0
"""For upstream's moment2.py: a matrix in strips. Ours can be any rectangles, and their sums travel together."""

from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.orthogonalized_optimizers.moment2 import Layout, _norm


@dataclass(frozen=True)
class StripLayout(Layout):
    """A matrix that the ranks of a group hold in strips along one dimension; strips may differ in size.

    Args:
        group: The ranks that hold the strips.
        dim: The dimension that is spread, -2 (rows) or -1 (columns).
        whole: ``(rows, columns)`` of the whole matrix.
    """

    group: torch.distributed.ProcessGroup
    dim: int
    whole: tuple[int, int]

    @override
    def shape(self, local: torch.Tensor) -> tuple[int, int]:
        return self.whole

    @override
    def norms(self, *pieces: torch.Tensor, dim: int | None = None) -> list[torch.Tensor]:
        squares = [_norm(piece, dim).square_() for piece in pieces]
        return [square.sqrt() for square in self._sum(squares, dim)]

    @override
    def totals(self, *vectors: torch.Tensor, dim: int) -> list[torch.Tensor]:
        return self._sum([vector.sum(dim=dim, keepdim=True) for vector in vectors], dim)

    def _sum(self, terms: list[torch.Tensor], dim: int | None) -> list[torch.Tensor]:
        """Sums what was reduced along ``dim`` over the strips, where these lie along it: in one all-reduce."""
        if dim not in (None, self.dim):
            return terms
        bucket = torch.cat([term.flatten() for term in terms])
        torch.distributed.all_reduce(bucket, group=self.group)
        totals = torch.split(bucket, [term.numel() for term in terms])
        return [total.view_as(term) for total, term in zip(totals, terms, strict=True)]
