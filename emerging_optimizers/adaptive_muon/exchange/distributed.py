# SPDX-License-Identifier: Apache-2.0
"""The mode "distributed": shards stay where they are, and their Gram matrices are summed."""

from collections.abc import Collection, Sequence
from typing import cast, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.exchange.measures import from_slots, in_slots
from emerging_optimizers.adaptive_muon.exchange.mode import Exchange, Mode, Shards
from emerging_optimizers.adaptive_muon.exchange.whole import Squares, measure_error
from emerging_optimizers.adaptive_muon.moment2 import sum_of_squares
from emerging_optimizers.adaptive_muon.orthogonalize.gram import MIN_NORM, polynomial
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz
from emerging_optimizers.adaptive_muon.orthogonalize.probes import error_of_gram, probes
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric import symmetric_product
from emerging_optimizers.adaptive_muon.sharding.agreement import sum_over
from emerging_optimizers.adaptive_muon.sharding.comparison import Flag
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout, kept_shape


__all__ = ["Distributed"]


class Distributed(Mode):
    """One all-reduce per iteration, one before them, and where O is observed one after them, for all matrices.

    A step of the iteration needs of the other shards their Gram matrices along the dimension that is not split, whose
    sum is the whole matrix's. The first all-reduce carries the norms and the partial sums of squares.
    """

    takes_functions = assembles = False

    @override
    def exchange(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None = None) -> Exchange:
        return _InPlace(group, batches, flag)

    @override
    def in_flight(self, layout: ShardedLayout) -> int:
        gram = layout.whole[-1 if layout.split[-2] else -2] ** 2
        return 2 * gram + layout.largest_shard  # a step works on a copy of the shard

    @override
    def check(self, layout: ShardedLayout, name: str) -> None:
        require(
            not (layout.split[-2] and layout.split[-1]),
            f'with tp_mode="distributed" matrices must be split along one dimension; {name} is along both, in the shards',
            [tuple(each) for each in layout.rectangles],
            'Use tp_mode="layer_sharded".',
        )


class _InPlace(Exchange):
    """A round in the mode "distributed". Its sums depend on each other, and none is on its way during other work."""

    def __init__(self, group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None) -> None:
        self._group, self._batches, self._flag = group, batches, flag

    @override
    def assemble(self) -> None:
        self._squares, self._measures, self._Xs = _normalized(self._group, self._batches, self._flag)
        self._batches = [batch.released() for batch in self._batches]

    @override
    def orthogonalize(self) -> None:
        newton_schulz = cast(NewtonSchulz, self._batches[0].orthogonalize.function)
        *before, last = newton_schulz.coefficients
        for coefficients in before:
            self._Xs = _iterated(self._group, self._batches, self._Xs, newton_schulz, coefficients)
        self._Xs = _iterated(self._group, self._batches, self._Xs, newton_schulz, last, self._measures)

    @override
    def results(self) -> list[tuple[torch.Tensor, Squares]]:
        Xs, self._Xs = self._Xs, []
        Os = [X.to(batch.momentum.dtype).view_as(batch.momentum) for X, batch in zip(Xs, self._batches, strict=True)]
        observing = [i for i, batch in enumerate(self._batches) if batch.orthogonalize.observes_result]
        terms = [_partial(Os[i], self._batches[i], self._batches[i].orthogonalize.kept_dims) for i in observing]
        for i, total in zip(observing, sum_over(self._group, terms), strict=True):
            self._squares[i].append(total)
        sums = [[*both[0], *both[1]] for both in zip(self._squares, self._measures, strict=True)]
        return [*zip(Os, sums, strict=True)]


def _normalized(
    group: ProcessGroup, batches: Sequence[Shards], flag: Flag | None
) -> tuple[list[Squares], list[Squares], list[torch.Tensor]]:
    """Return each batch's whole sums of squares, measures, and shards ``(batch, rows, columns)``, of norm 1 as a whole."""
    terms = []
    for batch in batches:
        # The norm of D M' follows from sums of M' along what D keeps.
        dims = batch.orthogonalize.kept_dims if batch.orthogonalize.scale is not None else ()
        terms.append(_partial(batch.momentum, batch, dims))
        terms += [_placed(squares, batch, batch.orthogonalize.kept_dims) for squares in batch.squares]
        terms += [in_slots(measures, group.rank(), group.size()) for measures in batch.measures]
    if flag is not None:
        terms.append(flag.tensor(terms[0].device))
    sums = sum_over(group, terms)
    if flag is not None:
        flag.arrived([sums.pop()])
    totals = iter(sums)
    squares, measures, Xs = [], [], []
    for batch in batches:
        momentum, of_momentum = batch.momentum, next(totals)
        squares.append([next(totals) for _ in batch.squares])
        measures.append([from_slots(next(totals)) for _ in batch.measures])
        if batch.orthogonalize.scale is not None:
            D = batch.orthogonalize.scale(squares[-1], range(momentum.size(0)))
            momentum = momentum * batch.layout.cut(D, batch.orthogonalize.kept_dims)
            of_momentum = (D.square() * of_momentum).sum((-2, -1), keepdim=True)
        X = (momentum / of_momentum.sqrt().clamp_min(MIN_NORM)).flatten(0, -3)
        Xs.append(X.to(batch.result_dtype))
    return squares, measures, Xs


def _iterated(
    group: ProcessGroup,
    batches: Sequence[Shards],
    Xs: Sequence[torch.Tensor],
    newton_schulz: NewtonSchulz,
    coefficients: tuple[float, float, float],
    measures: Sequence[Squares] = (),
) -> list[torch.Tensor]:
    """Return the shards of each batch after one step of the iteration; enter what is measured of the last."""
    a, b, c = coefficients
    by_rows, grams, results = [batch.sharded.split[-2] for batch in batches], [], []
    probed = [batch.orthogonalize.probes and bool(measures) for batch in batches]
    projected = [
        _projected(X, batch)
        for X, batch, measured in zip(Xs, batches, probed, strict=True)
        if measured and _smaller_is_split(batch)
    ]
    for X, rows_are_split in zip(Xs, by_rows, strict=True):
        n = X.size(-1 if rows_are_split else -2)
        grams.append(X.new_empty(X.size(0), n, n))
        with newton_schulz.products(X.dtype):
            symmetric_product(*(X.mT, X) if rows_are_split else (X, X.mT), out=grams[-1])
    sums = sum_over(group, [*grams, *projected])
    of_probes = iter(sums[len(grams) :])
    for i, (X, A, rows_are_split) in enumerate(zip(Xs, sums[: len(grams)], by_rows, strict=True)):
        with newton_schulz.products(X.dtype):
            F, f = polynomial(A, b, c, out=torch.empty_like(A))
            results.append(torch.baddbmm(X, *(X, F) if rows_are_split else (F, X), beta=a, alpha=f))
            if probed[i]:
                of_X = next(of_probes) if _smaller_is_split(batches[i]) else None
                measure_error(measures[i][0], error_of_gram(A, (F, f, a), of_X))
    return results


def _smaller_is_split(batch: Shards) -> bool:
    """Return whether a Gram matrix, which is along the dimension that is not split, is along the larger one."""
    rows, columns = batch.sharded.whole
    return rows < columns if batch.sharded.split[-2] else columns < rows


def _projected(X: torch.Tensor, batch: Shards) -> torch.Tensor:
    """Return products of shards ``(batch, rows, columns)`` with the probes of the split dimension; their sum is whole."""
    own, (rows, columns) = batch.sharded.own, batch.sharded.whole
    if batch.sharded.split[-2]:
        return X.mT @ probes(rows, X.device, X.dtype)[own.top : own.bottom]
    return X @ probes(columns, X.device, X.dtype)[own.left : own.right]


def _partial(shards: torch.Tensor, batch: Shards, dims: Collection[int]) -> torch.Tensor:
    """Return the sums of squares of these shards, in the shape of the whole matrix's."""
    return _placed(sum_of_squares(shards, dims), batch, dims)


def _placed(squares: torch.Tensor, batch: Shards, dims: Collection[int]) -> torch.Tensor:
    """Return partial sums of squares in the shape of the whole matrix's, zero where other ranks hold the shards."""
    whole = squares.new_zeros((*squares.shape[:-2], *kept_shape(batch.sharded.whole, dims)))
    batch.layout.cut(whole, dims).copy_(squares)
    return whole
