# SPDX-License-Identifier: Apache-2.0
"""For upstream's AdaptiveMuon: the methods that are new, or take the place of upstream's of the same name."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, override

import torch

from emerging_optimizers import utils
from emerging_optimizers.orthogonalized_optimizers import moment2, muon_utils
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer


class AdaptiveMuon(OrthogonalizedOptimizer):
    """Upstream's class, of which this is a part."""

    @cached_property
    def _moment2(self) -> moment2.Moment2:
        """The method that ``moment2_method`` names; subclasses may set that without calling ``__init__``."""
        return moment2.make_moment2(self.moment2_method, namo_d_clamp=self.namo_d_clamp)

    @property
    def _corrects_bias(self) -> bool:
        """Whether the adaptive scale is corrected for the moving averages having started at zero."""
        return self._moment2.correct_bias if self.correct_bias is None else self.correct_bias

    def layout(self, p: torch.Tensor) -> moment2.Layout:
        """Returns how a parameter is sharded: what its statistics are reduced over, and its whole shape.

        A subclass may override this, e.g. where parameters are sharded over different groups.

        Args:
            p: The parameter, of which this rank may hold a strip.

        Raises:
            ValueError: If ``partition_dim`` is not -1, 0 or 1, or strips of different sizes meet
                ``tp_mode="duplicated"``.
        """
        partition_dim = getattr(p, "partition_dim", None)
        if self.tp_group is None or partition_dim in (None, -1):
            return moment2.Layout()
        if p not in self._layouts:
            if partition_dim not in (0, 1):
                raise ValueError(f"partition_dim must be -1 (whole), 0 (rows) or 1 (columns), got {partition_dim}")
            sizes: list[int] = [0] * self.tp_group.size()
            torch.distributed.all_gather_object(sizes, p.size(partition_dim), group=self.tp_group)
            if self.tp_mode == "duplicated" and len(set(sizes)) > 1:
                raise ValueError(f'tp_mode="duplicated" needs strips of one size, got {sizes}; use "distributed"')
            whole = (sum(sizes), p.size(1)) if partition_dim == 0 else (p.size(0), sum(sizes))
            self._layouts[p] = moment2.StripLayout(self.tp_group, partition_dim - 2, whole)
        return self._layouts[p]

    @override
    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Orthogonalizes the momentum; of a matrix in strips, the strip at hand.

        Args:
            p: The parameter.
            grad: The momentum.
            **kwargs: Options of the parameter's group.
        """
        layout = self.layout(p)
        if not isinstance(layout, moment2.StripLayout):
            return super().orthogonalize(p, grad, **kwargs)
        return muon_utils.newton_schulz_tp(
            grad,
            steps=self.num_ns_steps,
            coefficient_type=self.coefficient_type,
            tp_group=layout.group,
            partition_dim=layout.dim + 2,
            tp_mode=self.tp_mode,
        )

    @torch.no_grad()  # type: ignore[misc]
    @override
    def _init_group(
        self,
        group: dict,
        skip_non_grad_params: bool = True,
    ) -> None:
        """Performs lazy state initialization for parameters.

        Extends the base class to also initialize the second moment buffer.
        The shape of the moment2 buffer depends on the moment2_method:
        - "adamuon": Full elementwise buffer with same shape as parameter
        - "normuon": One entry for each row if the whole matrix has at least as many rows as columns, else each column
        - "namo": Scalar buffer (EMA of squared Frobenius norm of gradient)
        - "namo_d": One entry for each column (EMA of the squared norms of the gradient's columns)

        Args:
            group: Parameter group dictionary.
            skip_non_grad_params: If True, skip parameters without gradients.
        """
        for p in group["params"]:
            if p.dim() != 2:
                raise ValueError(f"{self.__class__.__name__} only supports 2D parameters, got shape {tuple(p.shape)}")
            if skip_non_grad_params and p.grad is None:
                continue
            state = self.state[p]

            if len(state) == 0:
                dims = self._moment2.dims(*self.layout(p).shape(p))
                shape = [p.size(dim) if dim in dims else 1 for dim in (-2, -1)] if dims else [1]
                state["momentum_buffer"] = torch.zeros_like(p.data)
                state["moment2_buffer"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
                if self._corrects_bias:
                    state["step"] = torch.zeros((), dtype=torch.float32)
            elif not self._corrects_bias:
                state.pop("step", None)
            elif "step" not in state:
                raise ValueError(
                    "correct_bias needs the number of steps that a state has seen, and one that was saved without it "
                    "has none; go on with correct_bias=False, or start with an empty state"
                )

    def _adaptive_scale(
        self,
        p: torch.Tensor,
        group: dict,
        *,
        raw_grad: torch.Tensor,
        pre_orth_grad: torch.Tensor,
        orth_grad: torch.Tensor,
    ) -> torch.Tensor:
        """Updates the second moment and returns what the orthogonalized gradient is multiplied by.

        Args:
            p: The parameter.
            group: Its parameter group.
            raw_grad: The raw gradient before momentum update.
            pre_orth_grad: The gradient after momentum/Nesterov, before orthogonalization.
            orth_grad: The raw orthogonalized gradient tensor before Muon update scaling.

        Returns:
            The adaptive scale, broadcastable to ``orth_grad``.
        """
        state = self.state[p]

        def average(statistic: torch.Tensor) -> torch.Tensor:
            moment2_buffer: torch.Tensor = state["moment2_buffer"].view_as(statistic)
            return moment2_buffer.lerp_(statistic, 1 - group["beta2"])

        seen = moment2.Seen(raw_grad, pre_orth_grad, orth_grad)
        scale = self._moment2.scale(average, seen, self.layout(p), eps=group["eps"])
        if self._corrects_bias:
            state["step"] += 1
            scale *= self._moment2.correction(float(state["step"]), momentum=group["momentum"], beta2=group["beta2"])
        return scale

    @torch.no_grad()  # type: ignore[misc]
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Single optimization step.

        Args:
            closure: Unsupported; must be ``None``.
        """
        if closure is not None:
            raise ValueError("closure is not supported")

        for group in self.param_groups:
            self._init_group(group)

            for p in group["params"]:
                grad = p.grad
                if grad is None:
                    continue
                exp_avg = self.state[p]["momentum_buffer"]

                if not self._decays_adaptively:
                    self._apply_weight_decay_inplace(
                        p,
                        grad,
                        group["lr"],
                        group["weight_decay"],
                    )

                raw_grad = grad

                # update momentum buffer with EMA of gradient
                exp_avg.lerp_(grad, 1 - group["momentum"])

                if self.nesterov:
                    grad = grad.lerp(exp_avg, group["momentum"])
                else:
                    grad = exp_avg

                with utils.fp32_matmul_precision(self.fp32_matmul_prec):
                    group_kwargs = {k: v for k, v in group.items() if k != "params"}
                    orth_grad = self.orthogonalize(p, grad, **group_kwargs)

                scale = self._adaptive_scale(p, group, raw_grad=raw_grad, pre_orth_grad=grad, orth_grad=orth_grad)
                if self._decays_adaptively:
                    # the paper's: decoupled, and scaled as the update is
                    p.addcmul_(p, scale, value=-group["lr"] * group["weight_decay"])
                update = self._apply_muon_scale(orth_grad * scale, *self.layout(p).shape(p))

                # perform weight update with pre and post weight update functions for subclass customization
                self.pre_weight_update_fn_inplace(p, update)
                p.add_(update, alpha=-group["lr"])
                self.post_weight_update_fn_inplace(p)

        return None
