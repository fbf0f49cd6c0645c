# SPDX-License-Identifier: Apache-2.0
"""How replicas share the work: every whole matrix is orthogonalized by one of them, its owner."""

from collections.abc import Sequence
from typing import override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.messages import all_gather
from emerging_optimizers.adaptive_muon.exchange.mode import Exchange, Mode, Shards, in_order
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.sharding.comparison import Flag
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout


__all__ = ["Replicas"]


class Replicas(Mode):
    """One all-gather for all matrices: each owner sends O and the sums of squares to all.

    Every replica averages its own momentum. V and D come from the owner's sums, so all replicas update with the same bits.
    """

    has_owners = True

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None = None) -> Exchange:
        return _ToReplicas(group, batches, flag)

    @override
    def in_flight(self, layout: ShardedLayout) -> int:
        rows, columns = layout.whole
        return (1 + len(layout.rectangles)) * rows * columns


class _ToReplicas(Exchange):
    """A round of replicas."""

    sends_results = True

    def __init__(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None) -> None:
        self._group, self._batches, self._flag = group, batches, flag
        self._device = batches[0].momentum.device

    @override
    def orthogonalize(self) -> None:
        me = self._group.rank()
        self._outgoing = [
            part
            for batch in self._batches
            if me in batch.members
            for part in batch.returning(*batch.held(batch.members[me]), me)
        ]
        self._batches = [batch.released() for batch in self._batches]

    @override
    def send_results(self) -> None:
        incoming = [
            [part for batch in self._batches if rank in batch.members for part in batch.returned(batch.members[rank])]
            for rank in range(self._group.size())
        ]
        self._results = all_gather(self._outgoing, incoming, self._group, self._device, self._flag)
        del self._outgoing

    @override
    def results(self) -> list[tuple[torch.Tensor, Squares]]:
        return in_order(self._batches, self._results.wait())
