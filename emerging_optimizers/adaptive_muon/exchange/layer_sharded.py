# SPDX-License-Identifier: Apache-2.0
"""The mode "layer_sharded": every matrix goes to its owner and back."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.messages import all_to_all
from emerging_optimizers.adaptive_muon.exchange.mode import Exchange, Mode, Shards, in_order
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.sharding.comparison import Flag
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout


__all__ = ["LayerSharded"]


class LayerSharded(Mode):
    """Two all-to-alls for all matrices: shards of M' to their owners, shards of O to their holders.

    The partial sums of squares are in the first, the whole sums in the second. Where there are replicas, an owner gets the
    shards of its own, and sends O to the holders of all.
    """

    has_owners = True

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None = None) -> Exchange:
        return _ToOwnersAndBack(group, batches, flag)

    @override
    def in_flight(self, layout: ShardedLayout) -> int:
        # The whole matrix is no more than the largest shard for each rank.
        return 2 * len(layout.rectangles) * layout.largest_shard


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

    @override
    def assemble(self) -> None:
        arrived = [iter(parts) for parts in self._shards.wait()]
        self._whole = [
            batch.whole(
                batch.members[self._me],
                [[*islice(arrived[rank], 1 + len(batch.squares))] for rank in batch.sharded.peers],
            )
            for batch in self._owned
        ]

    @override
    def orthogonalize(self) -> None:
        self._whole.reverse()  # each is released when it has been orthogonalized
        self._orthogonalized = [batch.orthogonalize(*self._whole.pop()) for batch in self._owned]

    @override
    def send_results(self) -> None:
        outgoing, incoming = _lists(self._ranks), _lists(self._ranks)
        for batch, (O, squares) in zip(self._owned, self._orthogonalized, strict=True):
            for rank in self._ranks:
                outgoing[rank] += batch.returning(O, squares, rank)
        for batch in self._batches:
            for owner, members in batch.members.items():
                incoming[owner] += batch.returned(members)
        self._results = all_to_all(outgoing, incoming, self._group, self._device)
        del self._orthogonalized

    @override
    def results(self) -> list[tuple[torch.Tensor, Squares]]:
        return in_order(self._batches, self._results.wait())


def _lists(ranks: range) -> list[list[Any]]:
    """An empty list for each rank."""
    return [[] for _ in ranks]
