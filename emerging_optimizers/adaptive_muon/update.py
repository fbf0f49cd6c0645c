# SPDX-License-Identifier: Apache-2.0
"""What happens to one batch of parameters in a step: the algorithm, in the paper's order and letters.

A letter with an s is a list, of a tensor per parameter; a letter without is one tensor, of the whole batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emerging_optimizers.adaptive_muon.exchange import Mode, Orthogonalize, Shards
from emerging_optimizers.adaptive_muon.exchange.plan import Round
from emerging_optimizers.adaptive_muon.exchange.whole import Squares
from emerging_optimizers.adaptive_muon.moment2 import Moment2, sum_of_squares
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz
from emerging_optimizers.adaptive_muon.parameters import in_work_dtype, round_into, work_dtype
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, is_transposed, wrapped_like
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, merge_blocks
from emerging_optimizers.adaptive_muon.state.buffers import SecondMoment


__all__ = ["BatchUpdate", "StepRule", "update_round"]

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class StepRule:
    """What a step does with every batch.

    Args:
        moment2: The second-moment method.
        nesterov: Whether the momentum looks ahead.
        decay_method: The weight decay method.
        bias_correction: Whether D is corrected for the averages having started at zero.
        steps_on_device: Whether the step count is on the device, where no step may read it.
        shape_factor: Returns s for the rows and columns of a whole matrix.
        decay: Upstream's weight decay of a weight in place, given gradient, learning rate and coefficient.
        functions: Returns the iteration for parameters of a group, or for each parameter a user's function in its place.
        before_update: Called with a parameter and its update, both of which it may change; or None.
        after_update: Called with a parameter that has been updated.
    """

    moment2: Moment2
    nesterov: bool
    decay_method: str
    bias_correction: bool
    steps_on_device: bool
    shape_factor: Callable[[int, int], float]
    decay: Callable[[torch.Tensor, torch.Tensor, float, float], None]
    functions: Callable[[Sequence[torch.Tensor], dict[str, Any]], NewtonSchulz | Sequence[Function]]
    before_update: Callable[[torch.Tensor, torch.Tensor], None] | None
    after_update: Callable[[torch.Tensor], None]


def update_round(
    one: Round,
    rule: StepRule,
    mode: Mode | None,
    param_groups: Sequence[dict[str, Any]],
    params: Sequence[torch.Tensor],
    gradients: Mapping[torch.Tensor, torch.Tensor],
    states: Mapping[torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    """Update the parameters of a round and their states in place.

    Args:
        one: The round.
        rule: What a step does.
        mode: How matrices in shards are orthogonalized.
        param_groups: The optimizer's parameter groups.
        params: The parameters of the plan, by their places in it.
        gradients: Their gradients; of DTensors what this rank holds.
        states: Their states.
    """
    updates = []
    for batch in one.batches:
        members, group = [params[i] for i in batch.members], param_groups[batch.group]
        Gs, of_members = [gradients[p] for p in members], [states[p] for p in members]
        updates.append(BatchUpdate(rule, group, members, Gs, of_members, batch.matrices, batch.owners))
    shards = [matrix for update in updates for matrix in update.begin()]
    if one.process_group is None:
        results = [matrix.orthogonalized() for matrix in shards]
    else:
        assert mode is not None  # "blockwise" has no matrix in shards
        results = mode.exchange(one.process_group, shards)
    of_updates = iter(results)
    for update in updates:
        update.finish([next(of_updates) for _ in update.matrices])


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
        self._locals = [as_matrices(p) for p in params]
        self._Ws = [in_work_dtype(local) for local in self._locals]
        self._gradients = gradients
        self._scales = [
            _Scale(rule.moment2, group, params, states, matrix, of_matrix, function)
            for matrix, of_matrix in zip(matrices, owners, strict=True)
        ]

    def begin(self) -> list[Shards]:
        """Decay W and average M; return M' of each matrix, with the sums of squares that are observed before O."""
        momentum, method = self._group["momentum"], self._rule.decay_method
        Gs = [as_matrices(p, G).to(work_dtype(p)) for p, G in zip(self.params, self._gradients, strict=True)]
        if method == "l2":
            Gs = [G.clone() for G in Gs]  # the decay is added in place, and the user's gradient stays as it is
        if method != "adaptive":
            self._decay(Gs)
        Ms = [as_matrices(p, state["momentum_buffer"]) for p, state in zip(self.params, self._states, strict=True)]
        torch._foreach_lerp_(Ms, Gs, 1 - momentum)
        G, M = as_batch(Gs), as_batch(Ms)
        M_prime = G.lerp(M, momentum) if self._rule.nesterov else M
        return [scale.begin(scale.matrix.of(G), scale.matrix.of(M_prime)) for scale in self._scales]

    def finish(self, results: Sequence[tuple[torch.Tensor, Squares]]) -> None:
        """Average V, and update W.

        Args:
            results: For each matrix O, or this rank's shard of it, and the whole matrix's sums of squares.
        """
        lr, weight_decay, rule = self._group["lr"], self._group["weight_decay"], self._rule
        parts = [scale.finish(O, squares) for scale, (O, squares) in zip(self._scales, results, strict=True)]
        if rule.bias_correction:
            self._correct(parts)
        if rule.decay_method == "adaptive" and weight_decay:
            decay = self._merged(parts) * (lr * weight_decay)
            torch._foreach_addcmul_(self._Ws, self._Ws, decay.unbind(0), value=-1)
        for part, scale in zip(parts, self._scales, strict=True):
            part.mul_(rule.shape_factor(*scale.shape))
        D, O = self._merged(parts), self._merged([O for O, _ in results])
        if rule.before_update is not None:
            D, O = torch.ones_like(D), D * O
            self._Ws = [self._hooked(*each) for each in zip(self.params, self._locals, self._Ws, O, strict=True)]
        if isinstance(lr, torch.Tensor):
            D, lr = D * lr, 1.0
        torch._foreach_addcmul_(self._Ws, O.unbind(0), D.unbind(0), value=-lr)
        for p, local, W in zip(self.params, self._locals, self._Ws, strict=True):
            round_into(local, W)
            rule.after_update(p)

    def _decay(self, Gs: list[torch.Tensor]) -> None:
        """Apply a weight decay of upstream's in place: to the weights, or the gradients' copies."""
        lr, decay, method = self._group["lr"], self._group["weight_decay"], self._rule.decay_method
        if isinstance(lr, torch.Tensor):  # upstream's would have to know its value
            factors = {"decoupled": lr * decay, "palm": lr * lr * decay}
            if method in factors and decay:
                torch._foreach_addcmul_(self._Ws, self._Ws, [factors[method]] * len(self._Ws), value=-1)
                return
            lr = math.nan  # does not matter to the others
        for W, G in zip(self._Ws, Gs, strict=True):
            self._rule.decay(W, G, lr, decay)

    def _correct(self, Ds: Sequence[torch.Tensor]) -> None:
        """Count the step, and correct D of each matrix in place for the averages having started at zero."""
        momentum, beta2 = self._group["momentum"], self._group["beta2"]
        steps = [state["step"] for state in self._states]
        torch._foreach_add_(steps, 1)
        # on the host; with capturable, where the graph's replays count, on the device
        known = torch.stack(steps).double() if self._rule.steps_on_device else map(float, steps)
        corrections = [self._rule.moment2.correction(step, momentum=momentum, beta2=beta2) for step in known]
        for D in Ds:
            torch._foreach_mul_(D.unbind(0), corrections)

    def _merged(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return what there is for each matrix as one tensor of the batch."""
        return merge_blocks(self.matrices, parts, (len(self._Ws), *self._Ws[0].shape))

    def _hooked(self, p: torch.Tensor, local: torch.Tensor, W: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Call the function that may change the update and the weight, and return the weight to work on."""
        assert self._rule.before_update is not None
        round_into(local, W)  # it sees the decayed weight,
        self._rule.before_update(p, wrapped_like(p, U.mT if is_transposed(p) else U))
        # and may change it
        return W if W is local or torch.equal(W.to(local.dtype), local) else in_work_dtype(local)


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
        self._kept_dims = moment2.kept_dims(*self.shape)
        self._per_element = len(self._kept_dims) == 2
        self._V = SecondMoment(params, states, matrix, self._kept_dims, group["beta2"])
        self._squares: Squares = []  # of elements, which wait here for those of O

    def begin(self, G: torch.Tensor, M_prime: torch.Tensor) -> Shards:
        """Return M', scaled where D scales it and is known already, with its partial sums of squares."""
        method, kept = self._moment2, self._kept_dims
        seen = {"gradient": G, "momentum": M_prime}
        squares = [sum_of_squares(seen[name], kept) for name in method.observed if name in seen]
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
            return O.new_ones((*O.shape[:-2], 1, 1))
        if self._per_element:
            squares = [*self._squares, *([O.square()] if "orthogonalized" in self._moment2.observed else [])]
        D = self._D(self._V.update(self._statistic(squares)), squares)
        return D if self._per_element else self.matrix.layout.cut(D, self._kept_dims)

    def _statistic(self, squares: Squares) -> torch.Tensor:
        return self._moment2.statistic(squares, shape=self.shape)

    def _D(self, V: torch.Tensor, squares: Squares) -> torch.Tensor:
        return self._moment2.scale(V, squares, shape=self.shape, eps=self._eps)

    def _ahead(self, squares: Squares, members: Sequence[int]) -> torch.Tensor:
        """D of some members, for whoever has their whole M' to scale; V is updated later."""
        return self._D(self._V.after(self._statistic(squares), members), squares)
