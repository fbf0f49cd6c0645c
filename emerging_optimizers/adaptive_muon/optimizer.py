# SPDX-License-Identifier: Apache-2.0
"""The optimizer of matrices: momentum, orthogonalization, adaptive scale, update."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, Literal, Self, SupportsIndex, cast, get_args, overload, override

import torch
from torch._compile import _disable_dynamo
from torch.distributed import ProcessGroup
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon.checks import require, require_one_of, require_picklable, within
from emerging_optimizers.adaptive_muon.exchange.orthogonalizer import TensorParallelModeT, tensor_parallel_mode
from emerging_optimizers.adaptive_muon.exchange.plan import Plan, Ready, Stack, make_plan
from emerging_optimizers.adaptive_muon.exchange.together import run, together
from emerging_optimizers.adaptive_muon.modes import plain_modes
from emerging_optimizers.adaptive_muon.moment2 import Moment2MethodT, Seen, make_moment2
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz, NSAlgorithmT, syrk_is_usable
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
from emerging_optimizers.adaptive_muon.sharding.matrices import merge_blocks
from emerging_optimizers.adaptive_muon.sharding.rules import BlocksFn, LayoutFn
from emerging_optimizers.adaptive_muon.sharding.sharding import Sharding
from emerging_optimizers.adaptive_muon.state import checkpoint
from emerging_optimizers.adaptive_muon.state.buffers import MomentAverage, buffer_dims, buffer_shape, new_buffers
from emerging_optimizers.orthogonalized_optimizers import adaptive_muon as upstream
from emerging_optimizers.orthogonalized_optimizers.muon import MuonScaleT, get_muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer
from emerging_optimizers.utils import FP32MatmulPrecT


__all__ = ["AdaptiveMuon", "WeightDecayMethodT"]

WeightDecayMethodT = Literal["decoupled", "independent", "l2", "palm", "adaptive"]


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
        lr: Learning rate, >= 0. Default 3e-4, as upstream's Muon.
        momentum: Decay rate of the momentum, in [0, 1). Default 0.95, as upstream's Muon and all three papers.
        weight_decay: Weight decay coefficient, >= 0. Default 0.01, as upstream's Muon.
        nesterov: Whether to look ahead: :math:`M' = (1-\\mu) G + \\mu M`.
        weight_decay_method: Upstream's "decoupled", "independent", "l2" and "palm", see
            :class:`~emerging_optimizers.mixin.WeightDecayMixin`; or "adaptive", the paper's: decoupled and scaled by
            the same D as the update, :math:`W \\leftarrow W (1 - \\eta \\lambda D)`; for "namo" and "namo_d" only.
        fp32_matmul_prec: Precision of the orthogonalization's products: "highest" and "high" as in
            ``torch.set_float32_matmul_precision``; "medium" iterates in 16 bit: bfloat16 with
            ``ns_algorithm="standard"``, else float16 on CUDA. On a CPU, "gram" then iterates in float32, and "auto" in
            bfloat16 only where the CPU has units for it and is faster with them: never where a side is below 192.
        coefficient_type: Newton-Schulz coefficient set: "simple", "quintic", "polar_express", "cans", "aol" or
            "deepseekv4".
        num_ns_steps: Number of Newton-Schulz iterations, >= 1.
        ns_algorithm: How they are computed. "standard" is upstream's function for one matrix after the other, to the
            last bit; "gram" takes two or three steps at once on the smaller Gram matrix, of a stack of matrices of
            one shape; "auto" is what is fastest for the shape and device. The last two round differently, not more
            than a few times as much; at "medium" precision less than "standard", or in bfloat16 about as much, see
            :class:`~emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz.NewtonSchulz`.
        scale_mode: s for a matrix of m rows and n columns: "spectral" :math:`\\sqrt{\\max(m, n)}`, "shape_scaling"
            :math:`\\sqrt{\\max(1, m/n)}`, "unit_rms_norm" :math:`\\sqrt{m/n}`.
        extra_scale_factor: Further factor on the update; 0.2 with "spectral" gives Muon the update size of AdamW
            (arXiv:2502.16982).
        moment2_method: "adamuon", "normuon", "namo" or "namo_d".
        beta2: Decay rate of V, in [0, 1). Default 0.95, as upstream; the NAMO paper uses 0.99.
        eps: Small constant that is added to D's denominator ("normuon": the least that V counts as), > 0. Default
            1e-8, as upstream. The denominator of "namo" and "namo_d" is a gradient norm: set ``eps`` well below those.
        bias_correction: Whether D is corrected for V, and for namo and namo_d the momentum, having started at zero:
            a factor :math:`\\sqrt{1 - \\beta_2^t}`, for namo and namo_d over :math:`1 - \\mu^t`. None means what the
            method's source does: on for "namo_d" (the paper), off for the others (Emerging-Optimizers 0.3.0).
        namo_d_clamp: c in (0, 1] of "namo_d": column scales stay within [c, 1/c] of their mean. Default 0.75, from the
            paper's grid {0.12, 0.40, 0.75, 0.90}; its small model used 0.01.
        use_syrk: Whether to use Triton kernels for symmetric products, on CUDA at "medium" precision: upstream's with
            ``ns_algorithm="standard"``, else ours.
        tp_group: Process group over which parameters are split that have the attribute ``partition_dim``: 0 their
            rows, 1 their columns, in the order of the ranks; -1, None or no such attribute is a whole matrix. Strips
            may differ in size. DTensors need no group: they know how they are sharded.
        tp_mode: How a matrix in pieces is orthogonalized. "layer_sharded": sent to one rank and back, many matrices in
            two messages; "duplicated": gathered and orthogonalized by all ranks; "distributed": left where it is, Gram
            matrices are summed in every iteration, which rounds differently; "blockwise": each piece as a matrix of
            its own, which is another result. The others give the whole matrix's.
        layout_fn: Says how a parameter is split where the rules above do not fit: takes the parameter and returns
            ``Layout()`` for whole, a :class:`~emerging_optimizers.adaptive_muon.Split`, a
            :class:`~emerging_optimizers.adaptive_muon.Piece`, or None for the rules above.
        blocks_fn: Says the row blocks of a fused parameter: takes it and returns their sizes, or None for the
            parameter's attribute ``muon_blocks``, if it has one. Every block is a matrix of its own. Where the sizes
            sum to less than the rows, they repeat down the matrix, as Megatron's query groups do.
        max_bytes_in_flight: What a rank may send and receive at once, in bytes. A step with more takes more rounds of
            the same messages; a parameter that is larger has a round of its own. Default 1 GiB.
        capturable: Whether a step may be captured in a CUDA graph, as with torch's own optimizers: the step count is
            kept on the device, and ``lr`` may be a tensor there, for replays to follow a schedule.

    Raises:
        ValueError: If an argument, a group's option or a parameter breaks one of the rules above, or a sharding engine
            has emptied or flattened a parameter. Nothing is changed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        nesterov: bool = False,
        weight_decay_method: WeightDecayMethodT = "decoupled",
        fp32_matmul_prec: FP32MatmulPrecT = "medium",
        coefficient_type: NSCoeffT = "quintic",
        num_ns_steps: int = 5,
        ns_algorithm: NSAlgorithmT = "auto",
        scale_mode: MuonScaleT = "spectral",
        extra_scale_factor: float = 1.0,
        moment2_method: Moment2MethodT = "adamuon",
        beta2: float = 0.95,
        eps: float = 1e-8,
        bias_correction: bool | None = None,
        namo_d_clamp: float = 0.75,
        use_syrk: bool = False,
        tp_group: ProcessGroup | None = None,
        tp_mode: TensorParallelModeT = "layer_sharded",
        layout_fn: LayoutFn | None = None,
        blocks_fn: BlocksFn | None = None,
        max_bytes_in_flight: int = 2**30,
        capturable: bool = False,
    ) -> None:
        self._moment2 = make_moment2(moment2_method, namo_d_clamp=namo_d_clamp)
        use_syrk = use_syrk and syrk_is_usable()
        orthogonalize = NewtonSchulz(coefficient_type, num_ns_steps, use_syrk, ns_algorithm, fp32_matmul_prec)
        require_one_of("scale_mode", scale_mode, get_args(MuonScaleT))
        require_one_of("weight_decay_method", weight_decay_method, get_args(WeightDecayMethodT))
        self._mode = tensor_parallel_mode(tp_mode)
        require(
            within(max_bytes_in_flight, 1),
            "max_bytes_in_flight must be a positive number of bytes",
            max_bytes_in_flight,
            "the default is 2**30",
        )
        finite = within(extra_scale_factor, -math.inf) and math.isfinite(extra_scale_factor)
        require(finite, "extra_scale_factor must be finite", extra_scale_factor, "try 1.0")
        require(
            weight_decay_method != "l2" or not self._moment2.reads_gradient,
            f'weight_decay_method must not be "l2" with moment2_method="{moment2_method}", whose gradient norms it '
            "would falsify",
            weight_decay_method,
            'use "decoupled" or "adaptive"',
        )
        require(
            weight_decay_method != "adaptive" or self._moment2.adaptive_decay,
            f'weight_decay_method must not be "adaptive" with moment2_method="{moment2_method}", whose D is not a '
            "ratio of signal to noise",
            weight_decay_method,
            'use "decoupled", or moment2_method="namo" or "namo_d"',
        )
        self.bias_correction = self._moment2.bias_correction if bias_correction is None else bool(bias_correction)
        self.max_bytes_in_flight = max_bytes_in_flight
        self.capturable = capturable
        alike = {
            "moment2_method": self._moment2,
            "orthogonalization": orthogonalize,
            "fp32_matmul_prec": fp32_matmul_prec,
            "nesterov": nesterov,
            "weight_decay_method": weight_decay_method,
            "scale_mode": scale_mode,
            "extra_scale_factor": extra_scale_factor,
            "bias_correction": self.bias_correction,
            "tp_mode": tp_mode,
            "max_bytes_in_flight": max_bytes_in_flight,
            "capturable": capturable,
        }
        self._sharding = Sharding(tp_group, self._mode, layout_fn, blocks_fn, alike)
        self._plan: tuple[list[Ready], Plan] | None = None
        self._group_defaults = {"beta2": beta2, "eps": eps, "moment2_method": moment2_method}
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            nesterov=nesterov,
            weight_decay_method=cast(Any, weight_decay_method),
            fp32_matmul_prec=fp32_matmul_prec,
            coefficient_type=coefficient_type,
            num_ns_steps=num_ns_steps,
            scale_mode=scale_mode,
            extra_scale_factor=extra_scale_factor,
            moment2_method=cast(Any, moment2_method),
            beta2=beta2,
            eps=eps,
        )
        self.scaled_orthogonalize_fn = orthogonalize
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
            G = as_batch(Gs)
            if not any(await together(matrix.layout.nonzero(matrix.of(G)) for matrix in stack.matrices)):
                return  # torch.distributed.checkpoint steps so to make the state, and means nothing to change
        decay_method: str = self.weight_decay_method
        if decay_method == "l2":
            Gs = [G.clone() for G in Gs]  # the decay is added to it in place; the user's gradient stays as it is
        if decay_method != "adaptive":
            self._decay(Ws, Gs, lr, weight_decay)

        Ms = [as_matrices(p, state["momentum_buffer"]) for p, state in zip(params, states, strict=True)]
        torch._foreach_lerp_(Ms, Gs, 1 - momentum)
        G, M = as_batch(Gs), as_batch(Ms)
        if self.nesterov:
            M = G.lerp(M, momentum)
        DO = await together(
            self._adapted(stack, params, index, matrix.of(G), matrix.of(M))
            for index, matrix in enumerate(stack.matrices)
        )
        if self.bias_correction:
            self._correct([D for D, _ in DO], states, momentum, group["beta2"])
        if decay_method == "adaptive" and weight_decay:
            D = merge_blocks(stack.matrices, [D for D, _ in DO], G.shape) * (lr * weight_decay)
            torch._foreach_addcmul_(Ws, Ws, D.unbind(0), value=-1)
        D = merge_blocks(
            stack.matrices,
            [D.mul_(self._scale(each.layout.shape(O))) for each, (D, O) in zip(stack.matrices, DO, strict=True)],
            G.shape,
        )
        O = merge_blocks(stack.matrices, [O for _, O in DO], G.shape)
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
            return as_batch(
                await together(
                    self._mode(layout.group, piece, layout, home, of_whole, newton_schulz, stack.among_many).answer()
                    for piece, home, of_whole in zip(M, stack.homes[index], functions, strict=True)
                )
            )
        if isinstance(functions[0], NewtonSchulz):
            return functions[0](M)
        return as_batch([of_whole(whole) for of_whole, whole in zip(functions, M, strict=True)])

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
            self._check_group(self.param_groups[-1])
            self._sharding.check(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Checks a group's options and parameters."""
        tiny = torch.finfo(torch.float32).tiny  # a smaller eps is zero, or has no inverse, in float32
        for name, rule, low, high, remedy in (
            ("lr", ">= 0", 0, math.inf, "Muon's rates are about 1e-3 to 1e-2"),
            ("momentum", "in [0, 1)", 0, 1, "the default is 0.95"),
            ("weight_decay", ">= 0", 0, math.inf, "pass 0 for none"),
            ("beta2", "in [0, 1)", 0, 1, "0.95 and 0.99 are usual"),
            ("eps", "> 0 in float32", tiny, math.inf, "the default is 1e-8"),
        ):
            require(within(group[name], low, high), f"{name} must be {rule}", group[name], remedy)
        common = sorted(_COMMON_OPTIONS & group.keys())
        require(not common, "a group may set only lr, momentum, weight_decay, beta2 and eps", common, "set it for all")
        require(
            group["moment2_method"] == self._group_defaults["moment2_method"],
            f'moment2_method must be the same in all groups, "{self._group_defaults["moment2_method"]}"',
            group["moment2_method"],
            "make a second optimizer for these parameters",
        )
        require(
            not group.get("maximize"),
            "maximize must not be set, which AdaptiveMuon does not have",
            group.get("maximize"),
            "negate the loss",
        )
        check_matrices(group)

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


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a method; a function itself, as someone may have put on an instance."""
    function: Callable[..., Any] = getattr(method, "__func__", method)
    return function


# What says on a parameter how it is sharded and which matrices it holds.
_TAGS = ("partition_dim", "muon_blocks", "muon_stacked", "muon_transposed")
# Where upstream lets a user, or a subclass, put a function of its own.
_EXTENSION_POINTS = ("orthogonalize", "pre_weight_update_fn_inplace", "post_weight_update_fn_inplace")

_OF_A_GROUP = {"params", "lr", "momentum", "weight_decay", "beta2", "eps", "moment2_method"}
# Options that hold for all groups; in a group they would be passed over in silence.
_COMMON_OPTIONS = signature(AdaptiveMuon).parameters.keys() - _OF_A_GROUP
