# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for symmetric products of batches of float16 matrices: half of the tiles, each written twice."""

from typing import Any

import torch
import triton
import triton.language as tl


__all__ = ["symmetric_product_on_cuda"]

# Tiles for small matrices, and for those from this many rows on. Nothing else chooses: tiles decide how results are
# rounded, and replicas that found other ones the fastest would drift apart. Not measured yet.
_SMALL = {"BLOCK": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
_LARGE = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_LARGE_FROM = 1024


@triton.jit
def _lower_tiles(
    S, T, plus, out, n, k, alpha, beta,
    S_batch, S_row, S_column, T_batch, T_row, T_column,
    plus_batch, plus_row, plus_column, out_batch, out_row, out_column,
    HAS_PLUS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes one tile on or below the diagonal of one product of the batch, and writes it and its mirror image."""
    tiles = tl.cdiv(n, BLOCK)
    tile_row, tile_column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tile_column > tile_row:
        return
    # Offsets are 64-bit: a matrix may have more than 2^31 elements.
    index = tl.program_id(1).to(tl.int64)
    rows = (tile_row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (tile_column * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows, in_columns = rows < n, columns < n

    lefts = S + index * S_batch + rows[:, None] * S_row + depth[None, :] * S_column
    rights = T + index * T_batch + depth[:, None] * T_row + columns[None, :] * T_column
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        left = tl.load(lefts, mask=in_rows[:, None] & (depth[None, :] < k - start), other=0.0)
        right = tl.load(rights, mask=(depth[:, None] < k - start) & in_columns[None, :], other=0.0)
        total = tl.dot(left, right, total)
        lefts += BLOCK_K * S_column
        rights += BLOCK_K * T_row
    total *= alpha

    inside = in_rows[:, None] & in_columns[None, :]
    if HAS_PLUS:
        added = plus + index * plus_batch + rows[:, None] * plus_row + columns[None, :] * plus_column
        total += beta * tl.load(added, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    out += index * out_batch
    tl.store(out + rows[:, None] * out_row + columns[None, :] * out_column, result, mask=inside)
    if tile_row > tile_column:
        mirrored = out + columns[:, None] * out_row + rows[None, :] * out_column
        tl.store(mirrored, tl.trans(result), mask=in_columns[:, None] & in_rows[None, :])


def symmetric_product_on_cuda(
    S: torch.Tensor, T: torch.Tensor, plus: torch.Tensor | None, out: torch.Tensor, beta: float, alpha: float
) -> None:
    """Compute :math:`\\beta P + \\alpha S T` of float16 matrices of any strides; sums are in float32.

    The arguments are those of :func:`~emerging_optimizers.adaptive_muon.orthogonalize.symmetric.symmetric_product`.
    """
    batch, n, k = S.shape
    added = out if plus is None else plus
    strides = (*S.stride(), *T.stride(), *added.stride(), *out.stride())
    kernel: Any = _lower_tiles  # its compile-time arguments are plain values here
    tiles = _LARGE if n >= _LARGE_FROM else _SMALL
    with torch.cuda.device_of(S):  # Triton starts kernels on the current device
        kernel[triton.cdiv(n, tiles["BLOCK"]) ** 2, batch](
            S, T, added, out, n, k, alpha, beta, *strides, HAS_PLUS=plus is not None, **tiles
        )
