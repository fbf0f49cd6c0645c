# SPDX-License-Identifier: Apache-2.0
"""Who orthogonalizes what, and how much at a time."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import NamedTuple, cast

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.mode import Mode
from emerging_optimizers.adaptive_muon.orthogonalize.batches import in_batches
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, is_transposed
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix


__all__ = ["Batch", "Ready", "Round", "make_plan"]

_BYTES = 4  # shards travel in float32


class Ready(NamedTuple):
    """All that a plan depends on of a parameter with a gradient."""

    matrices: tuple[Matrix, ...]
    group: int  # the number of its parameter group
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size  # of what this rank holds
    transposed: bool = False

    @property
    def depth(self) -> int:
        """The number of matrices in a stack of experts; 1 where the parameter is a matrix."""
        return math.prod(self.shape[:-2])

    @classmethod
    def of(cls, p: torch.Tensor, matrices: tuple[Matrix, ...], group: int) -> "Ready":
        """Return it for a parameter that has these logical matrices, of the group with this number."""
        return cls(matrices, group, p.dtype, p.device, as_matrices(p).shape, is_transposed(p))


@dataclass(frozen=True, eq=False)
class Batch:
    """Parameters that differ in nothing but their values, to be worked on as one tensor."""

    members: list[int]  # their places among the parameters of the step
    group: int  # the number of their parameter group
    matrices: tuple[Matrix, ...]  # of the first; the others' have the same shapes and shards
    owners: list[list[int]]  # for each matrix, and each parameter, the rank that orthogonalizes it in "layer_sharded"


class Round(NamedTuple):
    """Batches whose matrices are in the same messages."""

    process_group: ProcessGroup | None  # which holds their shards; None for whole matrices, without messages
    batches: list[Batch]


def make_plan(ready: Sequence[Ready], mode: Mode | None, max_bytes_in_flight: int) -> list[Round]:
    """Return the rounds of a step, the same on all ranks that hold the same parameters.

    Args:
        ready: The parameters of the step.
        mode: How matrices in shards are orthogonalized.
        max_bytes_in_flight: What a rank may have to send and to receive at once, sums of squares not counted. A round ends
            where it would be more; a parameter that is beyond it by itself has a round of its own.
    """
    by_group: dict[ProcessGroup | None, dict[int, Ready]] = {}
    for index, one in enumerate(ready):
        layouts = [matrix.layout for matrix in one.matrices]
        [group] = {layout.group if isinstance(layout, ShardedLayout) else None for layout in layouts}
        by_group.setdefault(group, {})[index] = one
    rounds = [Round(None, [batch]) for batch in _batches(by_group.pop(None, {}), {})]
    for group, members in by_group.items():
        assert group is not None and mode is not None
        owners = _owners(members.values(), group.size())
        loads = {}
        for index, one in members.items():
            elements = [mode.in_flight(cast(ShardedLayout, matrix.layout), owners[matrix]) for matrix in one.matrices]
            loads[index] = [_BYTES * one.depth * sum(of_rank) for of_rank in zip(*elements, strict=True)]
        for indices in _rounds(loads, max_bytes_in_flight):
            rounds.append(Round(group, _batches({index: members[index] for index in indices}, owners)))
    return rounds


def _batches(ready: Mapping[int, Ready], owners: Mapping[Matrix, int]) -> list[Batch]:
    """The parameters in batches, each of no more than keep the device busy.

    A rank must not put in one batch what another rank puts in two: messages of the right size would hold the wrong
    matrices. Only what all holders know decides about shards.
    """
    by_key: dict[Hashable, list[int]] = {}
    for index, one in ready.items():
        by_key.setdefault((tuple(matrix.batch_key for matrix in one.matrices), *one[1:]), []).append(index)
    batches = []
    for members in by_key.values():
        first = ready[members[0]]
        held = first.matrices[0].shard_shapes
        shape = first.shape if held is None else (*first.shape[:-2], *held.largest)
        of_member = {index: [owners.get(matrix, 0) for matrix in ready[index].matrices] for index in members}
        # The members of an owner are adjacent, so that a slice of the batch is sent to it.
        for part in in_batches(sorted(members, key=of_member.__getitem__), shape, first.device):
            of_matrix = [list(of) for of in zip(*(of_member[index] for index in part), strict=True)]
            batches.append(Batch([*part], first.group, ready[part[0]].matrices, of_matrix))
    return batches


def _owners(members: Iterable[Ready], ranks: int) -> dict[Matrix, int]:
    """An owner for each matrix: the costliest first, to the rank with the least work.

    The largest share is then within 4/3 of the best possible (R. L. Graham, Bounds on multiprocessing timing anomalies,
    1969). A cost is the number of multiplications in a product of the iteration.
    """
    costs = {}
    for one in members:
        for matrix in one.matrices:
            whole = cast(ShardedLayout, matrix.layout).whole
            costs[matrix] = one.depth * math.prod(whole) * min(whole)
    owners, work = {}, [0] * ranks
    for matrix in sorted(costs, key=costs.__getitem__, reverse=True):
        owners[matrix] = owner = min(range(ranks), key=work.__getitem__)
        work[owner] += costs[matrix]
    return owners


def _rounds(loads: dict[int, list[int]], most: int) -> list[list[int]]:
    """The parameters, those with the most to send and receive first, in rounds in which no rank has too much."""
    rounds: list[list[int]] = []
    in_flight: list[int] = []
    for index in sorted(loads, key=lambda index: -sum(loads[index])):
        together = list(map(add, in_flight, loads[index]))
        if not rounds or max(together) > most:
            rounds.append([])
            together = loads[index]
        rounds[-1].append(index)
        in_flight = together
    return rounds
