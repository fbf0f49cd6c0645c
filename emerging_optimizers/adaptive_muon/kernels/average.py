# SPDX-License-Identifier: Apache-2.0
"""Triton kernel: the momentum of many matrices, and the sums of squares of gradient and momentum, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from emerging_optimizers.adaptive_muon.kernels.addresses import addresses_of, at
from emerging_optimizers.adaptive_muon.kernels.launch import are_aligned, launch
from emerging_optimizers.adaptive_muon.kernels.noise import rounded
from emerging_optimizers.adaptive_muon.noise import Noise


__all__ = ["average_on_cuda"]

_ROWS, _COLUMNS = 32, 128


@triton.jit
def _lerp(start, end, weight):
    """Return what torch.lerp returns, which goes from the nearer end."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1 - weight))


@triton.jit
def average_kernel(
    gradients, buffers, momentum_out, G_sums, M_sums, keys,
    rows, columns, tiles_down, tiles_across, G_row, M_row, weight, momentum, members, top, left,
    G_TYPE: tl.constexpr, M_TYPE: tl.constexpr, ALIGNED: tl.constexpr, NESTEROV: tl.constexpr, SUMMED: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Work on one tile of one matrix. SUMMED is the tile's dimension that sums of squares add up: 0, 1, 2 for both."""
    program = tl.program_id(0).to(tl.int64)
    tile = program % (tiles_down * tiles_across)
    member = program // (tiles_down * tiles_across)
    down, across = tile // tiles_across, tile % tiles_across
    row, column = down * ROWS + tl.arange(0, ROWS), across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]

    gradient = at(gradients, member, G_TYPE, ALIGNED)
    buffer = at(buffers, member, M_TYPE, ALIGNED)
    G = tl.load(gradient + row[:, None] * G_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    places = buffer + row[:, None] * M_row + column[None, :]
    M = _lerp(tl.load(places, mask=inside, other=0.0).to(tl.float32), G, weight)
    stored = M
    if STOCHASTIC:
        stored = rounded(M, keys, members, member, (row + top)[:, None], (column + left)[None, :])
    tl.store(places, stored.to(M_TYPE), mask=inside)
    if NESTEROV:
        M = _lerp(G, M, momentum)
    tl.store(momentum_out + (member * rows + row[:, None]) * columns + column[None, :], M, mask=inside)

    if SUMMED == 0:
        place = (member * tiles_down + down) * columns + column
        tl.store(G_sums + place, tl.sum(G * G, 0), mask=column < columns)
        tl.store(M_sums + place, tl.sum(M * M, 0), mask=column < columns)
    elif SUMMED == 1:
        place = (member * tiles_across + across) * rows + row
        tl.store(G_sums + place, tl.sum(G * G, 1), mask=row < rows)
        tl.store(M_sums + place, tl.sum(M * M, 1), mask=row < rows)
    elif SUMMED == 2:
        tl.store(G_sums + program, tl.sum(G * G))
        tl.store(M_sums + program, tl.sum(M * M))


def average_on_cuda(
    Ms: Sequence[torch.Tensor],
    Gs: Sequence[torch.Tensor],
    *,
    momentum: float,
    nesterov: bool,
    kept_dims: tuple[int, ...] | None,
    noise: Noise | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Average gradients into momentum buffers in place. The arguments are those of ``passes.average``, as is the result.

    Args:
        Ms: Momentum buffers of one shape, float32, or bfloat16 with noise; the columns and the dimensions of a stack are contiguous.
        Gs: Their gradients, likewise, in any floating dtype.
        momentum: Decay rate of the momentum.
        nesterov: Whether the momentum looks ahead.
        kept_dims: The dimensions, at most one of -2 and -1, that sums of squares keep; None for no sums.
        noise: With which bfloat16 momentum buffers are rounded.
    """
    first, (*lead, rows, columns) = Ms[0], Ms[0].shape
    members = len(Ms) * first.shape[:-2].numel()
    down, across = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)
    M_prime = first.new_empty((len(Ms), *lead, rows, columns), dtype=torch.float32)
    # For each case: what SUMMED is, the shape of the tiles' sums, and that of the matrices' sums.
    cases: dict[Any, Any] = {
        None: (-1, (0,), ()),
        (): (2, (members, down * across, 1), (1, 1)),
        (-1,): (0, (members, down, columns), (1, columns)),
        (-2,): (1, (members, across, rows), (rows, 1)),
    }
    summed, partial, result = cases[kept_dims]
    both = M_prime.new_empty((2, *partial))
    G_sums, M_sums = both.unbind(0)
    gradients, buffers = addresses_of(Gs), addresses_of(Ms)
    constants = {
        "G_TYPE": triton_type(Gs[0].dtype),
        "M_TYPE": triton_type(first.dtype),
        "ALIGNED": gradients.aligned and buffers.aligned,
        "NESTEROV": nesterov,
        "SUMMED": summed,
        "STOCHASTIC": noise is not None,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
    }
    keys, place = (buffers.table, (0, 0)) if noise is None else (noise.keys, (noise.top, noise.left))
    strides = (Gs[0].stride(-2), first.stride(-2))
    launch(
        average_kernel,
        (members, rows, columns, strides, place, are_aligned(keys), *constants.values()),
        members * down * across,
        (
            *(gradients.table, buffers.table, M_prime, G_sums, M_sums, keys),
            *(rows, columns, down, across, *strides, 1.0 - momentum, float(momentum)),
            *(members, *place),
        ),
        constants,
    )
    if kept_dims is None:
        return M_prime, []
    return M_prime, [*both.sum(2).view(2, len(Ms), *lead, *result)]


def triton_type(dtype: torch.dtype) -> Any:
    """Return Triton's name of a floating dtype."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
