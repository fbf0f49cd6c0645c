# SPDX-License-Identifier: Apache-2.0
"""The mode "layer_sharded": every matrix goes to its owner and back."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.messages import all_to_all
from emerging_optimizers.adaptive_muon.exchange.mode import Mode, Shards, in_order
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout


__all__ = ["LayerSharded"]


class LayerSharded(Mode):
    """Two all-to-alls for all matrices: shards of M' to their owners, shards of O to their holders.

    The partial sums of squares are in the first, the whole sums in the second. Where there are replicas, an owner gets the
    shards of its own, and sends O to the holders of all.
    """

    has_owners = True

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards]) -> list[tuple[torch.Tensor, Squares]]:
        me, ranks, device = group.rank(), range(group.size()), batches[0].momentum.device
        outgoing, incoming = _lists(ranks), _lists(ranks)
        for batch in batches:
            for owner, members in batch.members.items():
                if batch.sharded.is_peer(owner):
                    outgoing[owner] += batch.outgoing(members)
            for rank in batch.sharded.peers if me in batch.members else ():
                incoming[rank] += batch.incoming(batch.members[me], rank)
        arrived = [iter(parts) for parts in all_to_all(outgoing, incoming, group, device)]

        outgoing, incoming = _lists(ranks), _lists(ranks)
        for batch in batches:
            if me in batch.members:
                number = 1 + len(batch.squares)
                shards = [[*islice(arrived[rank], number)] for rank in batch.sharded.peers]
                O, squares = batch.whole(batch.members[me], shards)
                for rank in ranks:
                    outgoing[rank] += batch.returning(O, squares, rank)
            for owner, members in batch.members.items():
                incoming[owner] += batch.returned(members)
        return in_order(batches, all_to_all(outgoing, incoming, group, device))

    @override
    def in_flight(self, layout: ShardedLayout) -> int:
        # The whole matrix is no more than the largest shard for each rank.
        return 2 * len(layout.rectangles) * layout.largest_shard


def _lists(ranks: range) -> list[list[Any]]:
    """An empty list for each rank."""
    return [[] for _ in ranks]
