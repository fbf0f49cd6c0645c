# SPDX-License-Identifier: Apache-2.0
"""Triton kernel: weight decay and update of many weights in one pass."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from emerging_optimizers.adaptive_muon.kernels.addresses import addresses_of, at
from emerging_optimizers.adaptive_muon.kernels.average import triton_type
from emerging_optimizers.adaptive_muon.kernels.launch import are_aligned, launch
from emerging_optimizers.adaptive_muon.kernels.noise import rounded
from emerging_optimizers.adaptive_muon.noise import Noise


__all__ = ["apply_on_cuda"]

_ROWS, _COLUMNS = 16, 256


@triton.jit
def _broadcast(start, row, column, row_stride, inside, COLUMN_STRIDE: tl.constexpr):
    """Load a tile of what is broadcast to a matrix: of one column where its columns are. The rows must exist."""
    if COLUMN_STRIDE == 0:
        loaded = tl.load(start + row * row_stride)
    else:
        loaded = tl.load(start + row * row_stride + column * COLUMN_STRIDE, mask=inside, other=0.0)
    return loaded


@triton.jit
def apply_kernel(
    weights, O, D, decays, keys,
    rows, columns, tiles_down, tiles_across, W_row, O_member, O_row, D_member, D_row, decay_member, decay_row, lr, decay,
    members, top, left,
    W_TYPE: tl.constexpr, ALIGNED: tl.constexpr, O_COLUMN: tl.constexpr, D_COLUMN: tl.constexpr,
    DECAY_COLUMN: tl.constexpr, HAS_DECAYS: tl.constexpr, CAUTIOUS: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Work on one tile of one matrix."""
    program = tl.program_id(0).to(tl.int64)
    tile = program % (tiles_down * tiles_across)
    member = program // (tiles_down * tiles_across)
    row = (tile // tiles_across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % tiles_across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    places = at(weights, member, W_TYPE, ALIGNED) + row * W_row + column
    W = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    existing = tl.minimum(row, rows - 1)
    o = tl.load(O + member * O_member + row * O_row + column * O_COLUMN, mask=inside, other=0.0).to(tl.float32)
    d = _broadcast(D + member * D_member, existing, column, D_row, inside, D_COLUMN)
    decaying = W
    if CAUTIOUS:
        decaying = tl.where(((o * d >= 0) & (W >= 0)) | ((o * d <= 0) & (W <= 0)), W, 0.0)
    if HAS_DECAYS:
        W -= _broadcast(decays + member * decay_member, existing, column, decay_row, inside, DECAY_COLUMN) * decaying
    else:
        W -= decay * decaying
    W -= lr * (o * d)
    if STOCHASTIC:
        W = rounded(W, keys, members, member, row + top, column + left)
    tl.store(places, W.to(W_TYPE), mask=inside)


def apply_on_cuda(
    Ws: Sequence[torch.Tensor],
    O: torch.Tensor,
    D: torch.Tensor,
    *,
    lr: float,
    decay: float | torch.Tensor,
    cautious: bool = False,
    noise: Noise | None = None,
) -> None:
    """Decay and update weights in place. The arguments are those of ``passes.apply``.

    Args:
        Ws: Weights of one shape, in any floating dtype; the columns and the dimensions of a stack are contiguous.
        O: Orthogonalized momentum, shape ``(weights, ..., rows, columns)``, any floating dtype.
        D: Adaptive scale, float32, broadcastable to O.
        lr: Learning rate.
        decay: The share of itself that a weight loses; a tensor like D, or a number.
        cautious: Whether elements are spared that the update moves away from zero.
        noise: With which bfloat16 weights are rounded; None to round to nearest.
    """
    first, (rows, columns) = Ws[0], Ws[0].shape[-2:]
    lead, members = O.shape[:-2], O.shape[:-2].numel()
    down, across = triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        """Return one matrix after the other, with strides of zero where the tensor is broadcast."""
        stacked = tensor.expand(*lead, *tensor.shape[-2:]).flatten(0, -3)
        return stacked.expand(members, rows, columns)

    O, D = flat(O), flat(D)
    share = flat(decay) if isinstance(decay, torch.Tensor) else D
    weights = addresses_of(Ws)
    constants = {
        "W_TYPE": triton_type(first.dtype),
        "ALIGNED": weights.aligned,
        "O_COLUMN": O.stride(2),
        "D_COLUMN": D.stride(2),
        "DECAY_COLUMN": share.stride(2),
        "HAS_DECAYS": isinstance(decay, torch.Tensor),
        "CAUTIOUS": cautious,
        "STOCHASTIC": noise is not None,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
    }
    keys, place = (weights.table, (0, 0)) if noise is None else (noise.keys, (noise.top, noise.left))
    strides = (first.stride(-2), *O.stride()[:2], *D.stride()[:2], *share.stride()[:2])
    launch(
        apply_kernel,
        (O.shape, O.dtype, strides, place, are_aligned(O, D, share, keys), *constants.values()),
        members * down * across,
        (
            *(weights.table, O, D, share, keys, rows, columns, down, across, *strides),
            *(float(lr), 0.0 if isinstance(decay, torch.Tensor) else float(decay), members, *place),
        ),
        constants,
    )
