# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz iteration of a whole batch, one step or several steps at once.

One step is :math:`X \\leftarrow (a I + b A + c A^2) X`, with the Gram matrix :math:`A = X X^\\top`. It is a polynomial of A
times X. All polynomials of A commute, so the step turns A into :math:`(a I + B) A (a I + B)` with
:math:`B = b A + c A^2`: the next A needs no product of X's size. Two steps at once are

.. math::
    B_1 = b_1 A + c_1 A^2, \\quad A' = (a_1 I + B_1) A (a_1 I + B_1), \\quad B_2 = b_2 A' + c_2 A'^2, \\quad
    X \\leftarrow (a_2 I + B_2)(a_1 I + B_1) X.

All products but the last are of A's size and symmetric. Where c is zero, B is A times b, and needs no product. The idea,
and that A must be computed from X again after a few steps, is that of Gram Newton-Schulz: Zhang, Amsel, Chen and Dao,
"Gram Newton-Schulz: A Fast, Hardware-Aware Newton-Schulz Algorithm for Muon", 2026,
https://dao-ailab.github.io/blog/2026/gram-newton-schulz/. Every step on A
amplifies what is rounded in A. How many steps :func:`group_steps` takes at once, and the order of the factors in
:func:`iterate`, come from our own measurements: tests/test_newton_schulz.py bounds the error by that of the plain
iteration.
"""

from collections.abc import Iterable, Sequence
from itertools import batched

import torch

from emerging_optimizers.adaptive_muon.kernels.usable import kernels_usable
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric import symmetric_product


__all__ = ["MIN_NORM", "Coefficients", "group_steps", "iterate", "polynomial", "several_steps_pay"]

# (a, b, c) of a step.
Coefficients = tuple[float, float, float]

# A matrix is divided by its norm, but at least by this number. Upstream's default was 1e-7 in 0.3, which stalls the
# iteration on the small gradients after a loss spike is clipped; it is this number since 0.4.
MIN_NORM = 1e-15

# Several steps at once save products from this ratio of a matrix's sides on, see several_steps_pay.
_SEVERAL_FROM = 1.5
# From these short sides on, two steps at once, or the first three, round no more than a few times as much as the plain
# iteration in float32, whose own error grows with the matrix, and in float16 less than the plain iteration in bfloat16.
# tests/test_newton_schulz.py has measured and holds this.
_TWO_FROM, _THREE_FROM = 96, 512


def several_steps_pay(shape: Sequence[int]) -> bool:
    """Return whether several steps at once save products of matrices of a shape, and are exact.

    In units of the short side's cube, with the ratio r of the sides and symmetric products at half their price, a
    further step costs 5 in a group and 3r + 1 by itself; at full price 8 and 4r + 2.
    """
    short, long = sorted(shape[-2:])
    return long >= _SEVERAL_FROM * short and short >= _TWO_FROM


def group_steps(steps: Sequence[Coefficients], short_side: int) -> list[Sequence[Coefficients]]:
    """Return the steps in groups of steps to take at once, for matrices of a short side in float32 or float16."""
    first = 3 if short_side >= _THREE_FROM else 2
    return [steps[:first], *batched(steps[first:], 2)]


def polynomial(
    A: torch.Tensor, b: float, c: float, out: torch.Tensor, diagonal: float = 0.0
) -> tuple[torch.Tensor, float]:
    """Return a matrix F and a factor f with f F = b A + c A^2 + d I: ``out``, or where c and d are zero A itself.

    Args:
        A: A batch of Gram matrices.
        b: Coefficient of A.
        c: Coefficient of A^2.
        out: Takes the result where it is computed.
        diagonal: d, which is added to the diagonal.
    """
    if c == 0.0 == diagonal:
        return A, b
    if c == 0.0:
        torch.mul(A, b, out=out).diagonal(dim1=-2, dim2=-1).add_(diagonal)
    else:
        symmetric_product(A, A, plus=A, beta=b, alpha=c, diagonal=diagonal, out=out)
    return out, 1.0


def iterate(matrices: torch.Tensor, step_groups: Iterable[Sequence[Coefficients]], dtype: torch.dtype) -> torch.Tensor:
    """Return a batch of matrices after the iteration, in its dtype. Each matrix is first divided by its Frobenius norm.

    Args:
        matrices: Shape ``(batch, rows, columns)``, float32.
        step_groups: The steps, in groups of steps to take at once.
        dtype: The dtype to iterate in.
    """
    X = torch.empty_like(matrices, dtype=dtype)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True).clamp_min_(MIN_NORM)
    on_gpu = kernels_usable(X.device)
    if on_gpu and matrices.is_contiguous():
        from emerging_optimizers.adaptive_muon.kernels.normalize import divide_on_cuda

        divide_on_cuda(matrices, norms, X)
    else:
        torch.div(matrices, norms, out=X)
    tall, n, spare = X.size(-2) > X.size(-1), min(X.shape[-2:]), torch.empty_like(X)
    A, B, T, Z = X.new_empty(4, X.size(0), n, n).unbind(0)
    for steps in step_groups:
        symmetric_product(*(X.mT, X) if tall else (X, X.mT), out=A)
        # A single step is B X + a X. On a GPU baddbmm would copy X; a I + B, rounded to bfloat16, would lose too much of B.
        if len(steps) == 1 and (dtype == torch.bfloat16 or not on_gpu):
            [(a, b, c)] = steps
            F, f = polynomial(A, b, c, out=B)
            torch.baddbmm(X, *(X, F) if tall else (F, X), beta=a, alpha=f, out=spare)
            X, spare = spare, X
            continue
        for index, (a, b, c) in enumerate(steps):
            alone, is_last = len(steps) == 1, index + 1 == len(steps)
            F, f = polynomial(A, b, c, out=B, diagonal=a if alone else 0.0)
            if not is_last:
                symmetric_product(F, A, plus=A, beta=a, alpha=f, out=T)
            if F is A:
                A, B = B, A  # F is B from here on
            if not is_last:
                symmetric_product(T, F, plus=T, beta=a, alpha=f, out=A)
            if index:
                # The product is symmetric, but its rounding is not. The later step's factor comes first in what X meets:
                # where X is zero, the earlier steps then do not enlarge what the later step rounds.
                torch.baddbmm(Z, *(Z, F) if tall else (F, Z), beta=a, alpha=f, out=T)
                Z, T = T, Z
            else:
                if f != 1.0:
                    F.mul_(f)
                if not alone:
                    F.diagonal(dim1=-2, dim2=-1).add_(a)
                B, Z = Z, B
        torch.bmm(*(X, Z) if tall else (Z, X), out=spare)
        X, spare = spare, X
    return X
