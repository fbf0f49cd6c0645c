# SPDX-License-Identifier: Apache-2.0
"""The optimizer of matrices: momentum, orthogonalization, adaptive scale, update."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Self, SupportsIndex, Unpack, cast, overload, override

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon.checks import require, require_picklable
from emerging_optimizers.adaptive_muon.exchange.orthogonalizer import tensor_parallel_mode
from emerging_optimizers.adaptive_muon.exchange.plan import Plan, Ready, Stack, make_plan
from emerging_optimizers.adaptive_muon.exchange.together import run, together
from emerging_optimizers.adaptive_muon.modes import plain_modes
from emerging_optimizers.adaptive_muon.moment2 import Seen
from emerging_optimizers.adaptive_muon.options import Options, OptionsDict, check_group, shows_options
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz, stacked
from emerging_optimizers.adaptive_muon.orthogonalize.precision import matmul_precision
from emerging_optimizers.adaptive_muon.parameters import (
    check_gradients,
    check_matrices,
    in_work_dtype,
    parameter_name,
    round_into,
    work_dtype,
)
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, gradient_of, is_transposed, wrapped_like
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.sharding import Sharding, joined
from emerging_optimizers.adaptive_muon.state import checkpoint
from emerging_optimizers.adaptive_muon.state.buffers import MomentAverage, buffer_dims, buffer_shape, new_buffers
from emerging_optimizers.orthogonalized_optimizers import adaptive_muon as upstream
from emerging_optimizers.orthogonalized_optimizers.muon import get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer


__all__ = ["AdaptiveMuon"]


@shows_options
class AdaptiveMuon(upstream.AdaptiveMuon):
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

    With the same arguments "adamuon", "normuon" and "namo" walk the path of Emerging-Optimizers 0.3.0, except where the
    momentum's norm is below 1e-7. There 0.3.0 divides by 1e-7 instead of the norm, and its steps vanish; this class,
    like 0.4.0, divides by the norm down to 1e-15. The paper's
    NAMO and NAMO-D are ``nesterov=True, beta2=0.99, bias_correction=True, weight_decay_method="adaptive",
    coefficient_type="simple", extra_scale_factor=0.2``.

    Parameters are matrices of shape (out, in), or with the attribute ``muon_stacked = True`` stacks of matrices
    (experts, out, in), in float32, bfloat16, float16 or float64. A parameter with the attribute
    ``muon_transposed = True`` is stored as (in, out), as Hugging Face's ``Conv1D`` stores it, and the step works on its
    transpose. Set attributes before you make the optimizer. State and arithmetic are in float32 (float64 for float64
    parameters, save for the orthogonalization), and a low-precision weight is rounded once a step. Convolutions,
    embeddings, output heads, norms and biases belong to AdamW, see
    :class:`~emerging_optimizers.adaptive_muon.HybridAdaptiveMuon`.

    A step gives the same result inside ``torch.autocast``, inference mode and any setting of the float32 matmul
    precision, and changes none of them. A compiled function may call it; the step itself runs uncompiled.

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
        self._moment2 = self.options.moment2
        _check_decay_method(self.options)
        self.bias_correction, self.capturable = bool(self.options.bias_correction), self.options.capturable
        self.max_bytes_in_flight = self.options.max_bytes_in_flight
        self._mode = tensor_parallel_mode(self.options.tp_mode)
        placement = self.options.layout_fn, self.options.blocks_fn
        self._sharding = Sharding(self.options.tp_group, self._mode, *placement, self.options.synced)
        self._plan: tuple[list[Ready], Plan] | None = None
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
        """Updates all matrices that have a gradient.

        Args:
            closure: Optional; evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If a gradient is sparse or complex, a parameter is no longer a matrix or no longer of its
                state's dtype, or the ranks that hold a matrix together are found to disagree about it. No weight and no
                state has changed then.
            RuntimeError: If a rank that holds a piece does not answer, or comes with other gradients than in its steps
                before; then some may have changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with plain_modes([p for group in self.param_groups for p in group["params"]]):
            self._step()
        return loss

    def _step(self) -> None:
        """Updates all matrices that have a gradient, whose modes are torch's usual ones."""
        self._check_orthogonalization()
        for group in self.param_groups:
            check_matrices(group)
            check_gradients(group, "AdaptiveMuon")
        self._sharding.resolve(self.param_groups)
        plan, params = self._plan_of()
        # Those that are partial sums are summed here, in the order of the parameters, which all ranks share.
        gradients = {p: gradient_of(p) for group in self.param_groups for p in group["params"] if p.grad is not None}
        fresh = {p for group in self.param_groups for p in group["params"] if not self.state.get(p)}
        for group in self.param_groups:
            self._init_group(group)
        for at_once in plan.rounds:
            run(self._update(stack, [params[i] for i in stack.members], gradients, fresh) for stack in at_once)

    def _plan_of(self) -> tuple[Plan, list[torch.Tensor]]:
        """Returns the plan for the parameters that have a gradient, which rarely change, and these parameters."""
        params, ready = [], []
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None and not self._sharding.is_empty(p):
                    params.append(p)
                    matrices, held = self._sharding.matrices(p), as_matrices(p)
                    ready.append(Ready(matrices, index, p.dtype, p.device, held.shape, is_transposed(p)))
        if self._plan is None or self._plan[0] != ready or self._sharding.has_to_compare:
            self._plan = None  # the one before must not be taken again if something is refused now
            for group in self.param_groups:
                self._check_state(group)
            self._sharding.compare_gradients(self.param_groups)
            self._plan = ready, make_plan(ready, self._mode, self.max_bytes_in_flight)
        return self._plan[1], params

    async def _update(
        self,
        stack: Stack,
        params: Sequence[torch.Tensor],
        gradients: Mapping[torch.Tensor, torch.Tensor],
        fresh: Set[torch.Tensor],
    ) -> None:
        """Updates a stack of parameters and their state in place: the algorithm, in the paper's order and letters.

        Tensors with a letter of their own are stacks, lists of tensors have an s.
        """
        group = self.param_groups[stack.group]
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        states, locals_ = [self.state[p] for p in params], [as_matrices(p) for p in params]
        Ws, Gs = [in_work_dtype(p) for p in locals_], [as_matrices(p, gradients[p]).to(work_dtype(p)) for p in params]
        if fresh >= set(params) and lr == 0:  # reads lr from the device, once
            G = stacked(Gs)
            if not any(await together(matrix.layout.nonzero(matrix.of(G)) for matrix in stack.matrices)):
                return  # torch.distributed.checkpoint steps so to make the state, and means nothing to change
        decay_method: str = self.weight_decay_method
        if decay_method == "l2":
            Gs = [G.clone() for G in Gs]  # the decay is added to it in place; the user's gradient stays as it is
        if decay_method != "adaptive":
            self._decay(Ws, Gs, lr, weight_decay)

        Ms = [as_matrices(p, state["momentum_buffer"]) for p, state in zip(params, states, strict=True)]
        torch._foreach_lerp_(Ms, Gs, 1 - momentum)
        G, M = stacked(Gs), stacked(Ms)
        if self.nesterov:
            M = G.lerp(M, momentum)
        DO = await together(
            self._adapted(stack, params, index, matrix.of(G), matrix.of(M))
            for index, matrix in enumerate(stack.matrices)
        )
        if self.bias_correction:
            self._correct([D for D, _ in DO], states, momentum, group["beta2"])
        if decay_method == "adaptive" and weight_decay:
            D = joined(stack.matrices, [D for D, _ in DO], G) * (lr * weight_decay)
            torch._foreach_addcmul_(Ws, Ws, D.unbind(0), value=-1)
        D = joined(
            stack.matrices,
            [D.mul_(self._scale(each.layout.shape(O))) for each, (D, O) in zip(stack.matrices, DO, strict=True)],
            G,
        )
        O = joined(stack.matrices, [O for _, O in DO], G)
        if self._has_pre_hook():
            D, O = torch.ones_like(D), D * O
            Ws = [self._hooked(*each) for each in zip(params, locals_, Ws, O, strict=True)]
        if isinstance(lr, torch.Tensor):
            D, lr = D * lr, 1.0
        torch._foreach_addcmul_(Ws, O.unbind(0), D.unbind(0), value=-lr)
        for p, local, W in zip(params, locals_, Ws, strict=True):
            round_into(local, W)
            self.post_weight_update_fn_inplace(p)

    async def _adapted(
        self, stack: Stack, params: Sequence[torch.Tensor], index: int, G: torch.Tensor, M: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the adaptive scale D, without bias correction, and O, of one matrix of every parameter of a stack."""
        matrix, group = stack.matrices[index], self.param_groups[stack.group]
        L = matrix.layout
        O = await self._orthogonalized(stack, params, index, M)
        states = [self.state[p] for p in params]
        average = MomentAverage(params, states, matrix, self._moment2.dims(*L.shape(O)), group["beta2"])
        return await self._moment2.scale(average, Seen(G, M, O), L, eps=group["eps"]), O

    async def _orthogonalized(
        self, stack: Stack, params: Sequence[torch.Tensor], index: int, M: torch.Tensor
    ) -> torch.Tensor:
        """Returns O, of matrices in pieces the pieces at hand."""
        layout, functions = stack.matrices[index].layout, [self._of_whole(p, stack.group) for p in params]
        if isinstance(layout, ShardedLayout):
            assert self._mode is not None  # "blockwise" has no matrix in pieces
            newton_schulz = cast(NewtonSchulz, self._iteration())
            return stacked(
                await together(
                    self._mode(layout.group, piece, layout, home, of_whole, newton_schulz, stack.among_many).answer()
                    for piece, home, of_whole in zip(M, stack.homes[index], functions, strict=True)
                )
            )
        if isinstance(functions[0], NewtonSchulz):
            return functions[0](M)
        return stacked([of_whole(whole) for of_whole, whole in zip(functions, M, strict=True)])

    def _of_whole(self, p: torch.Tensor, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns what orthogonalizes a whole matrix of a parameter; where a subclass has no say, the iteration itself."""
        if not self._has_own_orthogonalize():
            return self._iteration()
        options = {key: value for key, value in self.param_groups[group].items() if key != "params"}
        return self._in_precision(partial(self.orthogonalize, p, **options))

    def _iteration(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns ``scaled_orthogonalize_fn``, which may be a user's, to be called in the precision set now."""
        function: Callable[[torch.Tensor], torch.Tensor] = self.scaled_orthogonalize_fn
        if isinstance(function, NewtonSchulz):
            as_set = function.precision == self.fp32_matmul_prec
            return function if as_set else replace(function, precision=self.fp32_matmul_prec)
        return self._in_precision(function)

    def _in_precision(
        self, function: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns a user's function as upstream calls it, with torch's precision of products set."""

        def called(matrix: torch.Tensor) -> torch.Tensor:
            with matmul_precision(self.fp32_matmul_prec):
                return function(matrix)

        return called

    def _decay(self, Ws: list[torch.Tensor], Gs: list[torch.Tensor], lr: float | torch.Tensor, decay: float) -> None:
        """Applies a weight decay of upstream's in place: to the weights, or the gradients' copies."""
        if isinstance(lr, torch.Tensor):  # upstream's would have to know its value
            factors = {"decoupled": lr * decay, "palm": lr * lr * decay}
            if self.weight_decay_method in factors and decay:
                factor = factors[self.weight_decay_method]
                torch._foreach_addcmul_(Ws, Ws, [factor] * len(Ws), value=-1)
                return
            lr = math.nan  # does not matter to the others
        for W, G in zip(Ws, Gs, strict=True):
            self._apply_weight_decay_inplace(W, G, lr, decay)

    def _correct(
        self, Ds: Iterable[torch.Tensor], states: list[dict[str, torch.Tensor]], momentum: float, beta2: float
    ) -> None:
        """Counts the step, and corrects D in place for the averages having started at zero."""
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        # on the host; with capturable, where the graph's replays count, on the device
        known = torch.stack(steps).double() if self.capturable else map(float, steps)
        corrections = [self._moment2.correction(step, momentum=momentum, beta2=beta2) for step in known]
        for D in Ds:
            torch._foreach_mul_(D.unbind(0), corrections)

    def _hooked(self, p: torch.Tensor, local: torch.Tensor, W: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
        """Calls the function that may change the update and the weight, and returns the weight to work on."""
        round_into(local, W)  # it sees the decayed weight,
        self.pre_weight_update_fn_inplace(p, wrapped_like(p, U.mT if is_transposed(p) else U))
        # and may change it
        return W if W is local or torch.equal(W.to(local.dtype), local) else in_work_dtype(local)

    def _scale(self, shape: tuple[int, int]) -> float:
        """Returns s, the factor for the shape of a whole matrix."""
        return get_muon_scale_factor(*shape, mode=self.scale_mode) * self.extra_scale_factor

    @override
    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Returns the orthogonalized momentum, not scaled. A subclass may do more here, such as upstream's documents.

        Args:
            p: The parameter, of which this process may hold a piece.
            grad: The momentum of one whole matrix of it, or of a stack of matrices.
            **kwargs: Options of the parameter's group.
        """
        return self._iteration()(grad)

    def _check_orthogonalization(self) -> None:
        """Raises a ``ValueError`` if the mode would pass over what is in the place of the iteration."""
        replaced = self._has_own_orthogonalize() or not isinstance(self.scaled_orthogonalize_fn, NewtonSchulz)
        require(
            not replaced or self._mode is None or self._mode.takes_functions,
            "orthogonalize and scaled_orthogonalize_fn must not be replaced in a tp_mode that calls neither",
            "distributed",
            'use tp_mode="layer_sharded"',
        )

    def _has_own_orthogonalize(self) -> bool:
        """Whether a subclass or the user has put something in the place of ``orthogonalize``."""
        return _function(self.orthogonalize) is not AdaptiveMuon.orthogonalize

    def _has_pre_hook(self) -> bool:
        """Whether a subclass or the user has put something in the place of upstream's empty function."""
        return _function(self.pre_weight_update_fn_inplace) is not OrthogonalizedOptimizer.pre_weight_update_fn_inplace

    @override
    @torch.no_grad()
    @torch.inference_mode(False)  # what is made in it could not be updated outside
    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        """Makes the state of the parameters that have none yet.

        Args:
            group: Parameter group.
            skip_non_grad_params: Whether to pass over parameters without a gradient.
        """
        for p in group["params"]:
            state = self.state[p] if p.grad is not None or not skip_non_grad_params else None
            if state is None or "momentum_buffer" in state:
                continue
            self._sharding.resolve(self.param_groups)
            state.update(new_buffers(p, self._sharding.matrices(p), self._moment2))
            if self.bias_correction:
                device = p.device if self.capturable else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, or raises and leaves the optimizer as it was.

        Args:
            param_group: ``params`` and the options that differ from the constructor's.
        """
        super().add_param_group({**self._group_defaults, **param_group})
        try:
            group = self.param_groups[-1]
            check_group(group, self.options)
            require(
                not group.get("maximize"),
                "maximize must not be set, which AdaptiveMuon does not have",
                group.get("maximize"),
                "negate the loss",
            )
            check_matrices(group)
            self._sharding.check(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_state(self, group: dict[str, Any]) -> None:
        """Raises a ``ValueError`` if parameters have been converted since their state was made, which does not fit now."""
        for index, p in enumerate(group["params"]):
            momentum = self.state.get(p, {}).get("momentum_buffer")
            require(
                momentum is None or momentum.dtype == work_dtype(p),
                f"the state of {parameter_name(group, index)} must be in {work_dtype(p)}, in which it is worked on",
                momentum if momentum is None else momentum.dtype,
                "after converting a model, call optimizer.load_state_dict(optimizer.state_dict())",
            )
            if momentum is not None:
                shapes = buffer_dims(p, self._sharding.matrices(p), self._moment2)
                expected = {key: buffer_shape(p, dims) for key, dims in shapes.items()}
                found = {key: tuple(self.state[p][key].shape) for key in expected if key in self.state[p]}
                require(
                    found == expected,
                    f"the state of {parameter_name(group, index)} must have the shapes {expected}; it has",
                    found,
                    "set muon_transposed before the first step, and drop the state of a parameter that has another shape",
                )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of upstream's ``AdaptiveMuon``.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the checkpoint is of another ``moment2_method``, of other shapes, or lacks the step count
                that bias correction needs. Nothing is changed.
        """
        checkpoint.load(self, state_dict, super().load_state_dict, self)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return checkpoint.attributes(self)

    @override
    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        for name in ("scaled_orthogonalize_fn", *_EXTENSION_POINTS):
            if name in vars(self):
                require_picklable(name, vars(self)[name])
        return super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns a copy, of its parameters too, which keep what says how they are sharded: torch's copies lose that."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        for group, group_of_copy in zip(self.param_groups, copied.param_groups, strict=True):
            for p, q in zip(group["params"], group_of_copy["params"], strict=True):
                vars(q).update({name: getattr(p, name) for name in _TAGS if hasattr(p, name)})
                copied._sharding.adopt(q, p, self._sharding)
        return copied

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # an upstream checkpoint's groups lack ours
            for name, value in self._group_defaults.items():
                group.setdefault(name, value)


def _check_decay_method(options: Options) -> None:
    """Raise a ``ValueError`` if the weight decay does not go with the second-moment method."""
    decay_method, method = options.weight_decay_method, options.moment2_method
    require(
        decay_method != "l2" or not options.moment2.reads_gradient,
        f'weight_decay_method must not be "l2" with moment2_method="{method}", whose gradient norms it would falsify',
        decay_method,
        'use "decoupled" or "adaptive"',
    )
    require(
        decay_method != "adaptive" or options.moment2.adaptive_decay,
        f'weight_decay_method must not be "adaptive" with moment2_method="{method}", whose D is not a ratio of signal to '
        "noise",
        decay_method,
        'use "decoupled", or moment2_method="namo" or "namo_d"',
    )


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a method; a function itself, as someone may have put on an instance."""
    function: Callable[..., Any] = getattr(method, "__func__", method)
    return function


# What says on a parameter how it is sharded and which matrices it holds.
_TAGS = ("partition_dim", "muon_blocks", "muon_stacked", "muon_transposed")
# Where upstream lets a user, or a subclass, put a function of its own.
_EXTENSION_POINTS = ("orthogonalize", "pre_weight_update_fn_inplace", "post_weight_update_fn_inplace")
# What upstream's constructor takes beside lr, momentum and weight_decay.
_OF_UPSTREAM = (
    *("nesterov", "weight_decay_method", "fp32_matmul_prec", "coefficient_type", "num_ns_steps"),
    *("scale_mode", "extra_scale_factor", "moment2_method", "beta2", "eps"),
)
