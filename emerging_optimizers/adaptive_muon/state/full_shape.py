# SPDX-License-Identifier: Apache-2.0
"""Optimizer state for checkpoints that know one shape a parameter: V spread over the parameter, and read off again.

Spread, every element of ``moment2_buffer`` is the V that holds for that element of the parameter, whatever the method
and the blocks. A checkpoint may cut it and join it as it does with the parameter, and V can be read off the pieces.
"""

from collections.abc import Sequence
from typing import Any

import torch

from emerging_optimizers.adaptive_muon.exchange.together import together
from emerging_optimizers.adaptive_muon.moment2 import Moment2
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, merge_blocks
from emerging_optimizers.adaptive_muon.state.buffers import buffer_dims, buffer_key, buffer_shape


__all__ = ["read_off", "spread"]

_V = "moment2_buffer"


def spread(state: dict[str, Any], p: torch.Tensor, matrices: Sequence[Matrix], moment2: Moment2) -> dict[str, Any]:
    """Returns a parameter's state with V as one tensor in the shape of ``p``: a view of V where that is possible.

    Args:
        state: The state, which stays as it is.
        p: The parameter, or the local piece of it.
        matrices: Its logical matrices.
        moment2: The second-moment method.
    """
    parts = []
    for matrix in matrices:
        dims = _dims(p, matrix, moment2)
        V = state[buffer_key(matrix, dims)]
        V = matrix.of(V) if -2 in dims else V.view(*p.shape[:-2], 1, -1)
        parts.append(V.expand_as(matrix.of(p)))
    others = {key: value for key, value in state.items() if not key.startswith(_V)}
    return {**others, _V: merge_blocks(matrices, parts, state["momentum_buffer"].shape)}


async def read_off(
    state: dict[str, Any], p: torch.Tensor, matrices: Sequence[Matrix], moment2: Moment2
) -> dict[str, Any]:
    """Returns a parameter's state with V in the method's own buffers; a state that has them is returned itself.

    Args:
        state: The state, which stays as it is.
        p: The parameter, or the local piece of it.
        matrices: Its logical matrices.
        moment2: The second-moment method.
    """
    full = state.get(_V)
    if full is None or full.shape != p.shape:
        return state
    firsts = await together(_first(full, p, matrix, moment2) for matrix in matrices)
    state = {key: value for key, value in state.items() if key != _V}
    for key, dims in buffer_dims(p, matrices, moment2).items():
        if key.startswith(_V):
            state[key] = full.new_zeros(buffer_shape(p, dims))
    for matrix, first in zip(matrices, firsts, strict=True):
        dims = _dims(p, matrix, moment2)
        buffer = state[buffer_key(matrix, dims)]
        if -2 in dims:
            buffer[..., matrix.rows, :] = first
        else:
            buffer.copy_(first.view_as(buffer))
    return state


def _dims(p: torch.Tensor, matrix: Matrix, moment2: Moment2) -> tuple[int, ...]:
    """Along which dimensions V of a matrix has entries of its own."""
    return moment2.dims(*matrix.layout.shape(matrix.of(p)))


async def _first(full: torch.Tensor, p: torch.Tensor, matrix: Matrix, moment2: Moment2) -> torch.Tensor:
    """V of a matrix: the first entry along each dimension along which V is the same."""
    part, same = matrix.of(full), [dim for dim in (-2, -1) if dim not in _dims(p, matrix, moment2)]
    if not same:
        return part
    return await matrix.layout.first(part, None if len(same) == 2 else same[0])
