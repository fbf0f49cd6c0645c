# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for symmetric products of batches of float16 matrices: half of the tiles, each written twice."""

from typing import Any

import torch
import triton
import triton.language as tl


__all__ = ["symmetric_product_on_cuda"]

# The tiles: rows and columns of a tile, depth of a step. Nothing but the shape may choose others: tiles decide how results
# are rounded, and replicas that found other ones the fastest would drift apart.
_TILES = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _lower_tiles(
    S, T, plus, out, n, k, tiles, alpha, beta, diagonal,
    S_batch, S_row, S_column, T_batch, T_row, T_column,
    plus_batch, plus_row, plus_column, out_batch, out_row, out_column,
    HAS_PLUS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes one tile on or below the diagonal of one product of the batch, and writes it and its mirror image.

    EVEN is for sizes that are multiples of the tiles', which need no masks.
    """
    index, place = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    # Tiles are counted row by row, of 1, 2, 3, ... tiles; the root is off by one at most.
    tile_row = ((tl.sqrt(8.0 * place.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    tile_row = tl.where(tile_row * (tile_row + 1) // 2 > place, tile_row - 1, tile_row)
    tile_row = tl.where((tile_row + 1) * (tile_row + 2) // 2 <= place, tile_row + 1, tile_row)
    tile_column = place - tile_row * (tile_row + 1) // 2
    # Offsets are 64-bit where a matrix may have more than 2^31 elements.
    index = index.to(tl.int64)
    rows = (tile_row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (tile_column * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows, in_columns = rows < n, columns < n

    lefts = S + index * S_batch + rows[:, None] * S_row + depth[None, :] * S_column
    rights = T + index * T_batch + depth[:, None] * T_row + columns[None, :] * T_column
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN:
            left, right = tl.load(lefts), tl.load(rights)
        else:
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
    total += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
    result = total.to(out.dtype.element_ty)
    out += index * out_batch
    tl.store(out + rows[:, None] * out_row + columns[None, :] * out_column, result, mask=inside)
    if tile_row > tile_column:
        mirrored = out + columns[:, None] * out_row + rows[None, :] * out_column
        tl.store(mirrored, tl.trans(result), mask=in_columns[:, None] & in_rows[None, :])


def symmetric_product_on_cuda(
    S: torch.Tensor,
    T: torch.Tensor,
    plus: torch.Tensor | None,
    out: torch.Tensor,
    beta: float,
    alpha: float,
    diagonal: float = 0.0,
) -> None:
    """Compute :math:`\\beta P + \\alpha S T + d I` of float16 matrices of any strides; sums are in float32.

    The arguments are those of :func:`~emerging_optimizers.adaptive_muon.orthogonalize.symmetric.symmetric_product`.
    """
    batch, n, k = S.shape
    added = out if plus is None else plus
    strides = (*S.stride(), *T.stride(), *added.stride(), *out.stride())
    kernel: Any = _lower_tiles  # its compile-time arguments are plain values here
    across = triton.cdiv(n, _TILES["BLOCK"])
    tiles = across * (across + 1) // 2
    even = n % _TILES["BLOCK"] == 0 and k % _TILES["BLOCK_K"] == 0
    with torch.cuda.device_of(S):  # Triton starts kernels on the current device
        kernel[(tiles * batch,)](
            S, T, added, out, n, k, tiles, alpha, beta, diagonal, *strides,
            HAS_PLUS=plus is not None, EVEN=even, **_TILES,
        )  # fmt: skip
