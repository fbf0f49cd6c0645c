# SPDX-License-Identifier: Apache-2.0
"""How a parameter is split, as far as one process can find out alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require, within
from emerging_optimizers.adaptive_muon.parameters import is_flattened
from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, is_dtensor, is_transposed, shard_of
from emerging_optimizers.adaptive_muon.sharding.layout import Layout, PartOfStack, Piece, Rectangle, Split
from emerging_optimizers.adaptive_muon.sharding.matrices import Mode


__all__ = ["BlocksFn", "LayoutFn", "ReplicaGroup", "Rules"]

LayoutFn = Callable[[torch.Tensor], Layout | Split | Piece | None]
BlocksFn = Callable[[torch.Tensor], Sequence[int] | ColumnBlocks | None]
ReplicaGroup = ProcessGroup | Callable[[torch.Tensor], ProcessGroup | None] | None


@dataclass(frozen=True)
class Rules:
    """The rules by which a parameter's split and blocks are found.

    The first five fields are options of the optimizer. ``mode`` orthogonalizes matrices in shards; None takes every shard
    for a matrix of its own. ``hooked`` refuses shards that a hook around the weight update could not take the norm of.
    """

    tp_group: ProcessGroup | None
    replica_group: ReplicaGroup
    share_replicas: bool
    layout_fn: LayoutFn | None
    blocks_fn: BlocksFn | None
    mode: Mode | None
    hooked: bool = False

    def split(self, p: torch.Tensor, name: str) -> Layout | Split | Piece:
        """Return how the matrix (out, in) of a parameter is split; ``Layout()`` where it is whole.

        Raises:
            ValueError: If the split contradicts the parameter's shape, a shard has no group, or a hook would see a part of
                a matrix; it has the name.
        """
        split = self._valid_split(p, name)
        require(
            not self.hooked
            or isinstance(split, Layout)
            or (isinstance(split, Piece) and split.is_whole)
            or (is_dtensor(p) and as_matrices(p).ndim == 2),
            f"with weight_update_hook, which takes norms of whole matrices, {name} must be held whole or be a matrix in a "
            "DTensor, which sums over its ranks; it is split",
            split,
            "Shard it as a DTensor (FSDP2), or pass weight_update_hook=None.",
        )
        return split

    def _valid_split(self, p: torch.Tensor, name: str) -> Layout | Split | Piece:
        """Return how a parameter is split, which its shape does not contradict."""
        split, ndim = _of_matrices(p, self._stored_split(p, name), name), as_matrices(p).ndim
        if isinstance(split, Layout) or (split.group.size() == 1 and not getattr(split, "padding", 0)):
            return Layout()
        if isinstance(split, Split):
            require(
                split.dim in range(ndim),
                f"the split dimension of {name} must be one of its {ndim}, counted from 0",
                split.dim,
                "Use 0 to split the rows of a matrix, 1 to split its columns.",
            )
            return split if split.dim >= ndim - 2 else PartOfStack(split.group)
        local, (rows, columns) = tuple(as_matrices(p).shape[-2:]), Rectangle(*split.rectangle).shape
        require(
            within(split.padding, 0) and local == (rows + split.padding, columns),
            f"the local shard of {name} must have the {rows} x {columns} of its rectangle and {split.padding} rows of "
            "padding; it has the shape",
            local,
            "Check the rectangle (top, bottom, left, right) and the padding.",
        )
        return split

    def place_of_shard(self, p: torch.Tensor) -> int | None:
        """Return this rank's place in the group with a parameter's shards if each of them is worked on by itself; else None.

        So it is in the mode "blockwise", and with a stack of which every rank has some matrices.
        """
        split = _of_matrices(p, self._stored_split(p, "a parameter"), "a parameter")
        if isinstance(split, Layout) or split.group.size() == 1 or (isinstance(split, Piece) and split.is_whole):
            return None
        apart = self.mode is None or (isinstance(split, Split) and split.dim < as_matrices(p).ndim - 2)
        return split.group.rank() if apart else None

    def shares(self, split: Layout | Split | Piece) -> bool:
        """Return whether replicas of a parameter that is split in this way share the work."""
        is_whole = isinstance(split, Layout) or (isinstance(split, Piece) and split.is_whole)
        return self.share_replicas and (is_whole or self.mode is None or self.mode.has_owners)

    def replicas(self, p: torch.Tensor, split: Layout | Split | Piece, name: str) -> ProcessGroup | None:
        """Return the ranks with the same shard of a parameter; None where there are no others, or it is a DTensor.

        Raises:
            ValueError: If these ranks cannot be replicas; it has the name.
        """
        if is_dtensor(p):
            return None
        group = self.replica_group
        if not isinstance(group, ProcessGroup | None):
            group = group(p)
        require(
            isinstance(group, ProcessGroup | None),
            f"replica_group must return a process group or None; for {name} it returned",
            group,
            "Return the group of the ranks with the same shard of it, or None.",
        )
        if group is None or group.size() == 1:
            return None
        if not isinstance(split, Layout):
            both = [set(dist.get_process_group_ranks(each)) for each in (split.group, group)]
            require(
                both[0] & both[1] == {dist.get_rank()},
                f"the ranks with other shards of {name}, and those with the same, must have this rank in common only",
                [sorted(ranks) for ranks in both],
                "Pass as replica_group the data-parallel ranks with the same place in their tensor-parallel group.",
            )
        return group

    def blocks(self, p: torch.Tensor) -> Any:
        """Return the row or column counts of a parameter's blocks, not yet checked; None where it is one matrix."""
        blocks = self.blocks_fn(p) if self.blocks_fn is not None else None
        blocks = getattr(p, "muon_blocks", None) if blocks is None else blocks
        blocks = getattr(p, "muon_parts", None) if blocks is None else blocks  # HybridAdaptiveMuon.from_model's
        return tuple(blocks) if isinstance(blocks, list) else blocks

    def _stored_split(self, p: torch.Tensor, name: str) -> Layout | Split | Piece:
        """Return how a parameter is split as it is stored: by layout_fn, its placements, or its partition_dim."""
        split = self.layout_fn(p) if self.layout_fn is not None else None
        if split is not None:
            require(
                isinstance(split, Layout | Split | Piece),
                f"layout_fn must return a Layout, Split, Piece or None; for {name} it returned",
                split,
                "Return None for the usual rules.",
            )
            return split
        if is_dtensor(p):
            share = self.share_replicas and self.mode is not None and self.mode.has_owners
            split = shard_of(p, name, apart=not share)
            require(
                self.mode is not None or isinstance(split, Layout) or split.is_whole,
                f"the mode must not take the shards of a DTensor for matrices; {name} is one, with tp_mode",
                "blockwise",
                'Use "layer_sharded", the default.',
            )
            return split
        dim = getattr(p, "partition_dim", -1)
        if dim is None or dim == -1:
            return Layout()
        require(
            isinstance(dim, int) and dim in range(p.ndim),
            f"partition_dim of {name} must be a dimension of it, or -1",
            dim,
            "Use 0 to split the rows, 1 to split the columns, -1 for a whole matrix.",
        )
        if self.tp_group is not None:
            return Split(self.tp_group, dim)
        require(
            not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1),
            f"a parameter with partition_dim, a shard of a matrix, must have a tp_group; {name} has partition_dim",
            dim,
            "Pass the tensor-parallel group, or set partition_dim to -1 if every rank holds all of it.",
        )
        return Layout()


def _of_matrices(p: torch.Tensor, split: Layout | Split | Piece, name: str) -> Layout | Split | Piece:
    """Return how the matrix (out, in) of a parameter is split, which may be stored as (in, out) or be flattened."""
    if is_flattened(p):
        require(
            not isinstance(split, Split) or split.dim == 0,
            f"the split dimension of {name}, which is flattened, must be the first",
            getattr(split, "dim", None),
            "Split its outputs, or pass flatten_conv=False.",
        )
        return split
    if not is_transposed(p) or isinstance(split, Layout):
        return split
    if isinstance(split, Split):
        swapped = {p.ndim - 2: p.ndim - 1, p.ndim - 1: p.ndim - 2}
        return Split(split.group, swapped.get(split.dim, split.dim))
    require(
        split.padding == 0,
        f"a parameter tagged muon_transposed must not be padded; the padding of {name} is",
        split.padding,
        "Store its transpose, without the tag.",
    )
    top, bottom, left, right = split.rectangle
    return replace(split, whole=split.whole[::-1], rectangle=(left, right, top, bottom))
