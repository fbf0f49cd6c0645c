# SPDX-License-Identifier: Apache-2.0
"""Products that are known to be symmetric, of which half need not be computed."""

from collections.abc import Sequence

import torch

from emerging_optimizers.adaptive_muon.kernels.usable import kernels_usable
from emerging_optimizers.adaptive_muon.orthogonalize import cpu
from emerging_optimizers.adaptive_muon.orthogonalize.tiles import lower_tiles


__all__ = ["symmetric_product"]

# A CPU gains from this many rows on, down to squares of this many (measured on two cores).
_CPU_FROM = 384
_CPU_LEAST = 192
# The kernel takes multiples of these sizes, and saves nothing on fewer rows, which are a tile or two. A product without P
# must have this many tiles of the kernel to keep a GPU's multiprocessors busy; cuBLAS has smaller ones. With P cuBLAS
# copies it first. Measured on an H100: benchmarks/results/gpu-fast.json.
_KERNEL_MULTIPLE = 16
_KERNEL_FROM = 256
_KERNEL_TILES = 200


def symmetric_product(
    S: torch.Tensor,
    T: torch.Tensor,
    *,
    out: torch.Tensor,
    plus: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    diagonal: float = 0.0,
) -> None:
    """Compute :math:`\\beta P + \\alpha S T + d I`, where that is symmetric.

    Args:
        S: Left factors, shape ``(batch, n, k)``.
        T: Right factors, shape ``(batch, k, n)``.
        out: Takes the result, shape ``(batch, n, n)``; it may be P, but none of the factors.
        plus: P, symmetric, shape ``(batch, n, n)``; None for zero.
        beta: Factor on P.
        alpha: Factor on the product.
        diagonal: d, which is added to the diagonal.
    """
    if S.dtype == torch.float16 and _kernel_pays(S.shape, plus is not None) and kernels_usable(S.device):
        from emerging_optimizers.adaptive_muon.orthogonalize.symmetric_kernel import symmetric_product_on_cuda

        symmetric_product_on_cuda(S, T, plus, out, beta, alpha, diagonal)
        return
    plus, beta = (out, 0.0) if plus is None else (plus, beta)  # torch does not read what has the factor zero
    if S.device.type == "cpu" and S.size(-2) >= _CPU_FROM and not (S.dtype == torch.bfloat16 and cpu.has_tiles()):
        for one_product in zip(S, T, plus, out, strict=True):
            _in_halves(*one_product, beta, alpha)
    else:
        torch.baddbmm(plus, S, T, beta=beta, alpha=alpha, out=out)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)


def _kernel_pays(shape: Sequence[int], has_plus: bool) -> bool:
    """Return whether the Triton kernel takes left factors of a shape, and is faster than cuBLAS."""
    batch, n, k = shape
    if n < _KERNEL_FROM or n % _KERNEL_MULTIPLE or k % _KERNEL_MULTIPLE:
        return False
    return has_plus or batch * lower_tiles(n) >= _KERNEL_TILES


def _in_halves(
    S: torch.Tensor, T: torch.Tensor, plus: torch.Tensor, out: torch.Tensor, beta: float, alpha: float
) -> None:
    """Compute a product of two matrices by squares on its diagonal.

    The first square is the product itself. The lower left quarter of every square is computed, all in one batch, and
    mirrored. That leaves two squares of half the size, and so on, until they are small enough to be computed whole.
    """
    number, size = 1, S.size(0)

    def compute(size: int, row: int, column: int, into: torch.Tensor) -> None:
        addend = _squares(plus, number, size, row, column)
        left, right = _bands(S, number, size, row), _bands(T.mT, number, size, column).mT
        if number == 1:
            torch.addmm(addend[0], left[0], right[0], beta=beta, alpha=alpha, out=into[0])
        else:  # straight into a view it would not be batched
            into.copy_(torch.baddbmm(addend, left, right, beta=beta, alpha=alpha))

    while size >= 2 * _CPU_LEAST and size % 2 == 0:
        size //= 2
        lower, upper = _squares(out, number, size, size, 0), _squares(out, number, size, 0, size)
        compute(size, size, 0, lower)
        upper.copy_(lower.mT)
        number *= 2
    compute(size, 0, 0, _squares(out, number, size, 0, 0))


def _squares(matrix: torch.Tensor, number: int, size: int, row: int, column: int) -> torch.Tensor:
    """Return squares parallel to the diagonal, evenly spread, the first at this row and column: a view."""
    (r, c), step = matrix.stride(), matrix.size(0) // number
    offset = matrix.storage_offset() + row * r + column * c
    return matrix.as_strided((number, size, size), (step * (r + c), r, c), offset)


def _bands(matrix: torch.Tensor, number: int, size: int, row: int) -> torch.Tensor:
    """Return bands of rows, evenly spread, the first from this row on: a view."""
    (r, c), step = matrix.stride(), matrix.size(0) // number
    return matrix.as_strided((number, size, matrix.size(1)), (step * r, r, c), matrix.storage_offset() + row * r)
