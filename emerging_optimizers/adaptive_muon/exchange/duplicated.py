# SPDX-License-Identifier: Apache-2.0
"""The mode "duplicated": every rank gathers every matrix and orthogonalizes it."""

from collections.abc import Sequence
from itertools import islice
from typing import override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.messages import all_gather
from emerging_optimizers.adaptive_muon.exchange.mode import Mode, Shards
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout


__all__ = ["Duplicated"]


class Duplicated(Mode):
    """One all-gather for all matrices: shards of M' with their partial sums of squares."""

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards]) -> list[tuple[torch.Tensor, Squares]]:
        everyone = [range(batch.momentum.size(0)) for batch in batches]
        outgoing = [part for batch, members in zip(batches, everyone, strict=True) for part in batch.outgoing(members)]
        incoming = [
            [part for batch, members in zip(batches, everyone, strict=True) for part in batch.incoming(members, rank)]
            for rank in range(group.size())
        ]
        arrived = [iter(parts) for parts in all_gather(outgoing, incoming, group, batches[0].momentum.device)]
        results = []
        for batch, members in zip(batches, everyone, strict=True):
            number = 1 + len(batch.squares)
            O, squares = batch.whole(members, [[*islice(parts, number)] for parts in arrived])
            results.append((batch.layout.cut(O), squares))
        return results

    @override
    def in_flight(self, layout: ShardedLayout) -> int:
        return (1 + len(layout.rectangles)) * layout.largest_shard  # an all-gather takes the same size from every rank
