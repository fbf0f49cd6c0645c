# SPDX-License-Identifier: Apache-2.0
"""The optimizer state of a parameter: which buffers there are, of which shapes, and V of each of its matrices in them.

A parameter that is one matrix has upstream's buffers, ``momentum_buffer`` and ``moment2_buffer``. Where it has blocks,
statistics with an entry a row lie together in ``moment2_buffer``, row by row as the parameter does and sharded as it
is; the others in ``moment2_buffer_0`` for the first block and so on.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from emerging_optimizers.adaptive_muon.moment2 import Moment2
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch
from emerging_optimizers.adaptive_muon.parameters import work_dtype
from emerging_optimizers.adaptive_muon.sharding.dtensor import (
    as_matrices,
    is_transposed,
    local_of,
    placements_like,
    wrapped_like,
)
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix


__all__ = ["MomentAverage", "buffer_dims", "buffer_key", "buffer_shape", "new_buffers"]


def buffer_dims(p: torch.Tensor, matrices: Sequence[Matrix], moment2: Moment2) -> dict[str, tuple[int, ...]]:
    """Returns the names of a parameter's buffers, and along which of its dimensions -2 and -1 each lies as it does.

    Args:
        p: The parameter.
        matrices: Its logical matrices.
        moment2: The second-moment method.
    """
    dims: dict[str, tuple[int, ...]] = {"momentum_buffer": (-2, -1)}
    for matrix in matrices:
        of_moment2 = moment2.dims(*matrix.layout.shape(matrix.of(as_matrices(p))))
        of_p = tuple(-3 - dim for dim in of_moment2) if is_transposed(p) else of_moment2
        dims[buffer_key(matrix, of_moment2)] = of_p
    return dims


def buffer_shape(p: torch.Tensor, dims: Collection[int]) -> tuple[int, ...]:
    """Returns the shape of a buffer of ``p``; of its local piece where ``p`` is one."""
    shape = [*p.shape[:-2], *(p.size(dim) if dim in dims else 1 for dim in (-2, -1))]
    return tuple(shape if dims else shape[:-1])  # upstream's namo keeps (1,) for a matrix


def new_buffers(p: torch.Tensor, matrices: Sequence[Matrix], moment2: Moment2) -> dict[str, torch.Tensor]:
    """Returns a parameter's buffers, all zero: DTensors where they are pieces of something, as the parameter is.

    Args:
        p: The parameter.
        matrices: Its logical matrices.
        moment2: The second-moment method.
    """
    buffers, local = {}, local_of(p)
    for key, dims in buffer_dims(p, matrices, moment2).items():
        # not new_zeros, which gives a subclass of torch.Tensor, as some weights are, its own kind
        buffers[key] = torch.zeros(buffer_shape(local, dims), dtype=work_dtype(p), device=local.device)
        placements = placements_like(p, dims)
        if placements is not None:
            buffers[key] = wrapped_like(p, buffers[key], placements, buffer_shape(p, dims))
    return buffers


@dataclass(frozen=True)
class MomentAverage:
    """V of a stack of matrices: takes a statistic, averages it into V in place and returns V.

    Args:
        params: The parameters of a stack.
        states: Their states.
        matrix: The matrix, of each of them.
        dims: Along which of its rows (-2) and columns (-1) V has entries of its own.
        beta2: Decay rate of V.
    """

    params: Sequence[torch.Tensor]
    states: Sequence[dict[str, torch.Tensor]]
    matrix: Matrix
    dims: tuple[int, ...]
    beta2: float

    def __call__(self, statistic: torch.Tensor) -> torch.Tensor:
        """Returns V, in the shape of ``statistic``, after its update."""
        key, by_row = buffer_key(self.matrix, self.dims), -2 in self.dims
        buffers = [as_matrices(p, state[key]) for p, state in zip(self.params, self.states, strict=True)]
        statistics = statistic.unbind(0)
        averages = [
            (self.matrix.of(buffer) if by_row else buffer).view_as(each)
            for buffer, each in zip(buffers, statistics, strict=True)
        ]
        torch._foreach_lerp_(averages, statistics, 1 - self.beta2)
        if by_row and isinstance(self.matrix.rows, torch.Tensor):
            for buffer, average in zip(buffers, averages, strict=True):
                buffer[..., self.matrix.rows, :] = average  # rows that are not adjacent were a copy
        return as_batch(averages)


def buffer_key(matrix: Matrix, dims: tuple[int, ...]) -> str:
    """Returns the name in the state of the buffer that holds V of a matrix.

    Args:
        matrix: The matrix.
        dims: Along which of its rows (-2) and columns (-1) V has entries of its own.
    """
    return "moment2_buffer" if matrix.block is None or -2 in dims else f"moment2_buffer_{matrix.block}"
