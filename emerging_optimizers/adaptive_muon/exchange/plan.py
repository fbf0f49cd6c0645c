# SPDX-License-Identifier: Apache-2.0
"""Who orthogonalizes what, and how much at a time."""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import NamedTuple, cast

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.orthogonalizer import Orthogonalize
from emerging_optimizers.adaptive_muon.orthogonalize.batches import in_batches
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix


__all__ = ["Plan", "Ready", "Stack", "make_plan"]

_BYTES = 4  # pieces travel in float32


class Ready(NamedTuple):
    """All that a plan depends on of a parameter with a gradient: its matrices, its group's number, what is held here."""

    matrices: tuple[Matrix, ...]
    group: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    transposed: bool = False


@dataclass(frozen=True, eq=False)
class Stack:
    """Parameters alike in all but their values, to be worked on as one.

    Args:
        members: The parameters, by their places among those of the step.
        group: The number of their group.
        matrices: The logical matrices of the first; the others' lie like them.
        homes: For each of these, and each parameter, the rank that orthogonalizes it where one does it for all.
        among_many: Whether the step has so many matrices in pieces that they take several rounds.
    """

    members: list[int]
    group: int
    matrices: tuple[Matrix, ...]
    homes: list[list[int]]
    among_many: bool


@dataclass(frozen=True)
class Plan:
    """How to go through the parameters of a step.

    Args:
        rounds: The parameters in stacks, those of a round to be worked on side by side.
        homes: For each matrix in pieces, the rank of its group that orthogonalizes it where one does it for all.
    """

    rounds: list[list[Stack]]
    homes: dict[Matrix, int]


def make_plan(ready: Sequence[Ready], mode: type[Orthogonalize] | None, max_bytes_in_flight: int) -> Plan:
    """Returns the plan of a step, the same on all ranks that hold the same parameters.

    Args:
        ready: The parameters of the step.
        mode: How matrices in pieces are orthogonalized.
        max_bytes_in_flight: What a rank may have to send and to receive at once. A round ends where it would be more;
            a parameter that is beyond it by itself has a round of its own.
    """
    by_group: dict[ProcessGroup | None, dict[int, Ready]] = {}
    for index, each in enumerate(ready):
        layouts = [matrix.layout for matrix in each.matrices]
        [group] = {layout.group if isinstance(layout, ShardedLayout) else None for layout in layouts}
        by_group.setdefault(group, {})[index] = each
    plan = Plan([[stack] for stack in _stacks(by_group.pop(None, {}), {})], {})
    for group, held in by_group.items():
        assert group is not None and mode is not None
        shared = [_Shared(index, each.shape, matrix) for index, each in held.items() for matrix in each.matrices]
        plan.homes.update(_homes(shared, group.size()))
        loads = {index: [0] * group.size() for index in held}
        for one in shared:
            receivers = mode.receivers(plan.homes[one.matrix], group.size())
            loads[one.index] = list(map(add, loads[one.index], one.load(receivers)))
        rounds = _rounds(loads, max_bytes_in_flight)
        plan.rounds.extend(
            _stacks({index: held[index] for index in at_once}, plan.homes, among_many=len(rounds) > 1)
            for at_once in rounds
        )
    return plan


def _stacks(ready: Mapping[int, Ready], homes: Mapping[Matrix, int], *, among_many: bool = False) -> list[Stack]:
    """The parameters in stacks, each of no more than keep the device busy.

    Stacks wait for the other ranks one after the other, so that those of parameters in pieces must be the same on all
    ranks that hold some: only what all of these know decides.
    """
    alike: dict[Hashable, list[int]] = {}
    for index, each in ready.items():
        alike.setdefault((tuple(matrix.batch_key for matrix in each.matrices), *each[1:]), []).append(index)
    stacks = []
    for members in alike.values():
        first = ready[members[0]]
        held = first.matrices[0].shard_shapes
        shape = first.shape if held is None else (*first.shape[:-2], *held.largest)
        for some in in_batches(members, shape, first.device):
            same = zip(*(ready[index].matrices for index in some), strict=True)
            of_homes = [[homes.get(matrix, 0) for matrix in each] for each in same]
            stacks.append(Stack([*some], first.group, ready[some[0]].matrices, of_homes, among_many))
    return stacks


@dataclass(frozen=True)
class _Shared:
    """A matrix that a group holds in pieces, and of its parameter the place and the shape at hand."""

    index: int
    shape: torch.Size
    matrix: Matrix

    @property
    def layout(self) -> ShardedLayout:
        """The layout, known to be sharded."""
        return cast(ShardedLayout, self.matrix.layout)

    @property
    def stack(self) -> int:
        """How many matrices of this shape lie in a stack."""
        return math.prod(self.shape[:-2])

    @property
    def cost(self) -> int:
        """The products of the orthogonalization, up to a common factor."""
        return self.stack * math.prod(self.layout.whole) * min(self.layout.whole)

    def load(self, receivers: Collection[int]) -> list[int]:
        """The bytes that each rank has to send, and to receive if it is one of the receivers."""
        whole = math.prod(self.layout.whole)
        areas = (each.area + whole * (rank in receivers) for rank, each in enumerate(self.layout.rectangles))
        return [_BYTES * self.stack * area for area in areas]


def _homes(shared: list[_Shared], ranks: int) -> dict[Matrix, int]:
    """A home for each matrix: the costliest first, each where the least work is.

    The largest share is then within 4/3 of the best possible (R. L. Graham, Bounds on multiprocessing timing anomalies,
    1969).
    """
    homes, work = {}, [0] * ranks
    for each in sorted(shared, key=lambda each: -each.cost):
        homes[each.matrix] = home = min(range(ranks), key=work.__getitem__)
        work[home] += each.cost
    return homes


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
