# SPDX-License-Identifier: Apache-2.0
"""Who orthogonalizes what, and how much at a time."""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heapreplace
from typing import NamedTuple, cast

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.layer_sharded import Relayed
from emerging_optimizers.adaptive_muon.exchange.mode import Mode
from emerging_optimizers.adaptive_muon.exchange.replicas import Replicas
from emerging_optimizers.adaptive_muon.orthogonalize.batches import in_batches
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, is_transposed
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, MatrixBatch


__all__ = ["Batch", "Ready", "Round", "make_plan"]

_REPLICAS, _RELAYED = Replicas(), Relayed()
_BYTES = 4  # shards travel in float32
_NEAR = 1.01  # times the least work is near enough


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
    """Parameters that differ in nothing but their values, whose equal matrices are worked on as one tensor.

    Args:
        members: Their places among the parameters of the step.
        group: The number of their parameter group.
        matrices: Their matrices, each of them in one batch.
    """

    members: list[int]
    group: int
    matrices: list[MatrixBatch]


class Round(NamedTuple):
    """Batches whose matrices are in the same messages.

    Args:
        process_group: The ranks that hold their shards; None for whole matrices, without messages.
        mode: How these ranks orthogonalize them.
        batches: The batches.
    """

    process_group: ProcessGroup | None
    mode: Mode | None
    batches: list[Batch]


def make_plan(ready: Sequence[Ready], mode: Mode | None, max_bytes_in_flight: int) -> list[Round]:
    """Return the rounds of a step, the same on all ranks that hold the same parameters.

    Args:
        ready: The parameters of the step.
        mode: How matrices in shards are orthogonalized.
        max_bytes_in_flight: The most bytes that a rank sends and receives in a round, sums of squares not counted. Where
            one matrix for every owner, or one parameter with blocks, is more, a round has that much.
    """
    whole: dict[int, Ready] = {}
    alike: dict[tuple[ProcessGroup, tuple[int, ...], bool], dict[int, Ready]] = {}
    for index, one in enumerate(ready):
        layout = one.matrices[
            0
        ].layout  # those of the parameter's other matrices have the same group and are split alike
        if isinstance(layout, ShardedLayout):
            alike.setdefault((layout.group, layout.replicas, layout.is_split), {})[index] = one
        else:
            whole[index] = one
    rounds = [Round(None, None, [batch]) for batch in _batches(whole, {})]
    together: dict[tuple[ProcessGroup, Mode, tuple[int, ...]], dict[int, Ready]] = {}
    for (group, replicas, _), members in alike.items():
        of_members = _mode_of(members.values(), mode, max_bytes_in_flight)
        key = group, of_members, replicas if of_members is _RELAYED else ()
        together.setdefault(key, {}).update(members)
    for (group, of_group, _), members in together.items():
        ranks = _owners(_layout(next(iter(members.values())))) if of_group.has_owners else [0]
        members = dict(sorted(members.items()))  # in the order of the parameters
        for indices, owners in _rounds(_loads(members, of_group), ranks, max_bytes_in_flight):
            batches = _batches({index: members[index] for index in indices}, owners)
            rounds.append(Round(group, of_group, batches))
    return rounds


def _layout(one: Ready) -> ShardedLayout:
    """Return the layout of a parameter that is held together with other ranks, or of its first block."""
    return cast(ShardedLayout, one.matrices[0].layout)


def _mode_of(members: Iterable[Ready], mode: Mode | None, max_bytes_in_flight: int) -> Mode:
    """Return how parameters are orthogonalized that the ranks of a group hold in the same replicas."""
    layouts = {_layout(one) for one in members}
    first = next(iter(layouts))
    if first.replicas and not first.is_split:
        return _REPLICAS
    assert mode is not None
    copies = max(_BYTES * len(layout.rectangles) * layout.largest_shard for layout in layouts)
    relay = first.replicas and copies > max_bytes_in_flight and all(layout.counterparts for layout in layouts)
    return _RELAYED if relay else mode


def _batches(ready: Mapping[int, Ready], owners: Mapping[Matrix, int]) -> list[Batch]:
    """Return the parameters in batches, each of no more than keep the device busy.

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
        for part in in_batches(sorted(members, key=of_member.__getitem__), shape, first.device):
            of_part = list(_matrix_batches([ready[index] for index in part], owners))
            batches.append(Batch([*part], first.group, of_part))
    return batches


def _matrix_batches(ready: Sequence[Ready], owners: Mapping[Matrix, int]) -> Iterator[MatrixBatch]:
    """Yield the matrices of these parameters in batches of one layout: blocks of one size may be split differently.

    The members of an owner are adjacent, so that a slice of the batch is sent to it.
    """
    first, alike = ready[0], dict[ShardedLayout | tuple[int, int], list[tuple[int, int, Matrix]]]()
    for place, one in enumerate(ready):
        for matrix in one.matrices:
            layout = matrix.layout
            key = layout if isinstance(layout, ShardedLayout) else matrix.local_shape(one.shape)
            alike.setdefault(key, []).append((owners.get(matrix, 0), place, matrix))
    # Those of one shape as a whole follow one another: an owner iterates on them together.
    for key, members in sorted(alike.items(), key=lambda item: getattr(item[0], "whole", (0, 0))):
        shape = key.largest.shape if isinstance(key, ShardedLayout) else key
        members.sort(key=lambda member: member[0])
        for part in in_batches(members, (*first.shape[:-2], *shape), first.device):
            of_part, places, matrices = zip(*part, strict=True)
            yield MatrixBatch(matrices, places, of_part)


class _Load(NamedTuple):
    """What a matrix adds to a round."""

    cost: int  # the multiplications in a product of the iteration
    bytes: int  # in flight
    matrix: Matrix


def _loads(members: Mapping[int, Ready], mode: Mode) -> dict[int, list[_Load]]:
    """Return the loads of each parameter's matrices, the costliest first, of parameters by their costliest matrix."""
    elements: dict[ShardedLayout, int] = {}  # many matrices have equal layouts
    loads: dict[int, list[_Load]] = {}
    for index, one in members.items():
        loads[index] = of_matrices = []
        for matrix in one.matrices:
            layout = cast(ShardedLayout, matrix.layout)
            if layout not in elements:
                elements[layout] = mode.in_flight(layout)
            cost = one.depth * math.prod(layout.whole) * min(layout.whole)
            of_matrices.append(_Load(cost, _BYTES * one.depth * elements[layout], matrix))
        of_matrices.sort(key=lambda load: -load.cost)
    return dict(sorted(loads.items(), key=lambda item: -item[1][0].cost))


def _owners(layout: ShardedLayout) -> list[int]:
    """Return the ranks in the order in which they become owners: one of each replica in turn, for all to have a share."""
    seen: dict[int, int] = {}
    places = []
    for rank, replica in enumerate(layout.replicas or [0] * len(layout.rectangles)):
        seen[replica] = seen.get(replica, 0) + 1
        places.append((seen[replica], rank))
    return [rank for _, rank in sorted(places)]


def _rounds(
    loads: Mapping[int, list[_Load]], ranks: Sequence[int], most: int
) -> list[tuple[list[int], dict[Matrix, int]]]:
    """Return the parameters of each round, and the owner of each of its matrices, of these ranks.

    The first parameter that does not fit in a round begins the next.
    """
    rounds: list[_RoundToFill] = []
    for index, of_matrices in loads.items():
        if not rounds or not rounds[-1].take(index, of_matrices):
            rounds.append(_RoundToFill(len(ranks), most))
            rounds[-1].take(index, of_matrices)
    return [(one.indices, {matrix: ranks[owner] for matrix, owner in one.balanced().items()}) for one in rounds]


class _RoundToFill:
    """A round that takes parameters as long as they fit."""

    def __init__(self, ranks: int, most: int) -> None:
        self.indices: list[int] = []
        self._ranks, self._most_bytes, self._busiest = ranks, most, 0
        self._loads: list[_Load] = []
        self._owners: list[int] = []  # of the loads
        self._open = [(0, 0, owner) for owner in range(ranks)]  # a heap: work, bytes in flight, owner

    def take(self, index: int, loads: Sequence[_Load]) -> bool:
        """Find an owner for each matrix of a parameter, or return False. A round that is empty takes any parameter.

        The owner is the one with the least work. If that one has no room, the next takes the matrix if the round does not
        become longer by it.
        """
        owners, most_bytes = [], self._most_bytes
        for load in loads:
            # The messages of the largest matrix need this memory on one rank. The same on the others costs none there.
            most_bytes = max(most_bytes, load.bytes)
            while self.indices and self._open and self._open[0][1] + load.bytes > most_bytes:
                heappop(self._open)
            if not self._open:
                return False
            work, in_flight, owner = self._open[0]
            if len(self._open) < self._ranks and work + load.cost > self._busiest:
                return False
            heapreplace(self._open, (work + load.cost, in_flight + load.bytes, owner))
            self._busiest = max(self._busiest, work + load.cost)
            owners.append(owner)
        self.indices.append(index)
        self._loads += loads
        self._owners += owners
        self._most_bytes = most_bytes
        return True

    def balanced(self) -> dict[Matrix, int]:
        """Return the owners, others than :meth:`take` found where the busiest then has less work.

        With the least work first, and room for all, the busiest has at most 4/3 of the least that it can have (R. L. Graham,
        Bounds on multiprocessing timing anomalies, 1969). First fit, with a search for the most work that an owner may
        have, is often better (Coffman, Garey and Johnson, An application of bin-packing to multiprocessor scheduling, 1978).
        """
        work, owners = [0] * self._ranks, self._owners
        for load, owner in zip(self._loads, owners, strict=True):
            work[owner] += load.cost
        largest = max(load.cost for load in self._loads)
        least, most = max(-(-sum(work) // self._ranks), largest), max(work)
        while most > _NEAR * least:
            middle = (least + most) // 2
            found = self._first_fit(middle)
            if found is None:
                least = middle + 1
            else:
                owners, most = found, middle
        return {load.matrix: owner for load, owner in zip(self._loads, owners, strict=True)}

    def _first_fit(self, most_work: int) -> list[int] | None:
        """Return owners of which none has more work than this, or None where a matrix, from the costliest on, fits on none."""
        work, in_flight = [0] * self._ranks, [0] * self._ranks
        owners, owner, last = [0] * len(self._loads), 0, None
        for place in sorted(range(len(owners)), key=lambda place: self._loads[place][:2], reverse=True):
            cost, size, _ = self._loads[place]
            if (cost, size) != last:  # else no owner before has room either
                owner, last = 0, (cost, size)
            while work[owner] + cost > most_work or in_flight[owner] + size > self._most_bytes:
                owner += 1
                if owner == self._ranks:
                    return None
            work[owner] += cost
            in_flight[owner] += size
            owners[place] = owner
        return owners
