# SPDX-License-Identifier: Apache-2.0
"""Triton kernel for symmetric products of batches of float16 matrices: half of the tiles, each written twice."""

from functools import cache

import torch
import triton
import triton.language as tl

from emerging_optimizers.adaptive_muon.kernels.launch import are_aligned, launch
from emerging_optimizers.adaptive_muon.orthogonalize.tiles import TILE, lower_tiles


__all__ = ["symmetric_product_on_cuda"]

# The depth of a tile and the stages, measured on an H100: for left factors with adjacent columns, and for others, which are
# transposed. Nothing but the layout and the kind of GPU may choose: tiles decide how results are rounded, and replicas that
# found other ones the fastest would drift apart.
BY_ROWS = {"BLOCK_K": 64, "num_stages": 3}
BY_COLUMNS = {"BLOCK_K": 32, "num_stages": 4}


@cache
def _warps(device: torch.device) -> int:
    """Return the warps of a tile: as measured on Hopper, elsewhere twice as many, as four have too few registers."""
    return 4 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else 8


@triton.jit
def product_kernel(
    S, T, plus, out, n, k, tiles, alpha, beta, diagonal,
    S_batch, S_row, S_column, T_batch, T_row, T_column,
    plus_batch, plus_row, plus_column, out_batch, out_row, out_column,
    HAS_PLUS: tl.constexpr, EVEN: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute one tile on or below the diagonal of one product of the batch, and write it and its mirror image.

    EVEN is for sizes that are multiples of the tiles', which need no masks. INDEX is the type of an offset in a matrix.
    """
    index, place = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    # Tiles are counted row by row, of 1, 2, 3, ... tiles; the root is off by one at most.
    tile_row = ((tl.sqrt(8.0 * place.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    tile_row = tl.where(tile_row * (tile_row + 1) // 2 > place, tile_row - 1, tile_row)
    tile_row = tl.where((tile_row + 1) * (tile_row + 2) // 2 <= place, tile_row + 1, tile_row)
    tile_column = place - tile_row * (tile_row + 1) // 2
    index = index.to(tl.int64)
    rows = (tile_row * BLOCK + tl.arange(0, BLOCK)).to(INDEX)
    columns = (tile_column * BLOCK + tl.arange(0, BLOCK)).to(INDEX)
    depth = tl.arange(0, BLOCK_K).to(INDEX)
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
    tiles = BY_ROWS if S.stride(2) == 1 else BY_COLUMNS
    lower = lower_tiles(n)
    strides = (*S.stride(), *T.stride(), *added.stride(), *out.stride())
    # The farthest element of a matrix that a row or column beyond its end would be at.
    farthest = max(n * max(S.stride(1), T.stride(2)) + k * max(S.stride(2), T.stride(1)), n * n)
    launch(
        product_kernel,
        (S.shape, strides, plus is None, are_aligned(S, T, added, out)),
        lower * batch,
        (S, T, added, out, n, k, lower, float(alpha), float(beta), float(diagonal), *strides),
        {
            "HAS_PLUS": plus is not None,
            "EVEN": n % TILE == 0 and k % tiles["BLOCK_K"] == 0,
            "INDEX": tl.int32 if farthest < 2**30 else tl.int64,
            "BLOCK": TILE,
            "BLOCK_K": tiles["BLOCK_K"],
        },
        num_warps=_warps(S.device),
        num_stages=tiles["num_stages"],
    )
