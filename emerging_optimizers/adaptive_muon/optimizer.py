# SPDX-License-Identifier: Apache-2.0
"""The optimizer of matrices: momentum, orthogonalization, adaptive scale, update."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, SupportsIndex, Unpack, overload, override

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon.checks import require, require_picklable
from emerging_optimizers.adaptive_muon.diagnostics.face import Diagnosed
from emerging_optimizers.adaptive_muon.diagnostics.store import make_store
from emerging_optimizers.adaptive_muon.exchange import make_mode
from emerging_optimizers.adaptive_muon.exchange.plan import Round
from emerging_optimizers.adaptive_muon.modes import check_capture, loss_of, plain_modes
from emerging_optimizers.adaptive_muon.options import Options, OptionsDict, check_group, shows_options
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz, at_precision
from emerging_optimizers.adaptive_muon.parameters import check_distinct, check_gradients, check_matrices
from emerging_optimizers.adaptive_muon.pipeline import RoundUpdate, knock, pipelined
from emerging_optimizers.adaptive_muon.planner import Planner
from emerging_optimizers.adaptive_muon.rounding import check_rounding, make_rounding
from emerging_optimizers.adaptive_muon.sharding.comparison import Flag
from emerging_optimizers.adaptive_muon.sharding.dtensor import gradient_of
from emerging_optimizers.adaptive_muon.sharding.rules import Rules
from emerging_optimizers.adaptive_muon.sharding.sharding import Sharding
from emerging_optimizers.adaptive_muon.state import checkpoint
from emerging_optimizers.adaptive_muon.state.buffers import StateFormat, count_empty
from emerging_optimizers.adaptive_muon.update import StepRule
from emerging_optimizers.adaptive_muon.weight_decay import WEIGHT_DECAYS
from emerging_optimizers.orthogonalized_optimizers import adaptive_muon as upstream
from emerging_optimizers.orthogonalized_optimizers.muon import get_muon_scale_factor


__all__ = ["AdaptiveMuon"]


@shows_options
class AdaptiveMuon(Diagnosed, upstream.AdaptiveMuon):
    """Muon with an adaptive second moment: AdaMuon, NorMuon, NAMO or NAMO-D, by one switch.

    All four methods are one formula,

    .. math:: W \\leftarrow W - \\eta \\, s \\, (D \\odot O)

    with O the orthogonalized momentum, s Muon's factor for the shape of W times ``extra_scale_factor``, and D the
    adaptive scale that ``moment2_method`` names:

    - "adamuon" (arXiv:2507.11005): elementwise, :math:`D = 1 / (\\sqrt{V} + \\varepsilon)` with V the moving average
      of :math:`O \\odot O`.
    - "normuon" (arXiv:2510.05491): for each row, or each column of a wide matrix, by the moving average of its mean
      square; the norm of O is kept.
    - "namo" (arXiv:2602.17080): one number, :math:`\\|M'\\|_F / (\\sqrt{V} + \\varepsilon)` with V the moving average
      of the raw gradient's :math:`\\|G\\|_F^2` and M' the momentum before orthogonalization.
    - "namo_d" (arXiv:2602.17080): the same for each column, clamped around the columns' mean.

    With the same arguments "adamuon", "normuon" and "namo" make the steps of Emerging-Optimizers 0.4. Those of 0.3 differ
    for momenta with a norm below 1e-7. The paper's NAMO and NAMO-D are ``nesterov=True, beta2=0.99, bias_correction=True,
    weight_decay_method="adaptive", coefficient_type="simple", extra_scale_factor=0.2``.

    Parameters are matrices of shape (out, in), or with the attribute ``muon_stacked = True`` stacks of matrices
    (experts, out, in), in float32, bfloat16, float16 or float64. A parameter with the attribute
    ``muon_transposed = True`` is stored as (in, out), as Hugging Face's ``Conv1D`` stores it, and the step works on its
    transpose. Set attributes before you make the optimizer. State and arithmetic are in float32 (float64 for float64
    parameters, except for the orthogonalization), and a low-precision weight is rounded once per step. Give embeddings,
    output heads, norms and biases to AdamW, as :class:`~emerging_optimizers.adaptive_muon.HybridAdaptiveMuon` does.
    ``torch.autocast``, inference mode and the float32 matmul precision do not change a step, nor does a step change them.
    A compiled function may call it; the step itself runs uncompiled.

    Args:
        params: Iterable of matrices, of ``(name, matrix)`` pairs, or of dicts that define parameter groups. A group
            may set its own ``lr``, ``momentum``, ``weight_decay``, ``beta2`` and ``eps``.
        {options}

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument, a group's option or a parameter breaks one of the rules above, or a sharding engine
            has emptied or flattened a parameter. Nothing is changed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = Options.lr,
        momentum: float = Options.momentum,
        weight_decay: float = Options.weight_decay,
        **options: Unpack[OptionsDict],
    ) -> None:
        self.options = Options.of(lr=lr, momentum=momentum, weight_decay=weight_decay, **options)
        self.bias_correction, self.capturable = self.options.corrects_bias, self.options.capturable
        self.max_bytes_in_flight = self.options.max_bytes_in_flight
        self._mode = make_mode(self.options.tp_mode)
        placement = {name: getattr(self.options, name) for name in _OF_RULES}
        rules = Rules(**placement, mode=self._mode, hooked=self.options.weight_update_hook is not None)
        self._sharding = Sharding(rules, self.options.synced)
        self.state_format = _state_format(self.options, self._sharding)
        self._planner = Planner(self.state_format, self._mode, self.max_bytes_in_flight)
        self.diagnostics_store = make_store(self.options.diagnostics_every, self._mode, on_device=self.capturable)
        self._group_defaults = {name: getattr(self.options, name) for name in ("beta2", "eps", "moment2_method")}
        of_upstream: dict[str, Any] = {name: getattr(self.options, name) for name in _OF_UPSTREAM}
        super().__init__(params, lr, momentum, weight_decay, **of_upstream)
        self.scaled_orthogonalize_fn = self.options.newton_schulz
        self._check_orthogonalization()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @_disable_dynamo  # one graph of all matrices would be compiled anew for each set of them that has gradients
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all matrices that have a gradient.

        Args:
            closure: Optional; evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If a gradient is sparse or complex, a parameter is no longer a matrix or no longer of its
                state's dtype, or the ranks that hold a matrix together are found to disagree about it. No weight and no
                state has changed then. There is an exception where gradients have come or gone on some ranks only: on a
                CPU, momenta of a process group's first rounds have been averaged on the other ranks, and all of the
                process groups before it. On a GPU this is found in the next step: load a checkpoint from before the last.
            RuntimeError: If a rank that holds a shard does not answer, because it has died or has other parameters than
                in its steps before; then some may have changed.
        """
        loss = loss_of(closure)
        with plain_modes([p for group in self.param_groups for p in group["params"]]):
            self._step()
        return loss

    def _step(self) -> None:
        """Update all matrices that have a gradient, in the modes of :func:`plain_modes`."""
        check_capture(self.param_groups, self.state if self._planner.has_planned else {}, self.capturable)
        self._check_orthogonalization()
        for group in self.param_groups:
            check_matrices(group)
            check_rounding(group, self.options)
            check_gradients(group, "AdaptiveMuon")
        self._sharding.check_last_step(self.param_groups)
        self._sharding.resolve(self.param_groups)
        plan = self._planner.plan(self.param_groups, self.state)
        # Those that are partial sums are summed here, in the order of the parameters, which all ranks share.
        gradients = {p: gradient_of(p) for group in self.param_groups for p in group["params"] if p.grad is not None}
        fresh = {p for p in gradients if not self.state.get(p)}
        with_state = partial(self._planner.with_state, self.param_groups, self.state, gradients, self._init_group)
        plan, rule = with_state(plan), self._rule()

        def begun(one: Round, flag: Flag | None) -> RoundUpdate:
            return RoundUpdate(one, flag, rule, self.param_groups, plan.params, gradients, self.state)

        for process_group in plan.rounds:
            if process_group is not None and self._sharding.has_changed(process_group):
                if not knock(process_group, self._planner, rule, self.param_groups):
                    continue
                plan = with_state(self._planner.plan(self.param_groups, self.state))
            pipelined(plan.rounds[process_group], begun, self._sharding.flag(process_group, self.param_groups))
        count_empty(self.param_groups, self.state, gradients, fresh, self._sharding)
        if self.diagnostics_store is not None:
            self.diagnostics_store.end_step()

    def _rule(self) -> StepRule:
        """Return what a step does with every batch."""
        return StepRule(
            moment2=self.state_format.moment2,
            nesterov=self.nesterov,
            weight_decay=WEIGHT_DECAYS[self.weight_decay_method],
            bias_correction=self.bias_correction,
            rounding=make_rounding(self.param_groups, self.options, steps_on_device=self.capturable),
            steps_on_device=self.capturable,
            shape_factor=lambda m, n: get_muon_scale_factor(m, n, mode=self.scale_mode) * self.extra_scale_factor,
            functions=self._functions,
            before_update=self.pre_weight_update_fn_inplace if self._has_own(_PRE_HOOK) else None,
            after_update=self.post_weight_update_fn_inplace,
            hook=self.options.weight_update_hook,
            measuring=None if self.diagnostics_store is None else self.diagnostics_store.begin_step(),
        )

    def _functions(
        self, params: Sequence[torch.Tensor], group: dict[str, Any]
    ) -> NewtonSchulz | list[Callable[[torch.Tensor], torch.Tensor]]:
        """Return the iteration; or a function of the momentum per parameter, where a subclass or the user replaces it."""
        if self._has_own("orthogonalize"):
            options = {key: value for key, value in group.items() if key != "params"}
            return [at_precision(partial(self.orthogonalize, p, **options), self.fp32_matmul_prec) for p in params]
        function = at_precision(self.scaled_orthogonalize_fn, self.fp32_matmul_prec)
        return function if isinstance(function, NewtonSchulz) else [function] * len(params)

    @override
    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the orthogonalized momentum, not scaled. A subclass may do more here, such as upstream's documents.

        Args:
            p: The parameter, of which this rank may hold a shard.
            grad: The momentum of one whole matrix of it, or of a stack of matrices.
            **kwargs: Options of the parameter's group.
        """
        return at_precision(self.scaled_orthogonalize_fn, self.fp32_matmul_prec)(grad)

    def _check_orthogonalization(self) -> None:
        """Raise a ``ValueError`` if the mode would pass over what is in the place of the iteration."""
        replaced = self._has_own("orthogonalize") or not isinstance(self.scaled_orthogonalize_fn, NewtonSchulz)
        require(
            not replaced or self._mode is None or self._mode.takes_functions,
            "orthogonalize and scaled_orthogonalize_fn must not be replaced in a tp_mode that calls neither",
            "distributed",
            'Use tp_mode="layer_sharded".',
        )

    def _has_own(self, name: str) -> bool:
        """Return whether a subclass or the user has put something in the place of a method."""
        method = getattr(self, name)
        return getattr(method, "__func__", method) is not getattr(AdaptiveMuon, name)

    @override
    @torch.no_grad()
    @torch.inference_mode(False)  # what is made in it could not be updated outside
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Make the state of the parameters that have none yet.

        Args:
            group: Parameter group.
            skip_non_grad_params: Whether to pass over parameters without a gradient.
        """
        for p in group["params"]:
            if (p.grad is None and skip_non_grad_params) or "momentum_buffer" in self.state.get(p, ()):
                continue
            self._sharding.resolve(self.param_groups)
            if not self._sharding.awaits_comparison(p):
                self.state[p].update(self.state_format.new_state(p))

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, or raise and leave the optimizer as it was.

        Args:
            param_group: ``params`` and the options that differ from the constructor's.
        """
        super().add_param_group({**self._group_defaults, **param_group})
        try:
            group = self.param_groups[-1]
            check_group(group, self.options)
            check_distinct(group)
            check_matrices(group)
            check_rounding(group, self.options)
            self._sharding.check(group)
        except Exception:
            self.param_groups.pop()
            raise

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of upstream's ``AdaptiveMuon``.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the checkpoint is of another ``moment2_method``, of other shapes, or lacks the step count
                that bias correction needs. Nothing is changed.
        """
        checkpoint.load(self, state_dict, super().load_state_dict, self.state_format)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return checkpoint.attributes(self)

    @override
    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        for name in ("scaled_orthogonalize_fn", *_EXTENSION_POINTS):
            if name in vars(self):
                require_picklable(name, vars(self)[name])
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return checkpoint.deep_copy(self, memo)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # an upstream checkpoint's groups lack ours
            group.update(self._group_defaults | group)


# Where upstream lets a user, or a subclass, put a function of its own.
_PRE_HOOK = "pre_weight_update_fn_inplace"
_EXTENSION_POINTS = ("orthogonalize", _PRE_HOOK, "post_weight_update_fn_inplace")
# The options that say how a parameter is split.
_OF_RULES = ("tp_group", "replica_group", "share_replicas", "layout_fn", "blocks_fn")
# What upstream's constructor takes beside lr, momentum and weight_decay.
_OF_UPSTREAM = (
    *("nesterov", "weight_decay_method", "fp32_matmul_prec", "coefficient_type", "num_ns_steps"),
    *("scale_mode", "extra_scale_factor", "moment2_method", "beta2", "eps"),
)


def _state_format(options: Options, sharding: Sharding) -> StateFormat:
    """Return what the state of an optimizer with these options looks like."""
    return StateFormat(
        sharding,
        options.moment2_method,
        options.moment2,
        momentum_dtype=getattr(torch, options.momentum_dtype),
        bias_correction=options.corrects_bias,
        counts_steps=options.counts_steps,
        capturable=options.capturable,
    )
