# SPDX-License-Identifier: Apache-2.0
"""AdamW's part of stochastic rounding: its bfloat16 parameters step in float32 copies, which are then rounded."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, override

import torch
from torch.optim import Optimizer

from emerging_optimizers.adaptive_muon.noise import round_into
from emerging_optimizers.adaptive_muon.rounding import noise_of
from emerging_optimizers.adaptive_muon.sharding.dtensor import local_of


__all__ = ["in_float32", "is_widened"]


def is_widened(p: torch.Tensor) -> bool:
    """Return whether a parameter of AdamW steps in a float32 copy under stochastic rounding. Its state is in float32."""
    return p.dtype == torch.bfloat16


@contextmanager
def in_float32(adamw: Optimizer) -> Iterator[None]:
    """Return a context in which AdamW steps on float32 copies of its bfloat16 parameters; at its end they are rounded.

    The copies live as long as the context. They take the parameters' places in the groups and have their states.
    """
    groups, states = adamw.param_groups, adamw.state
    copies = {p: _copy(p) for group in groups for p in group["params"] if is_widened(p) and p.grad is not None}
    adamw.param_groups = [{**group, "params": [copies.get(p, p) for p in group["params"]]} for group in groups]
    adamw.state = _Lent(states, {copy: p for p, copy in copies.items()})
    try:
        yield
        _round(copies, groups, states)
    finally:
        adamw.param_groups, adamw.state = groups, states


class _Lent(defaultdict[torch.Tensor, dict[str, Any]]):
    """The states of parameters, in which a copy has that of its parameter.

    Args:
        states: The states.
        originals: The parameter of each copy.
    """

    def __init__(
        self, states: dict[torch.Tensor, dict[str, Any]], originals: Mapping[torch.Tensor, torch.Tensor]
    ) -> None:
        super().__init__(dict)
        self._states, self._originals = states, originals

    @override
    def __missing__(self, p: torch.Tensor) -> dict[str, Any]:
        return self._states[self._originals.get(p, p)]


def _copy(p: torch.Tensor) -> torch.Tensor:
    """Return a float32 copy of a parameter, with its gradient."""
    copy, grad = p.detach().float(), p.grad
    assert grad is not None
    copy.grad = grad.float()
    return copy


@torch.no_grad()
def _round(
    copies: Mapping[torch.Tensor, torch.Tensor],
    groups: Sequence[dict[str, Any]],
    states: Mapping[torch.Tensor, dict[str, Any]],
) -> None:
    """Round the copies into their parameters in place."""
    for place, p in enumerate(p for group in groups for p in group["params"]):
        if p in copies:
            local, value = local_of(p.detach()), local_of(copies[p])
            columns = local.size(-1) if local.ndim else 1
            result = local.new_empty((local.numel() // max(columns, 1), columns))
            round_into([result], [value.reshape(result.shape)], noise_of(p, place, states[p]["step"]))
            local.copy_(result.view(local.shape))
