# SPDX-License-Identifier: Apache-2.0
"""Optimizer state for checkpoints that store one shape per parameter: V expanded to it, and reduced again.

Expanded, every element of ``moment2_buffer`` is the V that holds for that element of the parameter, whatever the method
and the blocks. A checkpoint may cut and join it as it does the parameter, and V can be reduced from the shards.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.parameters import work_dtype
from emerging_optimizers.adaptive_muon.sharding.agreement import sum_over
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout, kept_shape
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, merge_blocks
from emerging_optimizers.adaptive_muon.state.buffers import StateFormat, v_key


__all__ = ["expand_v", "reduce_v"]

_V = "moment2_buffer"


def expand_v(state: dict[str, Any], p: torch.Tensor, state_format: StateFormat) -> dict[str, Any]:
    """Return a copy of a parameter's state with V as one tensor in the shape of ``p``: a view of V where possible."""
    matrices, parts = state_format.sharding.matrices(p), []
    for matrix in matrices:
        like, kept = matrix.of(p), state_format.kept_dims(p, matrix)
        V = state[v_key(matrix, kept)]
        V = matrix.of(V) if len(kept) == 2 else matrix.layout.cut(V if kept else V.unsqueeze(-1), kept)
        parts.append(V.expand_as(like))
    others = {key: value for key, value in state.items() if not key.startswith(_V)}
    return {**others, _V: merge_blocks(matrices, parts, p.shape)}


def reduce_v(
    states: Sequence[dict[str, Any]], params: Sequence[torch.Tensor], state_format: StateFormat
) -> list[dict[str, Any]]:
    """Return copies of parameters' states with V in the method's own buffers; a state that has them is returned itself.

    All ranks that hold shards must call: entries of V that only other ranks have arrive in one all-reduce per group.
    """
    reduced = list(states)
    vectors: dict[ProcessGroup | None, dict[tuple[int, str], torch.Tensor]] = {}
    for index, (state, p) in enumerate(zip(states, params, strict=True)):
        full = _in_full_shape(state, p, state_format)
        if full is not None and full is state.get(_V):
            reduced[index] = {key: value for key, value in state.items() if key != _V}
        for matrix in state_format.sharding.matrices(p):
            kept, layout = state_format.kept_dims(p, matrix), matrix.layout
            if len(kept) < 2:
                # On a rank whose shard has V's own shape, nobody can tell whether V is expanded. So all ranks add up V.
                vectors.setdefault(layout.sums_over, {})[index, v_key(matrix, kept)] = _entries(full, p, matrix, kept)
            elif reduced[index] is not state:
                reduced[index][_V] = full
    for group, by_key in vectors.items():
        Vs = list(by_key.values()) if group is None else sum_over(group, list(by_key.values()))
        for (index, key), V in zip(by_key, Vs, strict=True):
            if reduced[index] is not states[index]:
                reduced[index][key] = V.reshape(state_format.buffers(params[index])[key].local)
    return reduced


def _in_full_shape(state: dict[str, Any], p: torch.Tensor, state_format: StateFormat) -> torch.Tensor | None:
    """Return V of a state in the shape of a parameter, whichever form it has; None where it fits neither."""
    V: torch.Tensor | None = state.get(_V)
    if V is not None and V.shape == p.shape:
        return V
    own = {key: buffer.local for key, buffer in state_format.buffers(p).items() if key.startswith(_V)}
    fits = all(key in state and state[key].shape == shape for key, shape in own.items())
    V = expand_v(state, p, state_format)[_V] if fits else None
    return V


def _entries(full: torch.Tensor | None, p: torch.Tensor, matrix: Matrix, kept: tuple[int, ...]) -> torch.Tensor:
    """Return the entries of V that this rank counts, those of the matrix's first row or column, and else zeros."""
    layout = matrix.layout
    V = p.new_zeros((*p.shape[:-2], *kept_shape(matrix.shape(p), kept)), dtype=work_dtype(p))
    is_first = not isinstance(layout, ShardedLayout) or (
        layout.own.area
        and (layout.is_first_replica or not layout.is_split)
        and (-2 in kept or layout.own.top == 0)
        and (-1 in kept or layout.own.left == 0)
    )
    if full is not None and is_first:
        first = matrix.of(full)[..., slice(None) if -2 in kept else slice(1), slice(None) if -1 in kept else slice(1)]
        layout.cut(V, kept).copy_(first)
    return V
