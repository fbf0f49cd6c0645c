# SPDX-License-Identifier: Apache-2.0
"""AdamW's steps beside DTensors, and in stochastic rounding: bfloat16 parameters step in float32 copies.

AdamW's update is by elements, so only a few parameters have copies at a time, and of a large one only some rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import filterfalse
from typing import Any

import torch
from torch.optim import Optimizer

from emerging_optimizers.adaptive_muon.noise import round_into
from emerging_optimizers.adaptive_muon.rounding import noise_of
from emerging_optimizers.adaptive_muon.sharding.dtensor import is_dtensor, local_of


__all__ = ["AT_ONCE", "is_widened", "step_by_mesh", "step_in_float32"]

# Elements that have copies at once: 64 MiB of them, and as much of their gradients.
AT_ONCE = 2**24


def is_widened(p: torch.Tensor) -> bool:
    """Return whether a parameter of AdamW steps in a float32 copy under stochastic rounding. Its state is in float32."""
    return p.dtype == torch.bfloat16


def step_by_mesh(adamw: Optimizer) -> None:
    """Make a step of AdamW, whose fused and foreach kernels take neither DTensors beside plain tensors nor of two meshes."""
    groups = adamw.param_groups
    of_mesh = defaultdict[Any, set[torch.Tensor]](set)
    for group in groups:
        for p in group["params"]:
            of_mesh[p.device_mesh if is_dtensor(p) else None].add(p)
    try:
        for params in of_mesh.values():
            adamw.param_groups = [{**group, "params": [p for p in group["params"] if p in params]} for group in groups]
            adamw.step()
    finally:
        adamw.param_groups = groups


@torch.no_grad()
def step_in_float32(adamw: Optimizer) -> None:
    """Make a step of AdamW in which the updates of its bfloat16 parameters are rounded once, stochastically."""
    groups, states = adamw.param_groups, adamw.state
    numbered = [*enumerate((group, p) for group in groups for p in group["params"])]
    try:
        adamw.param_groups = [{**group, "params": [*filterfalse(is_widened, group["params"])]} for group in groups]
        step_by_mesh(adamw)
        widened = ((place, group, p) for place, (group, p) in numbered if is_widened(p) and p.grad is not None)
        for batch in _batches(part for place, group, p in widened for part in _parts(p, place, group, states[p])):
            copies = [part.copy() for part in batch]
            adamw.state = defaultdict(dict, zip(copies, (part.lent_state() for part in batch), strict=True))
            adamw.param_groups = [
                {**group, "params": [copy for copy, part in zip(copies, batch, strict=True) if part.group is group]}
                for group in groups
            ]
            step_by_mesh(adamw)
            for copy, part in zip(copies, batch, strict=True):
                part.take_back(copy, adamw.state[copy])
    finally:
        adamw.param_groups, adamw.state = groups, states


@dataclass(frozen=True, eq=False)
class _Part:
    """A parameter that steps in a float32 copy, or some rows of what this rank holds of it.

    Args:
        p: The parameter.
        place: Its place in the optimizer.
        group: Its group.
        state: Its state, which is filled.
        is_new: Whether it had no state before this step.
        rows: Which rows, the last dimension taken for columns; None for all of the parameter.
        is_last: Whether these are the last rows.
    """

    p: torch.Tensor
    place: int
    group: dict[str, Any]
    state: dict[str, Any]
    is_new: bool
    rows: slice | None = None
    is_last: bool = True

    def copy(self) -> torch.Tensor:
        """Return the part in float32, with its gradient."""
        assert self.p.grad is not None
        copy = self._of(self.p.detach()).float()
        copy.grad = self._of(self.p.grad).float()
        return copy

    def lent_state(self) -> dict[str, Any]:
        """Return the state for a copy: the parameter's own, or these rows of it and copies of what has no rows."""
        if self.rows is None:
            return self.state
        if self.is_new:
            return {}
        return {
            key: self._of(value) if value.shape == self.p.shape else value.clone() for key, value in self.state.items()
        }

    def take_back(self, copy: torch.Tensor, lent: dict[str, Any]) -> None:
        """Round a copy that has stepped into the parameter, and keep its state."""
        noise = noise_of(self.p, self.place, lent["step"], capturable=self.group["capturable"])
        local = _as_matrix(self.p.detach())
        if self.rows is None:
            result = local if _is_viewed(self.p) else torch.empty_like(local)
            round_into([result], [_as_matrix(copy)], noise)
            if result is not local:
                local_of(self.p.detach()).copy_(result.view(local_of(self.p).shape))
            return
        assert noise.rows is not None
        round_into([local[self.rows]], [copy], replace(noise, rows=noise.rows[self.rows]))
        for key, value in lent.items():
            if value.shape == copy.shape:
                if key not in self.state:
                    self.state[key] = torch.zeros_like(self.p, dtype=value.dtype)
                if self.is_new:
                    self._of(self.state[key]).copy_(value)
            elif key not in self.state:
                self.state[key] = value
            elif self.is_last:
                self.state[key].copy_(value)

    def _of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor of the parameter's shape."""
        return tensor if self.rows is None else _as_matrix(tensor)[self.rows]


def _parts(p: torch.Tensor, place: int, group: dict[str, Any], state: dict[str, Any]) -> Iterator[_Part]:
    """Yield the parts in which a parameter steps."""
    whole, matrix = _Part(p, place, group, state, is_new=not state), _as_matrix(p.detach())
    of_state = (value for value in state.values() if value.shape == p.shape)
    if matrix.numel() <= AT_ONCE or not all(map(_is_viewed, (p, *of_state))):
        yield whole
        return
    rows, columns = matrix.shape
    height = max(1, AT_ONCE // columns)
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        yield replace(whole, rows=slice(top, bottom), is_last=bottom == rows)


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Yield parts that have copies at the same time."""
    batch: list[_Part] = []
    elements = 0
    for part in parts:
        own = part._of(part.p.detach())
        number = local_of(own).numel()
        if batch and elements + number > AT_ONCE:
            yield batch
            batch, elements = [], 0
        batch.append(part)
        elements += number
    if batch:
        yield batch


def _as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor with its last dimension as columns; a view where that is contiguous."""
    local = local_of(tensor)
    columns = local.size(-1) if local.ndim else 1
    return local.reshape(local.numel() // max(columns, 1), columns)


def _is_viewed(tensor: torch.Tensor) -> bool:
    """Return whether :func:`_as_matrix` returns a view."""
    return local_of(tensor).is_contiguous()
