# SPDX-License-Identifier: Apache-2.0
"""How far matrices are from orthogonal, estimated from a few products with vectors.

For a matrix O whose smaller side has m elements, the error is

.. math:: \\|O O^\\top - I\\|_F / \\sqrt{m}

(:math:`O^\\top O` of a tall one): the root mean square of :math:`\\sigma^2 - 1` over its m singular values. With k vectors
q, orthonormal and of random direction, the mean of :math:`\\|(O O^\\top - I) q\\|^2` is an unbiased estimate of its square.
Up to m = k it is exact. Beyond that, the standard error of the square is at most :math:`\\sqrt{2 / k}` of it, where one
singular value makes all of the error, and :math:`\\sqrt{2 / (k m)}` of it where all have about the same share. With k = 8,
the error itself is known to about 25 % at worst, and to 2 % for a matrix of side 512.
"""

from functools import cache

import torch


__all__ = ["error_of", "error_of_gram", "probes"]

_NUMBER = 8  # k


@cache
def probes(side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return orthonormal columns of random direction, shape ``(side, k)``; the same in every process."""
    generator = torch.Generator().manual_seed(20_240_525)
    random = torch.randn(side, min(side, _NUMBER), generator=generator, dtype=torch.float64)
    Q: torch.Tensor = torch.linalg.qr(random).Q
    return Q.to(device, dtype)


def error_of(O: torch.Tensor) -> torch.Tensor:
    """Return the square of the error of whole matrices.

    Args:
        O: Shape ``(..., rows, columns)``.

    Returns:
        Shape ``(..., 1)``, in float32.
    """
    q = probes(min(O.shape[-2:]), O.device, O.dtype)
    # Products with O transposed are taken as those of few rows with O, which a CPU does twice as fast.
    if O.size(-2) <= O.size(-1):
        errors = O @ (q.mT @ O).mT - q
    else:
        errors = ((O @ q).mT @ O).mT - q
    return errors.float().square().sum((-2, -1)).div(q.size(-1)).unsqueeze(-1)


def error_of_gram(
    A: torch.Tensor, factor: tuple[torch.Tensor, float, float], projected: torch.Tensor | None
) -> torch.Tensor:
    """Return the square of the error of matrices Y P, of which only the Gram matrix of Y is known.

    Args:
        A: The Gram matrix :math:`Y^\\top Y`, shape ``(batch, n, n)``.
        factor: A matrix F and numbers f and a with P = f F + a I, which commutes with A.
        projected: Where Y is wide, the product :math:`Y^\\top q` with the probes q of its rows. None where Y is tall.
    """
    F, f, a = factor

    def times_P(x: torch.Tensor) -> torch.Tensor:
        return f * (F @ x) + a * x

    if projected is None:
        q = probes(A.size(-1), A.device, A.dtype)
        errors = (times_P(A @ times_P(q)) - q).float().square()
        return errors.sum((-2, -1)).div(q.size(-1)).unsqueeze(-1)
    u = times_P(projected)  # O^T q
    v = times_P(u)
    squares = (v * (A @ v)).float() - 2 * u.float().square()
    number = projected.size(-1)
    return (squares.sum((-2, -1)) + number).clamp_min(0).div(number).unsqueeze(-1)
