# SPDX-License-Identifier: Apache-2.0
"""Where the shards of a matrix are: the whole shape, and the rectangle that each rank holds."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require


__all__ = ["Layout", "PartOfStack", "Piece", "Rectangle", "ReplicaPiece", "ShardedLayout", "Split", "kept_shape"]


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

    def cut(self, whole: torch.Tensor, dims: Collection[int] = (-2, -1)) -> torch.Tensor:
        """Return the view of a tensor of the whole matrix that belongs to this rectangle.

        Args:
            whole: Shape ``(..., rows, columns)``, with size 1 in a dimension that it does not keep.
            dims: Which of the dimensions -2 and -1 it keeps.
        """
        if -2 in dims:
            whole = whole[..., self.top : self.bottom, :]
        return whole[..., self.left : self.right] if -1 in dims else whole


@dataclass(frozen=True)
class Layout:
    """A matrix that is held whole."""

    @property
    def sums_over(self) -> ProcessGroup | None:
        """The group whose partial sums add up to those of the whole matrix; None where a rank has the whole matrix."""
        return None

    def shape(self, local: torch.Tensor) -> tuple[int, int]:
        """Return ``(rows, columns)`` of the whole matrix.

        Args:
            local: What this rank holds of it, of shape ``(..., rows, columns)``.
        """
        return local.size(-2), local.size(-1)

    def cut(self, whole: torch.Tensor, dims: Collection[int] = (-2, -1)) -> torch.Tensor:
        """Return the view of a tensor of the whole matrix that belongs to this rank's shard.

        Args:
            whole: Shape ``(..., rows, columns)``, with size 1 in a dimension that it does not keep.
            dims: Which of the dimensions -2 and -1 it keeps.
        """
        return whole


@dataclass(frozen=True)
class PartOfStack(Layout):
    """Some matrices of a stack, each held whole; the ranks of a group hold the others, in the order of the ranks."""

    group: ProcessGroup = field(repr=False)


@dataclass(frozen=True)
class ShardedLayout(Layout):
    """A matrix, or a stack of them, of which the ranks of a group hold shards, or replicas, or shards of replicas.

    Args:
        group: The ranks that hold the matrix.
        rank: This rank in the group.
        whole: ``(rows, columns)`` of the whole matrix.
        rectangles: The shard that each rank of the group holds; empty ones are allowed.
        replicas: For each rank the number of the replica that its shard belongs to; empty where there is only one.

    Raises:
        ValueError: If the rectangles of a replica do not make up the whole matrix, each element once.
    """

    group: ProcessGroup = field(repr=False)
    rank: int
    whole: tuple[int, int]
    rectangles: tuple[Rectangle, ...]
    replicas: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check that the shards of each replica tile the matrix."""
        require(
            _tile(self.whole, self.rectangles, self.replicas),
            f"the shards (top, bottom, left, right) must make up the whole {self.whole} matrix, each element once"
            + (f", in each of the replicas {self.replicas}" if self.replicas else ""),
            [tuple(each) for each in self.rectangles],
            "Set partition_dim to -1 for a matrix that every rank holds whole.",
        )

    @override
    def __hash__(self) -> int:
        """Return a hash that passes over the shards, of which a large group has many."""
        return hash((self.group, self.rank, self.whole))

    @property
    @override
    def sums_over(self) -> ProcessGroup | None:
        return self.group if self.is_split else None

    @property
    def own(self) -> Rectangle:
        """The shard of this rank."""
        return self.rectangles[self.rank]

    @cached_property
    def peers(self) -> tuple[int, ...]:
        """The ranks that hold this rank's replica of the matrix together, this rank among them."""
        return self.peers_of(self.rank)

    def peers_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold a rank's replica together."""
        ranks = range(len(self.rectangles))
        return tuple(each for each in ranks if not self.replicas or self.replicas[each] == self.replicas[rank])

    def is_peer(self, rank: int) -> bool:
        """Return whether a rank is one of them."""
        return not self.replicas or self.replicas[rank] == self.replicas[self.rank]

    @property
    def number_of_replicas(self) -> int:
        """How many replicas there are: 1 where no two ranks hold the same."""
        return _number_of(self.replicas)

    @cached_property
    def counterparts(self) -> tuple[int, ...]:
        """The ranks with the same shard, one in each other replica; empty where replicas are not cut in the same way."""
        ranks_of: dict[int, list[int]] = {}
        for rank, replica in enumerate(self.replicas):
            ranks_of.setdefault(replica, []).append(rank)
        cuts = {tuple(self.rectangles[rank] for rank in ranks) for ranks in ranks_of.values()}
        if len(cuts) != 1:
            return ()
        place = self.peers.index(self.rank)
        return tuple(ranks[place] for ranks in ranks_of.values() if ranks[place] != self.rank)

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank's shard belongs to one replica, the same for all ranks, that counts in sums over the group."""
        return self.is_peer(0)

    @cached_property
    def largest(self) -> Rectangle:
        """The largest shard, the first of them where there are several."""
        return max(self.rectangles, key=lambda each: each.area)

    @property
    def largest_shard(self) -> int:
        """The number of elements of the largest shard."""
        return self.largest.area

    @cached_property
    def split(self) -> dict[int, bool]:
        """Whether rows (-2) and columns (-1) are split over several ranks."""
        rows, columns = zip(*(each.shape for each in self.rectangles), strict=True)
        return {-2: set(rows) != {self.whole[0]}, -1: set(columns) != {self.whole[1]}}

    @property
    def is_split(self) -> bool:
        """Whether ranks hold parts of the matrix; otherwise each holds a replica of all of it."""
        return self.split[-2] or self.split[-1]

    @override
    def shape(self, local: torch.Tensor) -> tuple[int, int]:
        return self.whole

    @override
    def cut(self, whole: torch.Tensor, dims: Collection[int] = (-2, -1)) -> torch.Tensor:
        return self.own.cut(whole, dims)


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

    @property
    def is_whole(self) -> bool:
        """Whether every rank of the group holds the whole matrix. One rank may, where the others hold empty shards."""
        return self.group.size() == 1


@dataclass(frozen=True)
class ReplicaPiece(Piece):
    """A rectangle of a replica of a matrix; the group has the ranks of all replicas."""

    replica: int = 0  # its number
    replicas: int = 1  # how many there are
    shards: ProcessGroup | None = field(default=None, repr=False)  # the ranks of this one, where replicas stay apart

    @property
    @override
    def is_whole(self) -> bool:
        return self.group.size() == self.replicas


def kept_shape(shape: tuple[int, int], dims: Collection[int]) -> tuple[int, int]:
    """Return a matrix's ``(rows, columns)`` with 1 for each of the dimensions -2 and -1 that is not kept."""
    rows, columns = shape
    return rows if -2 in dims else 1, columns if -1 in dims else 1


@cache
def _number_of(replicas: tuple[int, ...]) -> int:
    """Return how many replicas there are; many matrices of a model have the same."""
    return len({*replicas}) or 1


@cache
def _tile(whole: tuple[int, int], rectangles: tuple[Rectangle, ...], replicas: tuple[int, ...]) -> bool:
    """Return whether those of each replica cover a matrix, each element once; many matrices of a model share it."""
    if not replicas:
        return _cover(whole, rectangles)
    of_replica: dict[int, list[Rectangle]] = {}
    for rectangle, replica in zip(rectangles, replicas, strict=True):
        of_replica.setdefault(replica, []).append(rectangle)
    return all(_cover(whole, each) for each in {tuple(each) for each in of_replica.values()})


def _cover(whole: tuple[int, int], rectangles: Sequence[Rectangle]) -> bool:
    """Return whether the rectangles cover a matrix, each element once."""
    return (
        all(0 <= each.top <= each.bottom <= whole[0] for each in rectangles)
        and all(0 <= each.left <= each.right <= whole[1] for each in rectangles)
        and sum(each.area for each in rectangles) == whole[0] * whole[1]
        and _disjoint([each for each in rectangles if each.area])
    )


def _disjoint(rectangles: Sequence[Rectangle]) -> bool:
    """Return whether no two of these rectangles, which are not empty, have an element in common.

    From top to bottom, each is compared with those before it that share columns with it: one, where a matrix is in strips.
    """
    before: list[Rectangle] = []  # no two of them share columns; from left to right
    for one in sorted(rectangles):
        start = bisect_right(before, one.left, key=lambda other: other.right)
        end = bisect_left(before, one.right, key=lambda other: other.left)
        if any(other.bottom > one.top for other in before[start:end]):
            return False
        before[start:end] = [one]
    return True
