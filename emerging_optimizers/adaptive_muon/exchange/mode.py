# SPDX-License-Identifier: Apache-2.0
"""How matrices in shards are orthogonalized: what the ``tp_mode`` is a name of."""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import ClassVar, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.measures import NUMBER, combined
from emerging_optimizers.adaptive_muon.exchange.messages import Part
from emerging_optimizers.adaptive_muon.exchange.whole import Orthogonalize, Squares, Whole, orthogonalize_together
from emerging_optimizers.adaptive_muon.orthogonalize.batches import batch_size
from emerging_optimizers.adaptive_muon.sharding.comparison import Flag
from emerging_optimizers.adaptive_muon.sharding.layout import Layout, ShardedLayout, kept_shape


__all__ = ["Exchange", "LocalExchange", "Mode", "Shards", "in_order", "in_turn"]

_MOMENTUM = torch.float32  # the orthogonalization's own precision


@dataclass(frozen=True, eq=False)
class Shards:
    """This rank's shards of one matrix of every parameter in a batch; whole matrices where the layout is."""

    momentum: torch.Tensor  # M', shape (batch, ..., rows, columns)
    squares: Squares  # partial sums, of these shards
    layout: Layout
    owners: Sequence[int]  # for each member of the batch, in order, the rank that orthogonalizes it in "layer_sharded"
    orthogonalize: Orthogonalize  # of whole matrices of the batch
    # Of these shards, in a list of one; empty where nothing is measured.
    measures: Squares = field(default_factory=list)

    @property
    def sharded(self) -> ShardedLayout:
        """The layout of matrices that are held in shards."""
        assert isinstance(self.layout, ShardedLayout)
        return self.layout

    @cached_property
    def members(self) -> dict[int, range]:
        """For each owner, its members of the batch, which are adjacent: a message takes a view of them."""
        owners = self.owners
        return {owner: range(bisect_left(owners, owner), bisect_right(owners, owner)) for owner in set(owners)}

    @property
    def result_dtype(self) -> torch.dtype:
        """The dtype in which O is exact, and in which it is sent."""
        return self.orthogonalize.dtype(self.momentum.device, self.sharded.whole)

    @property
    def number_returned(self) -> int:
        """How many parts an owner sends back, see :meth:`returned`."""
        return self.number_sent + self.orthogonalize.observes_result

    @property
    def number_sent(self) -> int:
        """How many parts an owner gets from a rank, see :meth:`outgoing`."""
        return 1 + len(self.squares) + len(self.measures)

    def outgoing(self, members: range) -> list[tuple[torch.Tensor, torch.dtype]]:
        """Return what this rank sends to an owner: its shards of these members, and their partial sums."""
        sums = (*self.squares, *self.measures)
        parts = [(self.momentum, _MOMENTUM), *((partial, partial.dtype) for partial in sums)]
        return [(part[members.start : members.stop], dtype) for part, dtype in parts]

    def incoming(self, members: range, rank: int) -> list[Part]:
        """Return the parts that a rank sends of these members, by its :meth:`outgoing`."""
        rectangle = self.sharded.rectangles[rank]
        sums = Part(self._sums_shape(members, rectangle.shape), self.momentum.dtype)
        shards = Part(self._shape(members, rectangle.shape), _MOMENTUM)
        return [shards, *([sums] * len(self.squares)), *self._measures(members)]

    def held(self, members: range) -> tuple[torch.Tensor, Squares]:
        """Return O of these members, which this rank holds whole, and their sums of squares."""
        own = slice(members.start, members.stop)
        squares, measures = ([each[own] for each in sums] for sums in (self.squares, self.measures))
        return self.orthogonalize(self.momentum[own], squares, measures, members, self.momentum.dtype)

    def released(self) -> "Shards":
        """Return these shards without the values of M', of which the memory can be used again."""
        return replace(self, momentum=self.momentum.new_empty(()).expand(self.momentum.shape))

    def whole(self, members: range, arrived: Sequence[Sequence[torch.Tensor]]) -> Whole:
        """Return M' of whole matrices and their sums of squares, with what else :class:`Orthogonalize` takes.

        Args:
            members: The members of the batch.
            arrived: What each rank of this replica sent. Partial sums are added in the order of the ranks, whoever adds.
        """
        like, whole = self.momentum, self.sharded.whole
        momentum = like.new_empty(self._shape(members, whole), dtype=_MOMENTUM)
        totals = [like.new_zeros(self._sums_shape(members, whole)) for _ in self.squares]
        rectangles = [self.sharded.rectangles[rank] for rank in self.sharded.peers]
        sent = [both for both in zip(rectangles, arrived, strict=True) if both[0].area]
        torch._foreach_copy_([rectangle.cut(momentum) for rectangle, _ in sent], [parts[0] for _, parts in sent])
        end = 1 + len(totals)
        for rectangle, parts in sent:
            for total, squares in zip(totals, parts[1:end], strict=True):
                rectangle.cut(total, self.orthogonalize.kept_dims).add_(squares)
        measures = [combined([parts[end] for _, parts in sent])] if self.measures else []
        return momentum, totals, measures, members, like.dtype

    def returning(self, O: torch.Tensor, squares: Squares, rank: int) -> list[tuple[torch.Tensor, torch.dtype]]:
        """Return what an owner sends to a rank: its shards of O, and the whole sums of squares."""
        shards = self.sharded.rectangles[rank].cut(O)
        return [(shards, self.result_dtype), *((total, total.dtype) for total in squares)]

    def returned(self, members: range) -> list[Part]:
        """Return the parts that the owner of these members sends back, by its :meth:`returning`."""
        sums = Part(self._sums_shape(members, self.sharded.whole), self.momentum.dtype)
        shards = Part(self._shape(members, self.sharded.own.shape), self.result_dtype)
        squares = [sums] * (len(self.squares) + self.orthogonalize.observes_result)
        return [shards, *squares, *self._measures(members)]

    def in_order(self, results: Mapping[int, Sequence[torch.Tensor]]) -> tuple[torch.Tensor, Squares]:
        """Return O and the sums of squares of the batch.

        Args:
            results: For each owner, what it sent: :meth:`returning`.
        """
        size = len(self.owners)
        merged = [part.new_empty((size, *part.shape[1:])) for part in next(iter(results.values()))]
        for owner, parts in results.items():
            members = self.members[owner]
            for whole, part in zip(merged, parts, strict=True):
                whole[members.start : members.stop] = part
        return merged[0], merged[1:]

    def _shape(self, members: range, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of members' matrices, or shards, that have this shape."""
        return (len(members), *self.momentum.shape[1:-2], *shape)

    def _measures(self, members: range) -> list[Part]:
        """Return the part with their measures, if there are any."""
        return [Part(self._shape(members, (1, NUMBER)), measures.dtype) for measures in self.measures]

    def _sums_shape(self, members: range, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of their sums of squares."""
        return self._shape(members, kept_shape(shape, self.orthogonalize.kept_dims))


class Exchange(ABC):
    """A round in its mode: its messages, and the work between them. Its phases are called in their order, each once.

    It is made when the sums of squares are, and may send shards then. On all ranks of the group it has the same batches.
    """

    # Whether shards are sent when it is made: those of the next round then leave before this one is orthogonalized.
    sends_shards: ClassVar[bool] = False
    # Whether results are sent: they arrive while the next round is orthogonalized.
    sends_results: ClassVar[bool] = False

    def assemble(self) -> None:
        """Wait for shards, and put them together."""
        return

    @abstractmethod
    def orthogonalize(self) -> None:
        """Orthogonalize what this rank is to orthogonalize."""

    def send_results(self) -> None:
        """Send O, and the sums of squares of the whole matrices, to the ranks that have none."""
        return

    def relay(self) -> None:
        """Send on what has arrived of the results to ranks that have none yet."""
        return

    @abstractmethod
    def results(self) -> list[tuple[torch.Tensor, Squares]]:
        """Return this rank's shards of O, and the sums of squares of the whole matrices, for every batch."""


class LocalExchange(Exchange):
    """Whole matrices, which need no messages."""

    def __init__(self, batches: Sequence[Shards]) -> None:
        self._batches = batches
        self._results: list[tuple[torch.Tensor, Squares]] = []

    @override
    def orthogonalize(self) -> None:
        self._results = [batch.held(range(batch.momentum.size(0))) for batch in self._batches]

    @override
    def results(self) -> list[tuple[torch.Tensor, Squares]]:
        return self._results


class Mode(ABC):
    """A way to orthogonalize matrices of which the ranks of a group hold shards."""

    # Whether it calls a user's function in the place of the iteration.
    takes_functions: ClassVar[bool] = True
    # Whether a matrix has an owner, which alone orthogonalizes it. Otherwise all ranks do.
    has_owners: ClassVar[bool] = False
    # Whether O is whole on some rank.
    assembles: ClassVar[bool] = True

    @abstractmethod
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None = None) -> Exchange:
        """Return the exchange of a round, whose first message is on its way if it carries shards.

        Args:
            group: The process group, all of whose ranks call with the same batches.
            batches: The batches, at least one.
            flag: What the first message carries to all ranks beside.
        """

    @abstractmethod
    def in_flight(self, layout: ShardedLayout) -> int:
        """Return how many elements of a matrix a rank sends, receives, and copies to work on, at most.

        Where a matrix has an owner: what the owner sends and receives if every other rank owns such a matrix too.
        """

    def check(self, layout: ShardedLayout, name: str) -> None:
        """Raise a ``ValueError`` if a matrix cannot be orthogonalized in this mode."""
        return


def in_turn(batches: Sequence[Shards], whole: list[Whole]) -> list[tuple[torch.Tensor, Squares]]:
    """Return O of whole matrices, and the sums of squares, for every batch; what is in the list is released on the way.

    Successive batches of one shape, such as heads that other ranks hold, are iterated on together as far as they make one
    batch.
    """
    results: list[tuple[torch.Tensor, Squares]] = []
    while len(results) < len(batches):
        start = end = len(results)
        shape, size = whole[0][0].shape[1:], 0
        most = batch_size(shape, whole[0][0].device)
        for batch, (momentum, *_) in zip(batches[start:], whole, strict=True):
            size += len(momentum)
            if end > start and (
                size > most
                or momentum.shape[1:] != shape
                or not batch.orthogonalize.goes_with(batches[start].orthogonalize)
            ):
                break
            end += 1
        together, whole[: end - start] = whole[: end - start], []
        results += orthogonalize_together([batch.orthogonalize for batch in batches[start:end]], together)
    return results


def in_order(
    batches: Sequence[Shards], returned: Sequence[Sequence[torch.Tensor]]
) -> list[tuple[torch.Tensor, Squares]]:
    """Return O and the sums of squares of every batch, of what each owner sent back for its members of all batches."""
    parts = [iter(from_owner) for from_owner in returned]
    return [
        batch.in_order({owner: [*islice(parts[owner], batch.number_returned)] for owner in batch.members})
        for batch in batches
    ]
