# SPDX-License-Identifier: Apache-2.0
"""Questions about a whole matrix, asked of the piece at hand.

Every formula asks its shapes and reductions here and never of the tensor itself, so that the formulas stay the same
when a matrix is held in pieces. Reductions are awaited: the answer may have to come from elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations
from typing import NamedTuple, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.exchange.collectives import Sum


__all__ = ["Layout", "Piece", "Rectangle", "ShardedLayout", "Split"]


class Rectangle(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of a matrix, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""
        return self.bottom - self.top, self.right - self.left

    @property
    def area(self) -> int:
        """The number of elements."""
        rows, columns = self.shape
        return rows * columns

    def overlaps(self, other: "Rectangle") -> bool:
        """Returns whether an element is in both."""
        return (
            max(self.top, other.top) < min(self.bottom, other.bottom)
            and max(self.left, other.left) < min(self.right, other.right)
        )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A matrix that is held whole.

    All methods take the tensor at hand, shape ``(..., rows, columns)``: leading dimensions, if any, stack independent
    matrices. Reductions keep the reduced dimensions with size 1, so results broadcast against it.
    """

    def shape(self, local: torch.Tensor) -> tuple[int, int]:
        """Returns ``(rows, columns)`` of the whole matrix."""
        return local.size(-2), local.size(-1)

    async def norms(self, *pieces: torch.Tensor, dim: int | None = None) -> list[torch.Tensor]:
        """Returns Frobenius norms of whole matrices, or Euclidean norms along one of their dimensions.

        Args:
            *pieces: Tensors that lie like the matrix.
            dim: -2 for the norm of each column, -1 for the norm of each row, None for the whole matrix.
        """
        return [_norm(piece, dim) for piece in pieces]

    async def totals(self, *vectors: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Returns the sums over whole vectors.

        Args:
            *vectors: Tensors that lie like one row (``dim=-1``) or one column (``dim=-2``) of the matrix, such as
                :meth:`norms` gives along the other dimension: of size 1 there.
            dim: The dimension along which they lie, and are summed.
        """
        return [vector.sum(dim=dim, keepdim=True) for vector in vectors]

    async def first(self, piece: torch.Tensor, dim: int | None) -> torch.Tensor:
        """Returns the first row (``dim=-2``) or column (``dim=-1``) of the whole matrix, or its first element (None)."""
        return _first(piece, dim)

    async def nonzero(self, piece: torch.Tensor) -> bool:
        """Returns whether any element of the whole matrix differs from zero."""
        return bool(piece.any())


@dataclass(frozen=True)
class ShardedLayout(Layout):
    """A matrix, or a stack of them, that the processes of a group hold in pieces.

    Args:
        group: The processes that hold the matrix together.
        rank: The place of this process in the group.
        whole: ``(rows, columns)`` of the whole matrix.
        rectangles: The piece that each rank of the group holds; empty ones are allowed.

    Raises:
        ValueError: If the rectangles do not make up the whole matrix, each element once.
    """

    group: ProcessGroup = field(repr=False)
    rank: int
    whole: tuple[int, int]
    rectangles: tuple[Rectangle, ...]

    def __post_init__(self) -> None:
        """Checks that the pieces tile the matrix."""
        require(
            _tile(self.whole, self.rectangles),
            f"the pieces (top, bottom, left, right) must make up the whole {self.whole} matrix, each element once",
            [tuple(each) for each in self.rectangles],
            "a matrix that every rank holds whole has partition_dim -1",
        )

    @property
    def own(self) -> Rectangle:
        """The piece of this process."""
        return self.rectangles[self.rank]

    @cached_property
    def split(self) -> dict[int, bool]:
        """For -2 (rows) and -1 (columns): whether they are spread over several ranks."""
        rows, columns = zip(*(each.shape for each in self.rectangles), strict=True)
        return {-2: set(rows) != {self.whole[0]}, -1: set(columns) != {self.whole[1]}}

    @override
    def shape(self, local: torch.Tensor) -> tuple[int, int]:
        return self.whole

    @override
    async def norms(self, *pieces: torch.Tensor, dim: int | None = None) -> list[torch.Tensor]:
        squares = [_norm(piece, dim).square_() for piece in pieces]
        return [square.sqrt() for square in await self._sum(squares, dim)]

    @override
    async def totals(self, *vectors: torch.Tensor, dim: int) -> list[torch.Tensor]:
        sums = [vector.sum(dim=dim, keepdim=True) for vector in vectors]
        counts = self.own.area and (self.own.left if dim == -2 else self.own.top) == 0
        if self.split[dim] and not counts:  # another rank holds the same stretch of the vector, and counts it
            sums = [torch.zeros_like(each) for each in sums]
        return list(await Sum(self.group, sums)) if self.split[dim] else sums

    @override
    async def first(self, piece: torch.Tensor, dim: int | None) -> torch.Tensor:
        has_it = self.own.area and (dim == -1 or self.own.top == 0) and (dim == -2 or self.own.left == 0)
        shape = [1 if dim in (None, d) else piece.size(d) for d in (-2, -1)]
        mine = _first(piece, dim) if has_it else piece.new_zeros([*piece.shape[:-2], *shape])
        [first] = await self._sum([mine], dim)
        return first

    @override
    async def nonzero(self, piece: torch.Tensor) -> bool:
        [count] = await Sum(self.group, [piece.any().to(torch.float32)])
        return bool(count)

    async def _sum(self, partial: Sequence[torch.Tensor], dim: int | None) -> Sequence[torch.Tensor]:
        """Sums partial results, reduced over ``dim`` or both dimensions, over the ranks that hold the rest.

        Ranks may hold different stretches of what is left (a grid of pieces): each adds its own to a full-length zero.
        """
        if not (self.split[-2] or self.split[-1] if dim is None else self.split[dim]):
            return partial
        if dim is None:
            return await Sum(self.group, partial)
        kept = -3 - dim
        length, start, size = self.whole[kept], (self.own.top, self.own.left)[kept], self.own.shape[kept]
        if size == length:
            return await Sum(self.group, partial)
        placed = []
        for each in partial:
            shape = list(each.shape)
            shape[kept] = length
            placed.append(each.new_zeros(shape))
            placed[-1].narrow(kept, start, size).copy_(each)
        return [each.narrow(kept, start, size) for each in await Sum(self.group, placed)]


@dataclass(frozen=True)
class Split:
    """A parameter in strips along one dimension, in the order of the ranks; they may differ in size.

    Args:
        group: The ranks that hold the strips.
        dim: The tensor's dimension that is split: 0 or 1 of a matrix, 1 or 2 of a stack of matrices.
    """

    group: ProcessGroup = field(repr=False)
    dim: int


@dataclass(frozen=True)
class Piece:
    """Any rectangle of a matrix.

    Args:
        group: The ranks that hold the matrix together.
        whole: ``(rows, columns)`` of the whole matrix.
        rectangle: ``(top, bottom, left, right)`` of what this rank holds: its rows and columns, the ends excluded.
        padding: Further rows at the end of this rank's tensor. They belong to no matrix and get no update, but may be
            decayed as weights are; zeros stay zero.
    """

    group: ProcessGroup = field(repr=False)
    whole: tuple[int, int]
    rectangle: tuple[int, int, int, int]
    padding: int = 0


@cache
def _tile(whole: tuple[int, int], rectangles: tuple[Rectangle, ...]) -> bool:
    """Whether the rectangles cover a matrix, each element once; many matrices of a model have the same answer."""
    return (
        all(0 <= each.top <= each.bottom <= whole[0] for each in rectangles)
        and all(0 <= each.left <= each.right <= whole[1] for each in rectangles)
        and sum(each.area for each in rectangles) == whole[0] * whole[1]
        and not any(a.overlaps(b) for a, b in combinations([each for each in rectangles if each.area], 2))
    )


def _first(piece: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The first slice along ``dim``, or the first element."""
    return piece[..., :1, :1] if dim is None else piece.narrow(dim, 0, 1)


def _norm(piece: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The local norm along ``dim``, or along both dimensions."""
    norm: torch.Tensor = torch.linalg.vector_norm(piece, dim=(-2, -1) if dim is None else dim, keepdim=True)
    return norm
