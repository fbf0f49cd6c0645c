# SPDX-License-Identifier: Apache-2.0
"""The optimizer state of a parameter: which buffers there are, of which shapes, and V of a batch in them.

A parameter that is one matrix has upstream's buffers, ``momentum_buffer`` and ``moment2_buffer``. Every rank that holds a
shard keeps the whole V, but for a V with an entry per element, which is sharded as the parameter is. Where a parameter
has blocks, each block's V is in a buffer of its own: ``moment2_buffer_0`` and so on.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from emerging_optimizers.adaptive_muon.checks import refusal, require
from emerging_optimizers.adaptive_muon.moment2 import Moment2
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch
from emerging_optimizers.adaptive_muon.parameters import is_flattened, parameter_name, work_dtype
from emerging_optimizers.adaptive_muon.sharding.dtensor import (
    as_matrices,
    is_transposed,
    local_of,
    placements_like,
    wrapped_like,
)
from emerging_optimizers.adaptive_muon.sharding.layout import kept_shape
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, MatrixBatch
from emerging_optimizers.adaptive_muon.sharding.sharding import Sharding


__all__ = [
    "ADAMW_AVERAGES",
    "Buffer",
    "SecondMoment",
    "StateFormat",
    "check_adamw_state",
    "check_state",
    "count_empty",
    "state_only",
    "v_key",
]

# The last is there with amsgrad only.
ADAMW_AVERAGES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

_CONVERTED = "Call optimizer.load_state_dict(optimizer.state_dict()) after converting a model."
_DROP = " Drop the state of a parameter that has another shape."


class Buffer(NamedTuple):
    """A buffer of a parameter's state.

    Args:
        shape: Its shape; of a DTensor the whole one.
        local: The shape of what this rank holds.
        placements: Those of a DTensor; None where it is none.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    placements: Any


@dataclass(frozen=True, eq=False)
class StateFormat:
    """What the state of an optimizer's parameters looks like.

    Args:
        sharding: How the parameters are split.
        moment2_method: The name of the second-moment method.
        moment2: The second-moment method.
        momentum_dtype: The dtype of the momentum, except for float64 parameters.
        bias_correction: Whether D is corrected.
        counts_steps: Whether steps are counted, as bias correction and stochastic rounding need it.
        capturable: Whether the count is on the parameter's device.
    """

    sharding: Sharding
    moment2_method: str
    moment2: Moment2
    momentum_dtype: torch.dtype
    bias_correction: bool
    counts_steps: bool
    capturable: bool

    def kept_dims(self, p: torch.Tensor, matrix: Matrix) -> tuple[int, ...]:
        """Return the dimensions that V keeps of a matrix of a parameter."""
        return self.moment2.kept_dims(*matrix.shape(p))

    def dtype(self, p: torch.Tensor, key: str) -> torch.dtype:
        """Return the dtype of a parameter's buffer of this name."""
        work = work_dtype(p)
        return self.momentum_dtype if key == "momentum_buffer" and work == torch.float32 else work

    def buffers(self, p: torch.Tensor) -> dict[str, Buffer]:
        """Return a parameter's buffers by their names."""
        like_p = Buffer((*p.shape,), (*local_of(p).shape,), placements_like(p, (-2, -1)))
        buffers = {"momentum_buffer": like_p}
        for matrix in self.sharding.matrices(p):
            kept = self.kept_dims(p, matrix)
            buffers[v_key(matrix, kept)] = like_p if len(kept) == 2 else _vector(p, matrix.shape(p), kept)
        return buffers

    def new_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a parameter's state, all zero."""
        state, device = {}, local_of(p).device
        for key, buffer in self.buffers(p).items():
            # not new_zeros, which gives a subclass of torch.Tensor, as some weights are, its own kind
            state[key] = torch.zeros(buffer.local, dtype=self.dtype(p, key), device=device)
            if buffer.placements is not None:
                state[key] = wrapped_like(p, state[key], buffer.placements, buffer.shape)
        if self.counts_steps:
            state["step"] = self.new_step(p)
        return state

    def new_step(self, p: torch.Tensor) -> torch.Tensor:
        """Return a parameter's step count, zero."""
        return torch.zeros((), dtype=torch.float32, device=p.device if self.capturable else "cpu")


def check_state(
    group: dict[str, Any], states: Mapping[torch.Tensor, dict[str, Any]], state_format: StateFormat
) -> None:
    """Raise a ``ValueError`` if a parameter of a group has been converted since its state was made, which does not fit now."""
    for index, p in enumerate(group["params"]):
        state = states.get(p, {})
        momentum = state.get("momentum_buffer")
        if momentum is None:
            continue
        own = state_format.dtype(p, "momentum_buffer")
        require(
            (momentum.dtype, momentum.device) == (own, p.device),
            f"the momentum of {parameter_name(group, index)} must be in {own} on {p.device}",
            f"{momentum.dtype} on {momentum.device}",
            _CONVERTED,
        )
        expected = {key: buffer.shape for key, buffer in state_format.buffers(p).items()}
        found = {key: tuple(state[key].shape) for key in expected if key in state}
        require(
            found == expected,
            f"the state of {parameter_name(group, index)} must have the shapes {expected}; it has",
            found,
            "Set muon_transposed before the first step." + _DROP,
        )


def check_adamw_state(
    group: dict[str, Any],
    states: Mapping[torch.Tensor, dict[str, Any]],
    dtype: Callable[[torch.Tensor], torch.dtype] | None = None,
) -> None:
    """Raise a ``ValueError`` if a state does not fit a parameter of AdamW, whose step would find out halfway.

    Args:
        group: Group of AdamW.
        states: State of each parameter.
        dtype: Returns the dtype of the averages of a parameter; None for a checkpoint, which is converted when it loads.
    """
    averages = ADAMW_AVERAGES[: 3 if group.get("amsgrad") else 2]
    for index, p in enumerate(group["params"]):
        state = states.get(p)
        if not state:
            continue
        expected = (p.shape,) if dtype is None else (p.shape, dtype(p), p.device)
        found = {key: _form(state[key])[: len(expected)] for key in averages if key in state}
        if "step" in state and len(found) == len(averages) and all(form == expected for form in found.values()):
            continue
        raise refusal(
            f"the state of {parameter_name(group, index)} must hold step, and {' and '.join(averages)} of "
            f"{_in_words(expected)}; it holds",
            ", ".join(f"{key} of {_in_words(found[key])}" if key in found else key for key in state),
            "Load a checkpoint of the same model." if dtype is None else _CONVERTED + _DROP,
        )


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _in_words(form: Sequence[Any]) -> str:
    return " ".join(map(str, (tuple(form[0]), *form[1:])))


def state_only(
    param_groups: Sequence[dict[str, Any]],
    states: Mapping[torch.Tensor, dict[str, Any]],
    gradients: Mapping[torch.Tensor, torch.Tensor],
    sharding: Sharding,
) -> Set[torch.Tensor]:
    """Return the parameters for which a step makes state only: new ones, at a learning rate and gradients of zero.

    torch.distributed.checkpoint steps so to make the state that it loads into, and nothing else must change. The decay of
    some methods would. No rank can decide by its own shard, so the ranks are asked, before anything else of the step.
    """
    fresh = {
        p: gradients[p]
        for group in param_groups
        for p in group["params"]
        if p in gradients and not states.get(p) and not sharding.is_empty(p) and group["lr"] == 0
    }
    return sharding.all_zero(fresh)


def count_empty(
    param_groups: Sequence[dict[str, Any]],
    states: Mapping[torch.Tensor, dict[str, Any]],
    gradients: Mapping[torch.Tensor, torch.Tensor],
    fresh: Set[torch.Tensor],
    sharding: Sharding,
) -> None:
    """Count a step of the parameters of which this rank has nothing, such as no experts of a stack.

    A checkpoint has one count for all ranks, perhaps this one's. Of ``fresh`` parameters, whose state this step has made,
    those at a learning rate of zero are counted only if another parameter has made a step: see :func:`state_only`.
    """

    @cache
    def stepped() -> bool:  # reads the counts, which wait for the device: only asked for what is empty and fresh
        return any(states[p]["step"] for p in gradients if "step" in states.get(p, ()))

    for group in param_groups:
        for p in group["params"]:
            if p in gradients and gradients[p].numel() == 0 and sharding.is_empty(p):
                step = states.get(p, {}).get("step")
                if step is not None and (p not in fresh or group["lr"] != 0 or stepped()):
                    step.add_(1)


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """V of a batch of matrices, of some parameters that have these states."""

    params: Sequence[torch.Tensor]
    states: Sequence[dict[str, torch.Tensor]]
    batch: MatrixBatch
    kept_dims: tuple[int, ...]
    beta2: float

    def update(self, statistic: torch.Tensor) -> torch.Tensor:
        """Average a statistic into V in place, and return V; both have the shape ``(batch, ...)``."""
        statistics = statistic.unbind(0)
        with self._buffers() as buffers:
            Vs = [V.view_as(like) for V, like in zip(buffers, statistics, strict=True)]
            torch._foreach_lerp_(Vs, statistics, 1 - self.beta2)
        return as_batch(Vs)

    def after(self, statistic: torch.Tensor, members: Sequence[int]) -> torch.Tensor:
        """Return what V of some members, a vector, is after :meth:`update`, which is yet to come."""
        with self._buffers() as buffers:
            V = as_batch([buffers[i].view_as(like) for i, like in zip(members, statistic, strict=True)])
        return V.lerp(statistic, 1 - self.beta2)

    def _buffers(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Return a context with V of each matrix, to be changed in place."""
        if len(self.kept_dims) == 2:
            of_params = zip(self.params, self.states, strict=True)
            return self.batch.in_place([as_matrices(p, state["moment2_buffer"]) for p, state in of_params])
        return nullcontext(
            [
                as_matrices(self.params[place], self.states[place][v_key(matrix, self.kept_dims)])
                for matrix, place in zip(self.batch.matrices, self.batch.places, strict=True)
            ]
        )


def v_key(matrix: Matrix, kept_dims: Sequence[int]) -> str:
    """Return the name in the state of the buffer that holds V of a matrix, of which V keeps these dimensions."""
    of_parameter = matrix.block is None or len(kept_dims) == 2
    return "moment2_buffer" if of_parameter else f"moment2_buffer_{matrix.block}"


def _vector(p: torch.Tensor, shape: tuple[int, int], kept_dims: tuple[int, ...]) -> Buffer:
    """Return the buffer of a V with an entry per row, per column, or for the whole matrix of this shape."""
    sizes = [*kept_shape(shape, kept_dims)]
    if is_transposed(p):
        sizes.reverse()
    if not kept_dims:
        sizes.pop()  # upstream's namo keeps (1,) for a matrix
    lead, local = ((), ()) if is_flattened(p) else (p.shape[:-2], local_of(p).shape[:-2])
    return Buffer((*lead, *sizes), (*local, *sizes), placements_like(p, ()))
