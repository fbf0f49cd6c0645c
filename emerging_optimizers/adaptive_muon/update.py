# SPDX-License-Identifier: Apache-2.0
"""What happens to one batch of parameters in a step: the algorithm, in the paper's order and letters.

A letter with an s is a list, of a tensor per parameter; a letter without is one tensor, of the whole batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from emerging_optimizers.adaptive_muon.exchange import Orthogonalize, Shards
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.hooks import WeightUpdateHook
from emerging_optimizers.adaptive_muon.moment2 import Moment2
from emerging_optimizers.adaptive_muon.noise import Noise, round_into
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz
from emerging_optimizers.adaptive_muon.parameters import in_work_dtype, work_dtype
from emerging_optimizers.adaptive_muon.passes import apply, average, decay_weights
from emerging_optimizers.adaptive_muon.rounding import Purpose, Rounding
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, is_transposed, local_of, wrapped_like
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, merge_blocks
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


class BatchUpdate:
    """Updates a batch of parameters and their state in place, in two phases; matrices are orthogonalized between them.

    Args:
        rule: What a step does.
        group: The options of their parameter group.
        params: The parameters, which differ in nothing but their values.
        gradients: Their gradients; of DTensors what this rank holds.
        states: Their states.
        matrices: The logical matrices of the first parameter; the others' have the same shapes and shards.
        owners: For each of these, and each parameter, its owner: the rank that orthogonalizes it in "layer_sharded".
    """

    def __init__(
        self,
        rule: StepRule,
        group: dict[str, Any],
        params: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        states: Sequence[dict[str, torch.Tensor]],
        matrices: Sequence[Matrix],
        owners: Sequence[Sequence[int]],
    ) -> None:
        function = rule.functions(params, group)
        self.params, self.matrices, self._rule, self._group, self._states = params, matrices, rule, group, states
        self._Ws = [as_matrices(p) for p in params]
        self._gradients = gradients
        self._scales = [
            _Scale(rule.moment2, group, params, states, matrix, of_matrix, function)
            for matrix, of_matrix in zip(matrices, owners, strict=True)
        ]

    def begin(self) -> list[Shards]:
        """Average M; return M' of each matrix, with the sums of squares that are observed before O."""
        Gs, weight_decay = list(map(as_matrices, self.params, self._gradients)), self._group["weight_decay"]
        if self._rule.weight_decay.share is None and weight_decay:
            Gs = [G.to(work_dtype(W)).add(W, alpha=weight_decay) for G, W in zip(Gs, self._Ws, strict=True)]
        Ms = [as_matrices(p, state["momentum_buffer"]) for p, state in zip(self.params, self._states, strict=True)]
        return [
            scale.begin(Ms, Gs, self._rule.nesterov, self._noise("momentum", scale.matrix)) for scale in self._scales
        ]

    def finish(self, results: Sequence[tuple[torch.Tensor, Squares]]) -> None:
        """Average V, and decay and update W.

        Args:
            results: For each matrix O, or this rank's shard of it, and the whole matrix's sums of squares.
        """
        rule, lr = self._rule, self._group["lr"]
        Ds = [scale.finish(O, squares) for scale, (O, squares) in zip(self._scales, results, strict=True)]
        if rule.bias_correction or rule.rounding is not None:
            torch._foreach_add_([state["step"] for state in self._states], 1)
        if rule.bias_correction:
            self._correct(Ds)
        decays, cautious = list(map(self._decay, Ds)), rule.weight_decay.cautious
        for D, scale in zip(Ds, self._scales, strict=True):
            D.mul_(rule.shape_factor(*scale.shape))
        Os = [O for O, _ in results]
        if rule.before_update is not None or rule.hook is not None:
            self._apply_one_by_one(Os, Ds, decays)
            return
        if isinstance(lr, torch.Tensor):
            Ds, lr = [D * lr for D in Ds], 1.0
        for matrix, O, D, decay in zip(self.matrices, Os, Ds, decays, strict=True):
            with matrix.in_place(self._Ws) as Ws:
                apply(Ws, O, D, lr=lr, decay=decay, cautious=cautious, noise=self._noise("weight", matrix))
        for p in self.params:
            rule.after_update(p)

    def _noise(self, purpose: Purpose, matrix: Matrix, members: slice = slice(None)) -> Noise | None:
        """Return the noise with which a matrix of some parameters is rounded, or None where it is to nearest."""
        rounding, params, states = self._rule.rounding, self.params[members], self._states[members]
        return None if rounding is None else rounding.noise(purpose, params, states, matrix)

    def _decay(self, D: torch.Tensor) -> Number:
        """Return the share of itself that the weight loses, where D is its adaptive scale."""
        rule, coefficient = self._rule.weight_decay, self._group["weight_decay"]
        if rule.share is None or not coefficient:
            return 0.0
        share = rule.share(self._group["lr"], coefficient)
        if rule.scaled:
            return D * share
        return share * D.new_ones((1,) * D.ndim) if isinstance(share, torch.Tensor) else share

    def _correct(self, Ds: Sequence[torch.Tensor]) -> None:
        """Correct D of each matrix in place for the averages having started at zero."""
        momentum, beta2 = self._group["momentum"], self._group["beta2"]
        steps = [state["step"] for state in self._states]
        if self._rule.steps_on_device:  # where a graph's replays count
            correction = self._rule.moment2.correction(torch.stack(steps).double(), momentum=momentum, beta2=beta2)
            for D in Ds:
                D.mul_(correction.view(-1, *[1] * (D.ndim - 1)))
            return
        corrections = [self._rule.moment2.correction(float(step), momentum=momentum, beta2=beta2) for step in steps]
        for D in Ds:
            torch._foreach_mul_(D.unbind(0), corrections)

    def _apply_one_by_one(
        self, Os: Sequence[torch.Tensor], Ds: Sequence[torch.Tensor], decays: Sequence[Number]
    ) -> None:
        """Decay W; then update each W between functions that may change it and its update, in upstream's order."""
        rule = self._rule
        updates = [D * O for D, O in zip(Ds, Os, strict=True)]
        for matrix, decay, U in zip(self.matrices, decays, updates, strict=True):
            with matrix.in_place(self._Ws) as Ws:
                decay_weights(Ws, decay, U if rule.weight_decay.cautious else None, self._noise("decay", matrix))
        merged = merge_blocks(self.matrices, updates, (len(self._Ws), *self._Ws[0].shape))
        for index, (p, W, U) in enumerate(zip(self.params, self._Ws, merged, strict=True)):
            update = wrapped_like(p, U.mT if is_transposed(p) else U)
            if rule.before_update is not None:
                rule.before_update(p, update)
            with _within(rule.hook, p, update):
                self._subtract(W, self._group["lr"] * U, index)
                rule.after_update(p)

    def _subtract(self, W: torch.Tensor, update: torch.Tensor, index: int) -> None:
        """Subtract an update from a parameter's weight in place, and round it."""
        result = in_work_dtype(W) - update
        for matrix in self.matrices:
            noise = self._noise("weight", matrix, slice(index, index + 1))
            if noise is None:
                W.copy_(result)
                return
            with matrix.in_place([W]) as parts:
                round_into(parts, [matrix.of(result)], noise)


@contextmanager
def _within(hook: WeightUpdateHook | None, p: torch.Tensor, update: torch.Tensor) -> Iterator[None]:
    """Call a hook before and after what is done inside: for a parameter, or for each matrix of a stack."""
    pairs = [(p, update)]
    if p.ndim > 2:
        pairs = [*zip(local_of(p).detach().unbind(0), local_of(update).unbind(0), strict=True)]
    states = [] if hook is None else [hook.pre_weight_update_inplace(*pair) for pair in pairs]
    yield
    if hook is not None:
        for (W, _), state in zip(pairs, states, strict=True):
            hook.post_weight_update_inplace(W, state)


class _Scale:
    """V and D of one matrix of every parameter in a batch.

    A V with an entry per element is sharded as W is and needs no sums over other ranks. Every other V is a whole vector, and so
    is D before this rank's part of it is cut out.
    """

    def __init__(
        self,
        moment2: Moment2,
        group: dict[str, Any],
        params: Sequence[torch.Tensor],
        states: Sequence[dict[str, torch.Tensor]],
        matrix: Matrix,
        owners: Sequence[int],
        function: NewtonSchulz | Sequence[Function],
    ) -> None:
        self.matrix = matrix
        self.shape = matrix.shape(params[0])
        self._moment2, self._eps, self._owners, self._function = moment2, group["eps"], owners, function
        self._momentum, self._dtype = group["momentum"], work_dtype(params[0])
        self._kept_dims = moment2.kept_dims(*self.shape)
        self._per_element = len(self._kept_dims) == 2
        self._V = SecondMoment(params, states, matrix, self._kept_dims, group["beta2"])
        self._squares: Squares = []  # of elements, which wait here for those of O

    def begin(
        self, Ms: Sequence[torch.Tensor], Gs: Sequence[torch.Tensor], nesterov: bool, noise: Noise | None
    ) -> Shards:
        """Average M; return M', scaled where D scales it and is known already, with its partial sums of squares.

        Args:
            Ms: The momentum of each parameter.
            Gs: The gradient of each parameter.
            nesterov: Whether the momentum looks ahead.
            noise: With which bfloat16 momenta are rounded.
        """
        method, kept = self._moment2, self._kept_dims
        observed = [name for name in method.observed if name != "orthogonalized"]
        with self.matrix.in_place(Ms) as buffers:
            M_prime, squares = average(
                buffers,
                list(map(self.matrix.of, Gs)),
                momentum=self._momentum,
                nesterov=nesterov,
                kept_dims=kept,
                observed=observed,
                noise=noise,
            )
        scale, observes_result = None, "orthogonalized" in method.observed and not self._per_element
        if self._per_element:
            self._squares, squares = squares, []
        if method.scales_momentum and self._per_element:
            M_prime = M_prime * self._D(self._V.update(self._statistic(self._squares)), self._squares)
        elif method.scales_momentum:
            scale = self._ahead
        whole = Orthogonalize(self._function, kept, observes_result, scale)
        return Shards(M_prime, squares, self.matrix.layout, self._owners, whole)

    def finish(self, O: torch.Tensor, squares: Squares) -> torch.Tensor:
        """Average V, and return D, broadcastable to O: a new tensor."""
        if self._moment2.scales_momentum:
            if not self._per_element:
                self._V.update(self._statistic(squares))
            return O.new_ones((*O.shape[:-2], 1, 1), dtype=self._dtype)
        if self._per_element:
            of_O = [O.to(self._dtype).square()] if "orthogonalized" in self._moment2.observed else []
            squares = [*self._squares, *of_O]
        D = self._D(self._V.update(self._statistic(squares)), squares)
        return D if self._per_element else self.matrix.layout.cut(D, self._kept_dims)

    def _statistic(self, squares: Squares) -> torch.Tensor:
        return self._moment2.statistic(squares, shape=self.shape)

    def _D(self, V: torch.Tensor, squares: Squares) -> torch.Tensor:
        return self._moment2.scale(V, squares, shape=self.shape, eps=self._eps)

    def _ahead(self, squares: Squares, members: Sequence[int]) -> torch.Tensor:
        """D of some members, for whoever has their whole M' to scale; V is updated later."""
        return self._D(self._V.after(self._statistic(squares), members), squares)
