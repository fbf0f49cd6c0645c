# SPDX-License-Identifier: Apache-2.0
"""The logical matrices of a parameter, made of the shards that the ranks of a group have of it."""

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.sharding.agreement import require_agreement
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices
from emerging_optimizers.adaptive_muon.sharding.layout import (
    Layout,
    Piece,
    Rectangle,
    ReplicaPiece,
    ShardedLayout,
    Split,
)


__all__ = [
    "Matrix",
    "Mode",
    "ShardInfo",
    "ShardShapes",
    "merge_blocks",
    "shard_info",
    "sharded_matrices",
    "whole_matrices",
]


class Mode(Protocol):
    """What orthogonalizes matrices in shards, as far as it concerns their layouts."""

    @property
    def has_owners(self) -> bool:
        """Whether a matrix is orthogonalized by one rank."""

    def check(self, layout: ShardedLayout, name: str) -> None:
        """Raise a ``ValueError`` if it cannot orthogonalize a matrix of this layout."""


class ShardShapes(NamedTuple):
    """How a group holds a parameter: its row blocks, and the rows and columns of each rank's shard with padding."""

    blocks: tuple[int, ...] | None
    shapes: tuple[tuple[int, int], ...]

    @override
    def __hash__(self) -> int:
        """Return a hash that passes over most shards, of which a large group has many."""
        return hash((self.blocks, len(self.shapes), self.shapes[0], self.shapes[-1]))

    @property
    def largest(self) -> tuple[int, int]:
        """The shape of the largest shard."""
        return max(self.shapes, key=math.prod)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A logical matrix of a parameter: all of the parameter, or the rows of one block."""

    layout: Layout
    block: int | None = None  # its number; None where the parameter is one matrix
    rows: slice | torch.Tensor = slice(None)  # the local rows of the parameter that belong to it
    shard_shapes: ShardShapes | None = None  # of the parameter, the same on all ranks; None where it is whole

    @property
    def is_all(self) -> bool:
        """Whether all local rows of the parameter belong to the matrix."""
        return isinstance(self.rows, slice) and self.rows == slice(None)

    @property
    def batch_key(self) -> Hashable:
        """A key that the matrices of two parameters share on every rank, or on none, if they can be in one batch."""
        rows = self.rows if isinstance(self.rows, slice) else id(self.rows)
        return self.layout, self.block, rows if self.shard_shapes is None else self.shard_shapes

    def shape(self, p: torch.Tensor) -> tuple[int, int]:
        """Return ``(rows, columns)`` of the whole matrix, one of this parameter's."""
        return self.layout.shape(self.of(as_matrices(p)))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrix's part of a tensor of the parameter's shape: a view where its rows are adjacent."""
        return tensor if self.is_all else tensor[..., self.rows, :]

    @contextmanager
    def in_place(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Return a context with the matrix's parts of tensors, as :meth:`of` returns them, to be changed in place."""
        parts = [self.of(tensor) for tensor in tensors]
        yield parts
        if isinstance(self.rows, torch.Tensor):  # rows that are not adjacent were copied
            for tensor, part in zip(tensors, parts, strict=True):
                tensor[..., self.rows, :] = part


def merge_blocks(matrices: Sequence[Matrix], parts: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Return one tensor that is made of a tensor for each matrix of a parameter of this shape; each is broadcastable.

    Rows of padding, which belong to no matrix, are zero in the result.
    """
    if matrices[0].is_all:
        return parts[0]
    merged = parts[0].new_zeros(shape)
    for matrix, part in zip(matrices, parts, strict=True):
        merged[..., matrix.rows, :] = part
    return merged


class ShardInfo(NamedTuple):
    """What a rank sends to the others about its shard of a parameter. The first five must be the same on all ranks."""

    name: str
    group: int
    dtype: str
    blocks: Any
    split: int | tuple[int, int] | None  # the dimension of a Split, the whole shape of a Piece
    local: tuple[int, ...]
    rectangle: tuple[int, int, int, int] | None
    replica: int  # the number of the replica that the shard belongs to
    place: int  # of the rank among those of the replica

    def common(self) -> str:
        """Return what must be the same on all ranks, as text for an error."""
        shape: list[Any] = [*self.local]
        if isinstance(self.split, int):
            shape[self.split] = "*"
        elif self.split is not None:
            shape[-2:] = self.split
        elif len(shape) > 2:
            shape[0] = "*"  # a stack of whole matrices, of which ranks may hold different ones
        how = f" split along dim {len(shape) + self.split}" if isinstance(self.split, int) else ""
        return (
            f"{self.name}: ({', '.join(map(str, shape))}) {self.dtype}{how}"
            + (f" in blocks {self.blocks}" if self.blocks is not None else "")
            + (f" in group {self.group}" if self.group else "")
        )


def shard_info(
    p: torch.Tensor, name: str, group: int, split: Layout | Split | Piece, blocks: Any, replicas: ProcessGroup | None
) -> ShardInfo:
    """Return what to send to the other ranks about a parameter of the group with this number.

    ``replicas`` are the ranks with the same shard; None where there are no others, or the split says the replica.
    """
    whole, rectangle = (split.whole, split.rectangle) if isinstance(split, Piece) else (None, None)
    split_by = split.dim - p.ndim if isinstance(split, Split) else whole
    dtype, local = str(p.dtype).removeprefix("torch."), tuple(as_matrices(p).shape)
    replica = split.replica if isinstance(split, ReplicaPiece) else 0 if replicas is None else replicas.rank()
    place = 0 if isinstance(split, Layout) else split.group.rank()
    return ShardInfo(name, group, dtype, blocks, split_by, local, rectangle, replica, place)


def whole_matrices(p: torch.Tensor, name: str, blocks: Any) -> tuple[Matrix, ...]:
    """Return the matrices of a parameter that is held whole; ``blocks`` are the row counts of its blocks, or None."""
    local = as_matrices(p)
    if blocks is None:
        return (Matrix(Layout()),)
    rows = range(local.size(-2))
    return tuple(
        Matrix(Layout(), index, block.rows_in(rows, local.device))
        for index, block in enumerate(_row_blocks(blocks, len(rows), name))
    )


def sharded_matrices(
    p: torch.Tensor,
    name: str,
    group: ProcessGroup,
    infos: Sequence[ShardInfo],
    mode: Mode | None,
    replicas: ProcessGroup | None = None,
) -> tuple[Matrix, ...]:
    """Return the matrices of a parameter that a group holds, from what each rank has sent about its shard.

    Args:
        p: The parameter.
        name: Its name in errors.
        group: The group.
        infos: What each of its ranks has sent.
        mode: How shards are orthogonalized; None for each as a matrix of its own.
        replicas: The ranks that then share the work on this rank's shard, if there are several.

    Raises:
        ValueError: If shards or blocks do not fit together, or the mode cannot orthogonalize the matrix.
    """
    require_agreement(
        [info.local[:-2] for info in infos], f"the number of matrices in {name}", "give all ranks as many"
    )
    whole, rectangles = _rectangles(infos)
    blocks, own = infos[0].blocks, rectangles[group.rank()]
    local = tuple((info.local[-2], info.local[-1]) for info in infos)
    shapes = None if mode is None else ShardShapes(blocks, _shared(local))
    of_rank = tuple(info.replica for info in infos)
    of_rank = _shared(of_rank) if len(set(of_rank)) > 1 else ()

    def layout(whole: tuple[int, int], rectangles: tuple[Rectangle, ...], name: str) -> Layout:
        sharded = ShardedLayout(group, group.rank(), whole, _shared(rectangles), of_rank)
        if mode is None and (sharded.is_split or not of_rank):
            return _of_replicas(replicas, sharded.own.shape)
        if mode is not None and sharded.is_split:
            mode.check(sharded, name)
        return sharded

    if blocks is None:
        rows = own.shape[0]
        unpadded = slice(None) if rows == as_matrices(p).size(-2) else slice(rows)
        return (Matrix(layout(whole, rectangles, name), rows=unpadded, shard_shapes=shapes),)
    shard, matrices = range(own.top, own.bottom), []
    for index, block in enumerate(_row_blocks(blocks, whole[0], name)):
        before = block.rows_before
        in_block = tuple(Rectangle(before(r.top), before(r.bottom), r.left, r.right) for r in rectangles)
        block_layout = layout((before(whole[0]), whole[1]), in_block, f"a block of {name}")
        matrices.append(Matrix(block_layout, index, block.rows_in(shard, p.device), shapes))
    return tuple(matrices)


def _of_replicas(group: ProcessGroup | None, shape: tuple[int, int]) -> Layout:
    """The layout of a matrix of which the ranks of a group, if there is one, hold a replica each."""
    if group is None:
        return Layout()
    rectangles, ranks = (Rectangle(0, shape[0], 0, shape[1]),) * group.size(), tuple(range(group.size()))
    return ShardedLayout(group, group.rank(), shape, _shared(rectangles), _shared(ranks))


def _rectangles(infos: Sequence[ShardInfo]) -> tuple[tuple[int, int], tuple[Rectangle, ...]]:
    """The whole shape of a matrix, and the rectangle of each rank's shard."""
    split, (rows, columns) = infos[0].split, infos[0].local[-2:]
    if split is None:
        return (rows, columns), (Rectangle(0, rows, 0, columns),) * len(infos)
    if isinstance(split, tuple):
        return split, tuple(Rectangle(*info.rectangle) for info in infos if info.rectangle is not None)
    ends: dict[int, int] = {}  # of the strips of each replica
    strips = {}
    for rank in sorted(range(len(infos)), key=lambda rank: infos[rank].place):
        start = ends.get(infos[rank].replica, 0)
        strips[rank] = start, start + infos[rank].local[split]
        ends[infos[rank].replica] = strips[rank][1]
    end = max(ends.values())
    of_ranks = [strips[rank] for rank in range(len(infos))]
    if split == -2:
        return (end, columns), tuple(Rectangle(start, stop, 0, columns) for start, stop in of_ranks)
    return (rows, end), tuple(Rectangle(0, rows, start, stop) for start, stop in of_ranks)


@cache
def _shared[Shards: tuple[Any, ...]](shards: Shards) -> Shards:
    """One object for all that are equal: many matrices of a model are split alike, and a large group has many shards."""
    return shards


@dataclass(frozen=True)
class _RowBlock:
    """The rows ``start`` to ``stop``, the end excluded, of a pattern of ``period`` rows that repeats down a matrix."""

    start: int
    stop: int
    period: int

    def rows_before(self, row: int) -> int:
        """Return the number of the block's rows above a row of the parameter."""
        patterns, rest = divmod(row, self.period)
        return patterns * (self.stop - self.start) + min(max(rest - self.start, 0), self.stop - self.start)

    def rows_in(self, shard: range, device: torch.device) -> slice | torch.Tensor:
        """Return which rows of a shard belong to the block: a slice where they are adjacent, else their indices."""
        rows = [row - shard.start for row in shard if self.start <= row % self.period < self.stop]
        if not rows or rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)
        return torch.tensor(rows, device=device)


def _row_blocks(blocks: Any, rows: int, name: str) -> list[_RowBlock]:
    """Return the blocks of a matrix, whose row counts are ``blocks``, or raise a ``ValueError`` if they do not fit.

    Where they sum to less than ``rows``, the pattern repeats down the matrix. A block consists of its rows in every
    repetition. Megatron's fused attention weight has its queries, keys and values in this way, one repetition per query
    group.
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
    return [_RowBlock(start, stop, sum(blocks)) for start, stop in pairwise(accumulate(blocks, initial=0))]
