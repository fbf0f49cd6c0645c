# SPDX-License-Identifier: Apache-2.0
"""Who orthogonalizes what, and how much at a time."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import cast

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.dtensor import local_of
from emerging_optimizers.adaptive_muon.layout import ShardedLayout
from emerging_optimizers.adaptive_muon.orthogonalizer import Orthogonalize
from emerging_optimizers.adaptive_muon.sharding import Matrix


__all__ = ["Plan", "make_plan"]

_BYTES = 4  # pieces travel in float32


@dataclass(frozen=True)
class Plan:
    """How to go through the parameters of a step.

    Args:
        rounds: The parameters, those of a round to be worked on side by side.
        homes: For each matrix in pieces, the rank of its group that orthogonalizes it where one does it for all.
    """

    rounds: list[list[torch.Tensor]]
    homes: dict[Matrix, int]


def make_plan(
    parameters: Mapping[torch.Tensor, Sequence[Matrix]], mode: type[Orthogonalize] | None, max_bytes_in_flight: int
) -> Plan:
    """Returns the plan of a step, the same on all ranks that hold the same parameters.

    Args:
        parameters: The parameters of the step and their matrices.
        mode: How matrices in pieces are orthogonalized.
        max_bytes_in_flight: What a rank may have to send and to receive at once. A round ends where it would be more;
            a parameter that is beyond it by itself has a round of its own.
    """
    by_group: dict[ProcessGroup | None, list[torch.Tensor]] = {}
    for p, matrices in parameters.items():
        [group] = {matrix.layout.group if isinstance(matrix.layout, ShardedLayout) else None for matrix in matrices}
        by_group.setdefault(group, []).append(p)
    plan = Plan([[p] for p in by_group.pop(None, [])], {})
    for group, held in by_group.items():
        assert group is not None and mode is not None
        shared = [_Shared(p, matrix) for p in held for matrix in parameters[p]]
        plan.homes.update(_homes(shared, group.size()))
        loads = {p: [0] * group.size() for p in held}
        for each in shared:
            receivers = mode.receivers(plan.homes[each.matrix], group.size())
            loads[each.p] = list(map(add, loads[each.p], each.load(receivers)))
        plan.rounds.extend(_rounds(loads, max_bytes_in_flight))
    return plan


@dataclass(frozen=True)
class _Shared:
    """A matrix that a group holds in pieces, and its parameter."""

    p: torch.Tensor
    matrix: Matrix

    @property
    def layout(self) -> ShardedLayout:
        """The layout, known to be sharded."""
        return cast(ShardedLayout, self.matrix.layout)

    @property
    def stack(self) -> int:
        """How many matrices of this shape lie in a stack."""
        return math.prod(local_of(self.p).shape[:-2])

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


def _rounds(loads: dict[torch.Tensor, list[int]], most: int) -> list[list[torch.Tensor]]:
    """The parameters, those with the most to send and receive first, in rounds in which no rank has too much."""
    rounds: list[list[torch.Tensor]] = []
    in_flight: list[int] = []
    for p in sorted(loads, key=lambda p: -sum(loads[p])):
        together = list(map(add, in_flight, loads[p]))
        if not rounds or max(together) > most:
            rounds.append([])
            together = loads[p]
        rounds[-1].append(p)
        in_flight = together
    return rounds
