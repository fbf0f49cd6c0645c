# SPDX-License-Identifier: Apache-2.0
"""The mode "layer_sharded": every matrix goes to its owner and back."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.messages import Message, Part, all_to_all
from emerging_optimizers.adaptive_muon.exchange.mode import Exchange, Mode, Shards, in_order, in_turn
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.sharding.comparison import Flag
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout


__all__ = ["LayerSharded", "Relayed"]


class LayerSharded(Mode):
    """Two all-to-alls for all matrices: shards of M' to their owners, shards of O to their holders.

    The partial sums of squares are in the first, the whole sums in the second. Where there are replicas, an owner gets the
    shards of its own, and sends O to the holders of all: one copy for each replica.
    """

    has_owners = True

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None = None) -> Exchange:
        return _ToOwnersAndBack(group, batches, flag)

    @override
    def in_flight(self, layout: ShardedLayout) -> int:
        # The whole matrix is no more than the largest shard for each rank.
        return 2 * len(layout.rectangles) * layout.largest_shard


class Relayed(LayerSharded):
    """Three all-to-alls, where copies of O for all replicas would take too much of an owner's memory.

    An owner sends O to the ranks of its own replica. They send their shards on to the ranks that hold the same ones. All
    matrices of a round have the same replicas.
    """

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None = None) -> Exchange:
        return _ToReplicasInTurn(group, batches, flag)


class _ToOwnersAndBack(Exchange):
    """A round in the mode "layer_sharded"."""

    sends_shards = sends_results = True

    def __init__(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None) -> None:
        self._group, self._me, self._ranks = group, group.rank(), range(group.size())
        self._device = batches[0].momentum.device
        outgoing, incoming = _lists(self._ranks), _lists(self._ranks)
        for batch in batches:
            for owner, members in batch.members.items():
                if batch.sharded.is_peer(owner):
                    outgoing[owner] += batch.outgoing(members)
            for rank in batch.sharded.peers if self._me in batch.members else ():
                incoming[rank] += batch.incoming(batch.members[self._me], rank)
        self._shards = all_to_all(outgoing, incoming, group, self._device, flag)
        self._batches = [batch.released() for batch in batches]
        self._owned = [batch for batch in self._batches if self._me in batch.members]
        self._returned: dict[int, list[Part]] = {}  # what each owner returns, of all batches
        for batch in self._batches:
            for owner, members in batch.members.items():
                self._returned.setdefault(owner, []).extend(batch.returned(members))

    @override
    def assemble(self) -> None:
        arrived = [iter(parts) for parts in self._shards.wait()]
        self._whole = [
            batch.whole(
                batch.members[self._me],
                [[*islice(arrived[rank], batch.number_sent)] for rank in batch.sharded.peers],
            )
            for batch in self._owned
        ]

    @override
    def orthogonalize(self) -> None:
        self._orthogonalized = in_turn(self._owned, self._whole)

    @override
    def send_results(self) -> None:
        self._results = self._sent_results(self._ranks)

    def _sent_results(self, ranks: Sequence[int]) -> Message:
        """Return the results on their way to some ranks, and from those of them that are owners."""
        outgoing, incoming = _lists(self._ranks), _lists(self._ranks)
        for batch, (O, squares) in zip(self._owned, self._orthogonalized, strict=True):
            for rank in ranks:
                outgoing[rank] += batch.returning(O, squares, rank)
        for owner in self._returned.keys() & ranks:
            incoming[owner] = self._returned[owner]
        del self._orthogonalized
        return all_to_all(outgoing, incoming, self._group, self._device)

    @override
    def results(self) -> list[tuple[torch.Tensor, Squares]]:
        return in_order(self._batches, self._results.wait())


class _ToReplicasInTurn(_ToOwnersAndBack):
    """A round in the mode :class:`Relayed`."""

    @override
    def send_results(self) -> None:
        self._layout = self._batches[0].sharded
        self._results = self._sent_results(self._layout.peers)

    @override
    def relay(self) -> None:
        self._arrived = self._results.wait()
        own = [(part, part.dtype) for owner in self._layout.peers for part in self._arrived[owner]]
        outgoing, incoming = _lists(self._ranks), _lists(self._ranks)
        for rank in self._layout.counterparts:
            outgoing[rank] = own
            incoming[rank] = [part for owner in self._layout.peers_of(rank) for part in self._returned.get(owner, ())]
        self._relayed = all_to_all(outgoing, incoming, self._group, self._device)

    @override
    def results(self) -> list[tuple[torch.Tensor, Squares]]:
        relayed = self._relayed.wait()
        for rank in self._layout.counterparts:
            parts = iter(relayed[rank])
            for owner in self._layout.peers_of(rank):
                self._arrived[owner] = [*islice(parts, len(self._returned.get(owner, ())))]
        return in_order(self._batches, self._arrived)


def _lists(ranks: range) -> list[list[Any]]:
    """Return an empty list for each rank."""
    return [[] for _ in ranks]
