# SPDX-License-Identifier: Apache-2.0
"""Which part of a matrix a rank holds, and how sums over the part become sums over the matrix."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch


__all__ = ["Shard"]


@dataclass(frozen=True)
class Shard:
    """A matrix, or the part of it that this rank of a group holds: some of its rows, or some of its columns.

    Args:
        shape: ``(rows, columns)`` of the whole matrix.
        dim: The dimension that is split, -2 (rows) or -1 (columns).
        sizes: The size of every rank's shard along ``dim``; sizes may differ.
        group: The ranks, in the order of their shards. None means that this rank holds the whole matrix.
    """

    shape: tuple[int, int]
    dim: int = -2
    sizes: tuple[int, ...] = ()
    group: torch.distributed.ProcessGroup | None = None

    def total(self, sums: Sequence[torch.Tensor], kept_dims: Collection[int]) -> list[torch.Tensor]:
        """Returns sums over the whole matrix, given those over the shard along all but ``kept_dims``.

        One all-reduce adds the sums, which have one shape. Where both dimensions are kept there is nothing to add.
        """
        if self.group is None or len(kept_dims) == 2:
            return list(sums)
        stacked = torch.stack(list(sums))
        if self.dim in kept_dims:
            # Each rank has other entries. Padded with zeros to the whole size, they add up to their concatenation.
            rank = self.group.rank()
            before, after = sum(self.sizes[:rank]), sum(self.sizes[rank + 1 :])
            padding = (before, after) if self.dim == -1 else (0, 0, before, after)
            stacked = torch.nn.functional.pad(stacked, padding)
        torch.distributed.all_reduce(stacked, group=self.group)
        return list(stacked)

    def local(self, scale: torch.Tensor) -> torch.Tensor:
        """Returns the part of a whole matrix's scale that belongs to the shard."""
        if self.group is None or scale.size(self.dim) != self.shape[self.dim]:
            return scale
        rank = self.group.rank()
        return scale.narrow(self.dim, sum(self.sizes[:rank]), self.sizes[rank])
