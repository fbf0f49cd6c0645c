# SPDX-License-Identifier: Apache-2.0
"""How replicas share the work: every whole matrix is orthogonalized by one of them, its owner."""

from collections.abc import Sequence
from typing import override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.messages import all_gather
from emerging_optimizers.adaptive_muon.exchange.mode import Mode, Shards, in_order
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout


__all__ = ["Replicas"]


class Replicas(Mode):
    """One all-gather for all matrices: each owner sends O and the sums of squares to all.

    Every replica averages its own momentum. V and D come from the owner's sums, so all replicas update with the same bits.
    """

    has_owners = True

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards]) -> list[tuple[torch.Tensor, Squares]]:
        me, outgoing = group.rank(), []
        for batch in batches:
            if me in batch.members:
                outgoing += batch.returning(*batch.held(batch.members[me]), me)
        incoming = [
            [part for batch in batches if rank in batch.members for part in batch.returned(batch.members[rank])]
            for rank in range(group.size())
        ]
        return in_order(batches, all_gather(outgoing, incoming, group, batches[0].momentum.device))

    @override
    def in_flight(self, layout: ShardedLayout) -> int:
        rows, columns = layout.whole
        return (1 + len(layout.rectangles)) * rows * columns
