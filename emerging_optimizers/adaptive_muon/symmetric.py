# SPDX-License-Identifier: Apache-2.0
"""Products that are known to be symmetric: half of such a product says it all."""

import torch

from emerging_optimizers.adaptive_muon.symmetric_kernel import symmetric_product_on_cuda


__all__ = ["symmetric_product"]

# A CPU gains from this many rows on, down to blocks of this many (measured on two cores).
_CPU_FROM = 384
_CPU_LEAST = 192
# The kernel saves nothing where a tile or two, of up to 128 rows, are all there is.
_KERNEL_FROM = 256


def symmetric_product(
    S: torch.Tensor,
    T: torch.Tensor,
    *,
    out: torch.Tensor,
    plus: torch.Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    use_syrk: bool = False,
) -> None:
    """Computes :math:`\\beta P + \\alpha S T`, where that is symmetric.

    Args:
        S: Left factors, shape ``(stack, n, k)``.
        T: Right factors, shape ``(stack, k, n)``.
        out: Takes the result, shape ``(stack, n, n)``; it may be P, but none of the factors. Where half
            of it was computed and mirrored it is symmetric to the last bit.
        plus: P, symmetric, shape ``(stack, n, n)``; None for zero.
        beta: Factor on P.
        alpha: Factor on the product.
        use_syrk: Whether to use our Triton kernel for float16 on CUDA.
    """
    if use_syrk and S.is_cuda and S.dtype == torch.float16 and S.size(-2) >= _KERNEL_FROM:
        symmetric_product_on_cuda(S, T, plus, out, beta, alpha)
        return
    plus, beta = (out, 0.0) if plus is None else (plus, beta)  # torch does not read what has the factor zero
    if S.device.type == "cpu" and S.size(-2) >= _CPU_FROM:
        for each in zip(*(torch.split(stack, 1) for stack in (S, T, plus, out)), strict=True):
            S, T, plus, out = each
            _in_halves(S, T, plus, out, beta, alpha)
    else:
        torch.baddbmm(plus, S, T, beta=beta, alpha=alpha, out=out)


def _in_halves(
    S: torch.Tensor, T: torch.Tensor, plus: torch.Tensor, out: torch.Tensor, beta: float, alpha: float
) -> None:
    """Computes the lower left quarter, mirrors it, and goes on with the two quarters on the diagonal as a stack."""
    n = S.size(-2)
    if n < 2 * _CPU_LEAST or n % 2:
        out.copy_(torch.baddbmm(plus, S, T, beta=beta, alpha=alpha))  # a result in pieces would not be batched
        return
    lower, upper = slice(n // 2, n), slice(n // 2)
    quarter = torch.baddbmm(plus[:, lower, upper], S[:, lower], T[:, :, upper], beta=beta, alpha=alpha)
    out[:, lower, upper] = quarter
    out[:, upper, lower] = quarter.mT
    _in_halves(_halved(S, 1), _halved(T, 2), _on_diagonal(plus), _on_diagonal(out), beta, alpha)


def _halved(stack: torch.Tensor, dim: int) -> torch.Tensor:
    """The halves of matrices along a dimension, as a stack of twice as many: a view."""
    return torch.unflatten(stack, dim, (2, -1)).movedim(dim, 1).flatten(0, 1)


def _on_diagonal(stack: torch.Tensor) -> torch.Tensor:
    """The quarters on the diagonals of matrices, as a stack of twice as many: a view."""
    quarters = torch.unflatten(torch.unflatten(stack, 2, (2, -1)), 1, (2, -1))
    return quarters.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
