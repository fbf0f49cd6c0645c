# SPDX-License-Identifier: Apache-2.0
"""The mode "duplicated": every rank gathers every matrix and orthogonalizes it."""

from collections.abc import Sequence
from itertools import islice
from typing import override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.messages import all_gather
from emerging_optimizers.adaptive_muon.exchange.mode import Exchange, Mode, Shards, in_turn
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.sharding.comparison import Flag
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout


__all__ = ["Duplicated"]


class Duplicated(Mode):
    """One all-gather for all matrices: shards of M' with their partial sums of squares."""

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None = None) -> Exchange:
        return _ToAll(group, batches, flag)

    @override
    def in_flight(self, layout: ShardedLayout) -> int:
        return (1 + len(layout.rectangles)) * layout.largest_shard  # an all-gather takes the same size from every rank


class _ToAll(Exchange):
    """A round in the mode "duplicated"."""

    sends_shards = True

    def __init__(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None) -> None:
        self._everyone = [range(batch.momentum.size(0)) for batch in batches]
        members = [*zip(batches, self._everyone, strict=True)]
        outgoing = [part for batch, everyone in members for part in batch.outgoing(everyone)]
        incoming = [
            [part for batch, everyone in members for part in batch.incoming(everyone, rank)]
            for rank in range(group.size())
        ]
        self._shards = all_gather(outgoing, incoming, group, batches[0].momentum.device, flag)
        self._batches = [batch.released() for batch in batches]

    @override
    def assemble(self) -> None:
        arrived = [iter(parts) for parts in self._shards.wait()]
        self._whole = [
            batch.whole(everyone, [[*islice(parts, batch.number_sent)] for parts in arrived])
            for batch, everyone in zip(self._batches, self._everyone, strict=True)
        ]

    @override
    def orthogonalize(self) -> None:
        self._orthogonalized = in_turn(self._batches, self._whole)

    @override
    def results(self) -> list[tuple[torch.Tensor, Squares]]:
        both = zip(self._batches, self._orthogonalized, strict=True)
        return [(batch.layout.cut(O), squares) for batch, (O, squares) in both]
