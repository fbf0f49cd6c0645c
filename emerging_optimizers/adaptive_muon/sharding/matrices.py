# SPDX-License-Identifier: Apache-2.0
"""The logical matrices of a parameter, made of the shards that the ranks of a group have of it."""

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.sharding.agreement import require_agreement
from emerging_optimizers.adaptive_muon.sharding.blocks import Block, ColumnBlocks, Index, blocks_of
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
    "MatrixBatch",
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
    """How a group holds a parameter.

    Args:
        blocks: Its blocks, as ``muon_blocks`` has them; None where the parameter is one matrix.
        shapes: ``(rows, columns)`` of each rank's shard, with padding.
    """

    blocks: tuple[int, ...] | ColumnBlocks | None
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
    """A logical matrix of a parameter: all of the parameter, or one block.

    Args:
        layout: Where its shards are.
        block: Its number; None where the parameter is one matrix.
        rows: The local rows of the parameter that belong to it.
        columns: The local columns of the parameter that belong to it.
        first: The number of this rank's first matrix in the whole stack that the parameter is; 0 if it is a matrix.
        shard_shapes: Those of the parameter, the same on all ranks that hold the matrix together.
    """

    layout: Layout
    block: int | None = None
    rows: Index = slice(None)
    columns: Index = slice(None)
    first: int = 0
    shard_shapes: ShardShapes | None = None

    @property
    def is_all(self) -> bool:
        """Whether all local elements of the parameter belong to the matrix."""
        return all(isinstance(index, slice) and index == slice(None) for index in (self.rows, self.columns))

    @property
    def batch_key(self) -> Hashable:
        """A key that the matrices of two parameters share on every rank, or on none, if they can be in one batch."""
        return self.layout, self.block, self.shard_shapes

    def shape(self, p: torch.Tensor) -> tuple[int, int]:
        """Return ``(rows, columns)`` of the whole matrix, one of this parameter's."""
        return self.layout.shape(self.of(as_matrices(p)))

    def local_shape(self, of_parameter: Sequence[int]) -> tuple[int, int]:
        """Return ``(rows, columns)`` of what this rank holds of it, in a tensor of the parameter's local shape."""
        rows, columns = of_parameter[-2:]
        return _length(self.rows, rows), _length(self.columns, columns)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrix's part of a tensor of the parameter's shape: a view where its places are adjacent."""
        return tensor if self.is_all else tensor[..., self.rows, self.columns]


def _length(index: Index, of_all: int) -> int:
    """Return the number of rows, or columns, that an index takes of all of them."""
    return len(range(of_all)[index]) if isinstance(index, slice) else len(index)


@dataclass(frozen=True, eq=False)
class MatrixBatch:
    """Matrices of one layout that are worked on as one tensor: equal blocks of a parameter, and of several parameters.

    Args:
        matrices: The matrices, in their order in the tensor.
        places: For each, the place of its parameter among those of an update.
        owners: For each, the rank that orthogonalizes it in "layer_sharded", in order.
    """

    matrices: Sequence[Matrix]
    places: Sequence[int]
    owners: Sequence[int]

    @property
    def layout(self) -> Layout:
        """The layout of all of them."""
        return self.matrices[0].layout

    def of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the matrices' parts of a tensor for each parameter: views where their places are adjacent."""
        return [matrix.of(tensors[place]) for matrix, place in zip(self.matrices, self.places, strict=True)]

    @contextmanager
    def in_place(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Return a context with the matrices' parts of tensors, as :meth:`of` returns them, to be changed in place."""
        parts = self.of(tensors)
        yield parts
        for matrix, place, part in zip(self.matrices, self.places, parts, strict=True):
            if isinstance(matrix.rows, torch.Tensor) or isinstance(matrix.columns, torch.Tensor):
                tensors[place][..., matrix.rows, matrix.columns] = part  # not adjacent, so the part is a copy


def merge_blocks(matrices: Sequence[Matrix], parts: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Return one tensor that is made of a tensor for each matrix of a parameter of this shape; each is broadcastable.

    Rows of padding, which belong to no matrix, are zero in the result.
    """
    if matrices[0].is_all:
        return parts[0]
    merged = parts[0].new_zeros(shape)
    for matrix, part in zip(matrices, parts, strict=True):
        merged[..., matrix.rows, matrix.columns] = part
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
    dtype, local = str(p.dtype).removeprefix("torch."), tuple(as_matrices(p).shape)
    split_by = split.dim - len(local) if isinstance(split, Split) else whole
    replica = split.replica if isinstance(split, ReplicaPiece) else 0 if replicas is None else replicas.rank()
    place = 0 if isinstance(split, Layout) else split.group.rank()
    return ShardInfo(name, group, dtype, blocks, split_by, local, rectangle, replica, place)


def whole_matrices(p: torch.Tensor, name: str, blocks: Any, first: int = 0) -> tuple[Matrix, ...]:
    """Return the matrices of a parameter that is held whole.

    ``blocks`` are its row or column counts, or None. ``first`` is the number of its first matrix in the whole stack.
    """
    if blocks is None:
        return (Matrix(Layout(), first=first),)
    rows, columns = as_matrices(p).shape[-2:]
    whole, shapes = Rectangle(0, rows, 0, columns), ShardShapes(blocks, ((rows, columns),))
    return tuple(
        Matrix(Layout(), number, *block.indices(whole, p.device), first, shapes)
        for number, block in enumerate(blocks_of(blocks, (rows, columns), name))
    )


def sharded_matrices(
    p: torch.Tensor,
    name: str,
    group: ProcessGroup,
    infos: Sequence[ShardInfo],
    mode: Mode | None,
    replicas: ProcessGroup | None = None,
    first: int = 0,
) -> tuple[Matrix, ...]:
    """Return the matrices of a parameter that a group holds, from what each rank has sent about its shard.

    Args:
        p: The parameter.
        name: Its name in errors.
        group: The group.
        infos: What each of its ranks has sent.
        mode: How shards are orthogonalized; None for each as a matrix of its own.
        replicas: The ranks that then share the work on this rank's shard, if there are several.
        first: The number of this rank's first matrix in the whole stack.

    Raises:
        ValueError: If shards or blocks do not fit together, or the mode cannot orthogonalize the matrix.
    """
    require_agreement(
        [info.local[:-2] for info in infos], f"the number of matrices in {name}", "Give all ranks as many."
    )
    whole, rectangles = _rectangles(infos)
    blocks, own = infos[0].blocks, rectangles[group.rank()]
    local = tuple((info.local[-2], info.local[-1]) for info in infos)
    shapes = ShardShapes(blocks, _shared(local if mode is not None else (local[group.rank()],)))
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
        return (Matrix(layout(whole, rectangles, name), rows=unpadded, first=first, shard_shapes=shapes),)
    return tuple(
        Matrix(
            layout(block.shape(whole), _parts(block, rectangles), f"a block of {name}"),
            number,
            *block.indices(own, p.device),
            first,
            shapes,
        )
        for number, block in enumerate(blocks_of(blocks, whole, name))
    )


@cache
def _parts(block: Block, rectangles: tuple[Rectangle, ...]) -> tuple[Rectangle, ...]:
    """Return what each rank holds of a block; many parameters of a model have the same blocks and the same split."""
    return tuple(block.part_of(rectangle) for rectangle in rectangles)


def _of_replicas(group: ProcessGroup | None, shape: tuple[int, int]) -> Layout:
    """Return the layout of a matrix of which the ranks of a group, if there is one, hold a replica each."""
    if group is None:
        return Layout()
    rectangles, ranks = (Rectangle(0, shape[0], 0, shape[1]),) * group.size(), tuple(range(group.size()))
    return ShardedLayout(group, group.rank(), shape, _shared(rectangles), _shared(ranks))


def _rectangles(infos: Sequence[ShardInfo]) -> tuple[tuple[int, int], tuple[Rectangle, ...]]:
    """Return the whole shape of a matrix, and the rectangle of each rank's shard."""
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
    """Return one object for all that are equal: a model has many matrices of one split, a large group many shards."""
    return shards
