# SPDX-License-Identifier: Apache-2.0
"""What happens to one batch of parameters in a step: the algorithm, in the paper's order and letters.

A letter with an s is a list, of a tensor per parameter or matrix; a letter without is one tensor, of a batch of matrices.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from emerging_optimizers.adaptive_muon.diagnostics.measure import measures_of
from emerging_optimizers.adaptive_muon.diagnostics.store import Measuring
from emerging_optimizers.adaptive_muon.exchange import Orthogonalize, Shards
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.hooks import WeightUpdateHook
from emerging_optimizers.adaptive_muon.moment2 import Moment2
from emerging_optimizers.adaptive_muon.noise import Noise, round_into
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz
from emerging_optimizers.adaptive_muon.parameters import in_work_dtype, work_dtype
from emerging_optimizers.adaptive_muon.passes import apply, average, decay_weights
from emerging_optimizers.adaptive_muon.rounding import Purpose, Rounding
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, as_stored, local_of, wrapped_like
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, MatrixBatch, merge_blocks
from emerging_optimizers.adaptive_muon.state.buffers import SecondMoment
from emerging_optimizers.adaptive_muon.weight_decay import Number, WeightDecay


__all__ = ["BatchUpdate", "StepRule"]

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class StepRule:
    """What a step does with every batch.

    Args:
        moment2: The second-moment method.
        nesterov: Whether the momentum looks ahead.
        weight_decay: The way of weight decay.
        bias_correction: Whether D is corrected for the averages having started at zero.
        rounding: How bfloat16 weights and momenta are rounded, for which steps are counted; None where to nearest.
        steps_on_device: Whether the step count is on the device, where no step may read it.
        shape_factor: Returns s for the rows and columns of a whole matrix.
        functions: Returns the iteration for parameters of a group, or for each parameter a user's function in its place.
        before_update: Called with a parameter and its update, both of which it may change; or None.
        after_update: Called with a parameter that has been updated.
        hook: Called around both, or None.
        measuring: What is measured for diagnostics, or None.
    """

    moment2: Moment2
    nesterov: bool
    weight_decay: WeightDecay
    bias_correction: bool
    rounding: Rounding | None
    steps_on_device: bool
    shape_factor: Callable[[int, int], float]
    functions: Callable[[Sequence[torch.Tensor], dict[str, Any]], NewtonSchulz | Sequence[Function]]
    before_update: Callable[[torch.Tensor, torch.Tensor], None] | None
    after_update: Callable[[torch.Tensor], None]
    hook: WeightUpdateHook | None
    measuring: Measuring | None


class BatchUpdate:
    """Updates a batch of parameters and their state in place, in two phases; matrices are orthogonalized between them.

    Args:
        rule: What a step does.
        group: The options of their parameter group.
        params: The parameters, which differ in nothing but their values.
        gradients: Their gradients; of DTensors what this rank holds.
        states: Their states.
        batches: Their matrices, each of them in one batch.
    """

    def __init__(
        self,
        rule: StepRule,
        group: dict[str, Any],
        params: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        states: Sequence[dict[str, torch.Tensor]],
        batches: Sequence[MatrixBatch],
    ) -> None:
        function = rule.functions(params, group)
        self.params, self.batches, self._rule, self._group, self._states = params, batches, rule, group, states
        self._lr = _rate(group["lr"], params[0].device, on_device=rule.steps_on_device)
        self._Ws = [as_matrices(p) for p in params]
        self._gradients = gradients
        self._scales = [_Scale(rule, group, params, states, batch, function) for batch in batches]

    def begin(self) -> list[Shards]:
        """Average M; return M' of each batch, with the sums of squares that are observed before O."""
        Gs, weight_decay = list(map(as_matrices, self.params, self._gradients)), self._group["weight_decay"]
        if self._rule.weight_decay.share is None and weight_decay:
            Gs = [G.to(work_dtype(W)).add(W, alpha=weight_decay) for G, W in zip(Gs, self._Ws, strict=True)]
        Ms = [as_matrices(p, state["momentum_buffer"]) for p, state in zip(self.params, self._states, strict=True)]
        return [scale.begin(Ms, Gs, self._Ws, self._noise("momentum", scale.batch)) for scale in self._scales]

    def finish(self, results: Sequence[tuple[torch.Tensor, Squares]]) -> None:
        """Average V, and decay and update W.

        Args:
            results: For each batch O, or this rank's shards of it, and the whole matrices' sums of squares and measures.
        """
        rule, lr = self._rule, self._lr
        Ds = [scale.finish(O, sums) for scale, (O, sums) in zip(self._scales, results, strict=True)]
        if rule.bias_correction or rule.rounding is not None:
            torch._foreach_add_([state["step"] for state in self._states], 1)
        if rule.bias_correction:
            self._correct(Ds)
        factors = [rule.shape_factor(*scale.shape) for scale in self._scales]
        Ds = [
            scale.local(D, O, lr, factor)
            for scale, D, (O, _), factor in zip(self._scales, Ds, results, factors, strict=True)
        ]
        decays, cautious = list(map(self._decay, Ds)), rule.weight_decay.cautious
        for D, factor in zip(Ds, factors, strict=True):
            D.mul_(factor)
        Os = [O for O, _ in results]
        if rule.before_update is not None or rule.hook is not None:
            self._apply_one_by_one(Os, Ds, decays)
            return
        if isinstance(lr, torch.Tensor):
            Ds, lr = [D * lr for D in Ds], 1.0
        for batch, O, D, decay in zip(self.batches, Os, Ds, decays, strict=True):
            with batch.in_place(self._Ws) as Ws:
                apply(Ws, O, D, lr=lr, decay=decay, cautious=cautious, noise=self._noise("weight", batch))
        for p in self.params:
            rule.after_update(p)

    def _noise(self, purpose: Purpose, batch: MatrixBatch) -> Noise | None:
        """Return the noise with which a batch is rounded, or None where it is to nearest."""
        rounding = self._rule.rounding
        return None if rounding is None else rounding.noise(purpose, self.params, self._states, batch)

    def _decay(self, D: torch.Tensor) -> Number:
        """Return the share of itself that the weight loses, where D is its adaptive scale."""
        rule, coefficient = self._rule.weight_decay, self._group["weight_decay"]
        if rule.share is None or not coefficient:
            return 0.0
        share = rule.share(self._lr, coefficient)
        if rule.scaled:
            return D * share
        return share * D.new_ones((1,) * D.ndim) if isinstance(share, torch.Tensor) else share

    def _correct(self, Ds: Sequence[torch.Tensor]) -> None:
        """Correct D of each batch in place for the averages having started at zero."""
        momentum, beta2 = self._group["momentum"], self._group["beta2"]
        steps = [state["step"] for state in self._states]
        if self._rule.steps_on_device:  # where a graph's replays count
            for D, batch in zip(Ds, self.batches, strict=True):
                of_members = torch.stack([steps[place] for place in batch.places]).double()
                correction = self._rule.moment2.correction(of_members, momentum=momentum, beta2=beta2)
                D.mul_(correction.view(-1, *[1] * (D.ndim - 1)))
            return
        corrections = [self._rule.moment2.correction(float(step), momentum=momentum, beta2=beta2) for step in steps]
        for D, batch in zip(Ds, self.batches, strict=True):
            torch._foreach_mul_(D.unbind(0), [corrections[place] for place in batch.places])

    def _apply_one_by_one(
        self, Os: Sequence[torch.Tensor], Ds: Sequence[torch.Tensor], decays: Sequence[Number]
    ) -> None:
        """Decay W; then update each W between functions that may change it and its update, in upstream's order."""
        rule = self._rule
        updates: list[dict[Matrix, torch.Tensor]] = [{} for _ in self.params]
        for batch, O, D, decay in zip(self.batches, Os, Ds, decays, strict=True):
            U = D * O
            with batch.in_place(self._Ws) as Ws:
                decay_weights(Ws, decay, U if rule.weight_decay.cautious else None, self._noise("decay", batch))
            for matrix, place, of_matrix in zip(batch.matrices, batch.places, U, strict=True):
                updates[place][matrix] = of_matrix
        for place, (p, W, of_p) in enumerate(zip(self.params, self._Ws, updates, strict=True)):
            U = merge_blocks([*of_p], [*of_p.values()], W.shape)
            update = wrapped_like(p, as_stored(p, U))
            if rule.before_update is not None:
                rule.before_update(p, update)
            with _within(rule.hook, p, update):
                self._subtract(place, self._lr * U, of_p)
                rule.after_update(p)

    def _subtract(self, place: int, update: torch.Tensor, matrices: Iterable[Matrix]) -> None:
        """Subtract an update from the weight of the parameter at a place, in place, and round it."""
        W = self._Ws[place]
        result = in_work_dtype(W) - update
        for matrix in matrices:
            alone = MatrixBatch([matrix], [place], [0])
            noise = self._noise("weight", alone)
            if noise is None:
                W.copy_(result)
                return
            with alone.in_place(self._Ws) as parts:
                round_into(parts, [matrix.of(result)], noise)


def _rate(lr: Number, device: torch.device, *, on_device: bool) -> Number:
    """Return a learning rate as a number where it is one, and as a tensor where a graph's replays read it.

    So a tensor on the CPU gives the result of the same number, and neither its dtype nor its shape has a say. A group may
    have parameters on several devices, and its rate on one of them.
    """
    if not isinstance(lr, torch.Tensor):
        return lr
    if lr.device.type == "cpu":
        return lr.reshape(()) if on_device else float(lr)
    return lr.reshape(()).to(device, non_blocking=True)


@contextmanager
def _within(hook: WeightUpdateHook | None, p: torch.Tensor, update: torch.Tensor) -> Iterator[None]:
    """Call a hook before and after what is done inside: for a parameter, or for each matrix of a stack."""
    pairs = [(p, update)]
    if as_matrices(p).ndim > 2:
        pairs = [*zip(local_of(p).detach().unbind(0), local_of(update).unbind(0), strict=True)]
    states = [] if hook is None else [hook.pre_weight_update_inplace(*pair) for pair in pairs]
    yield
    if hook is not None:
        for (W, _), state in zip(pairs, states, strict=True):
            hook.post_weight_update_inplace(W, state)


class _Scale:
    """V and D of a batch of matrices.

    A V with an entry per element is sharded as W is and needs no sums over other ranks. Every other V is a whole vector, and so
    is D before this rank's part of it is cut out.
    """

    def __init__(
        self,
        rule: StepRule,
        group: dict[str, Any],
        params: Sequence[torch.Tensor],
        states: Sequence[dict[str, torch.Tensor]],
        batch: MatrixBatch,
        function: NewtonSchulz | Sequence[Function],
    ) -> None:
        self.batch = batch
        self.shape = batch.matrices[0].shape(params[batch.places[0]])
        self._moment2, self._eps = rule.moment2, group["eps"]
        self._function: NewtonSchulz | Sequence[Function] = (
            function if isinstance(function, NewtonSchulz) else [function[place] for place in batch.places]
        )
        self._momentum, self._nesterov, self._dtype = group["momentum"], rule.nesterov, work_dtype(params[0])
        self._kept_dims = rule.moment2.kept_dims(*self.shape)
        self._per_element = len(self._kept_dims) == 2
        self._observes_O = "orthogonalized" in rule.moment2.observed
        self._measures = measures_of(
            rule.measuring, params, batch, per_element=self._per_element, observes_O=self._observes_O
        )
        self._V = SecondMoment(params, states, batch, self._kept_dims, group["beta2"])
        self._squares: Squares = []  # of elements, which wait here for those of O
        self._ahead_D: torch.Tensor | None = None  # what has scaled M'
        self._clamped: torch.Tensor | None = None

    def begin(
        self, Ms: Sequence[torch.Tensor], Gs: Sequence[torch.Tensor], Ws: Sequence[torch.Tensor], noise: Noise | None
    ) -> Shards:
        """Average M; return M', scaled where D scales it and is known already, with its partial sums of squares.

        Args:
            Ms: The momentum of each parameter.
            Gs: The gradient of each parameter.
            Ws: The weight of each parameter.
            noise: With which bfloat16 momenta are rounded.
        """
        method, kept, measured = self._moment2, self._kept_dims, self._measures
        observed = [name for name in method.observed if name != "orthogonalized"]
        Gs = self.batch.of(Gs)
        with self.batch.in_place(Ms) as buffers:
            M_prime, squares = average(
                buffers,
                Gs,
                momentum=self._momentum,
                nesterov=self._nesterov,
                kept_dims=kept,
                observed=observed,
                noise=noise,
            )
        measures = []
        if measured is not None:
            known: dict[str, torch.Tensor] = dict(zip(observed, squares, strict=True))
            measures = [measured.begin(Gs, M_prime, self.batch.of(Ws), known)]
        scale, sums_O = None, self._observes_O and not self._per_element
        if self._per_element:
            self._squares, squares = squares, []
        if method.scales_momentum and self._per_element:
            self._ahead_D = self._D(self._V.update(self._statistic(self._squares)), self._squares)
            M_prime = M_prime * self._ahead_D
        elif method.scales_momentum:
            scale = self._ahead
        sums_O = sums_O or (measured is not None and measured.sums_O)
        whole = Orthogonalize(self._function, kept, sums_O, scale, probes=measured is not None and measured.measures)
        return Shards(M_prime, squares, self.batch.layout, self.batch.owners, whole, measures)

    def finish(self, O: torch.Tensor, sums: Squares) -> torch.Tensor:
        """Average V, and return D: a new tensor, whole unless it has an entry per element.

        Args:
            O: This rank's shards of O.
            sums: Sums of squares of the whole matrices; then what is measured, if something is.
        """
        squares, self._sums = sums[: len(self._moment2.observed)], sums
        if self._moment2.scales_momentum:
            if not self._per_element:
                V = self._V.update(self._statistic(squares))
                self._ahead_D = self._D(V, squares) if self._measures is not None else None
            return O.new_ones((*O.shape[:-2], 1, 1), dtype=self._dtype)
        if self._per_element:
            of_O = [O.to(self._dtype).square()] if self._observes_O else []
            squares = [*self._squares, *of_O]
        V = self._V.update(self._statistic(squares))
        if self._measures is not None:
            self._clamped = self._moment2.clamped(V, squares, shape=self.shape, eps=self._eps)
        return self._D(V, squares)

    def local(self, D: torch.Tensor, O: torch.Tensor, lr: Number, factor: float) -> torch.Tensor:
        """Return this rank's part of D, and measure the update lr s D O with the factor s."""
        is_local = self._per_element or self._moment2.scales_momentum
        part = D if is_local else self.batch.layout.cut(D, self._kept_dims)
        if self._measures is not None:
            knows_O = self._measures.sums_O or (self._observes_O and not self._per_element)
            self._measures.finish(
                self._sums[-1],
                O,
                D,
                part,
                scaled=self._ahead_D,
                of_O=self._sums[-2] if knows_O else None,
                clamped=self._clamped,
                factor=lr * factor,
            )
        return part

    def _statistic(self, squares: Squares) -> torch.Tensor:
        return self._moment2.statistic(squares, shape=self.shape)

    def _D(self, V: torch.Tensor, squares: Squares) -> torch.Tensor:
        return self._moment2.scale(V, squares, shape=self.shape, eps=self._eps)

    def _ahead(self, squares: Squares, members: Sequence[int]) -> torch.Tensor:
        """Return D of some members, for whoever has their whole M' to scale; V is updated later."""
        return self._D(self._V.after(self._statistic(squares), members), squares)
