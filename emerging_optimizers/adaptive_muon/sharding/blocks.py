# SPDX-License-Identifier: Apache-2.0
"""Blocks: the matrices of a fused parameter, below or beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.sharding.layout import Rectangle


__all__ = ["Block", "ColumnBlocks", "Index", "blocks_of", "in_words"]

# Some rows, or columns, of a tensor: a slice where they are adjacent.
Index = slice | torch.Tensor


@dataclass(frozen=True)
class ColumnBlocks:
    """The column counts of the blocks of a fused parameter, as a value of ``muon_blocks`` or of ``blocks_fn``.

    Row counts are passed as they are: ``muon_blocks = (64, 64)`` is two blocks of 64 rows.

    Args:
        sizes: The columns of each block, or of each in one pattern that repeats across the matrix.
    """

    sizes: Sequence[int]

    def __post_init__(self) -> None:
        """Keep the counts in a tuple, which compares equal; the optimizer checks them with the parameter's name."""
        if isinstance(self.sizes, list):
            object.__setattr__(self, "sizes", tuple(self.sizes))


@dataclass(frozen=True)
class Block:
    """The places ``start`` to ``stop``, the end excluded, of a pattern of ``period`` places that repeats along ``dim``.

    Places are rows of the parameter where ``dim`` is -2, and columns where it is -1.
    """

    dim: int
    start: int
    stop: int
    period: int

    def shape(self, whole: tuple[int, int]) -> tuple[int, int]:
        """Return ``(rows, columns)`` of the block in a whole parameter of this shape."""
        rows, columns = whole
        return (self._before(rows), columns) if self.dim == -2 else (rows, self._before(columns))

    def part_of(self, rectangle: Rectangle) -> Rectangle:
        """Return which part of the block is in a rectangle of the parameter."""
        top, bottom, left, right = rectangle
        if self.dim == -2:
            return Rectangle(self._before(top), self._before(bottom), left, right)
        return Rectangle(top, bottom, self._before(left), self._before(right))

    def indices(self, shard: Rectangle, device: torch.device) -> tuple[Index, Index]:
        """Return which rows and columns of a shard belong to the block; further ones of the shard's tensor are padding."""
        first, end = (shard.top, shard.bottom) if self.dim == -2 else (shard.left, shard.right)
        own = self._places(first, end, device)
        return (own, slice(None)) if self.dim == -2 else (slice(shard.shape[0]), own)

    def _before(self, place: int) -> int:
        """Return the number of the block's places before a place of the parameter."""
        patterns, rest = divmod(place, self.period)
        size = self.stop - self.start
        return patterns * size + min(max(rest - self.start, 0), size)

    def _places(self, first: int, end: int, device: torch.device) -> Index:
        """Return the block's places from one of the parameter to another, counted from the first."""
        size, numbers = self.stop - self.start, range(self._before(first), self._before(end))
        places = [number // size * self.period + self.start + number % size - first for number in numbers]
        if not places or places[-1] - places[0] + 1 == len(places):
            return slice(places[0], places[-1] + 1) if places else slice(0, 0)
        return torch.tensor(places, device=device)


def blocks_of(blocks: Any, whole: tuple[int, int], name: str) -> Sequence[Block]:
    """Return the blocks of a parameter whose whole shape is ``(rows, columns)``.

    Where the counts sum to less than its rows, or columns, the pattern repeats. A block consists of its rows in every
    repetition. Megatron's fused attention weight has its queries, keys and values in this way, one repetition per query
    group.

    Args:
        blocks: A tuple of row counts, or :class:`ColumnBlocks`.
        whole: The shape.
        name: The parameter's name in errors.

    Raises:
        ValueError: If they do not fit.
    """
    is_columns = isinstance(blocks, ColumnBlocks)
    sizes, length, word = (blocks.sizes, whole[1], "column") if is_columns else (blocks, whole[0], "row")
    require(
        isinstance(sizes, tuple)
        and len(sizes) > 0
        and all(type(size) is int and size > 0 for size in sizes)
        and length % sum(sizes) == 0,
        f"the blocks of {name} must be positive {word} counts whose sum divides its {length} {word}s",
        blocks,
        f"Give the {word}s of each block, or of each in one group where the groups repeat.",
    )
    return _resolved(-1 if is_columns else -2, sizes)


def in_words(blocks: Any) -> str:
    """Return blocks in words, such as "64, 2 x 16 rows"; they need not have been checked."""
    sizes, word = (blocks.sizes, "columns") if isinstance(blocks, ColumnBlocks) else (blocks, "rows")
    if not isinstance(sizes, tuple):
        return repr(blocks)
    equal = [(size, len([*group])) for size, group in groupby(sizes)]
    return ", ".join(f"{count} x {size}" if count > 1 else f"{size}" for size, count in equal) + f" {word}"


@cache
def _resolved(dim: int, sizes: tuple[int, ...]) -> tuple[Block, ...]:
    """Return the blocks along a dimension; many parameters of a model have the same."""
    return tuple(Block(dim, start, stop, sum(sizes)) for start, stop in pairwise(accumulate(sizes, initial=0)))
