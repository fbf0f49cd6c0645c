# SPDX-License-Identifier: Apache-2.0
"""Our Triton kernel: on a GPU where there is one, and everywhere in Triton's interpreter, in a process of its own."""

import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter

from emerging_optimizers.adaptive_muon.orthogonalize import symmetric, symmetric_kernel
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric import symmetric_product
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric_kernel import symmetric_product_on_cuda


BLOCK = 128  # the kernel's tiles; what is in a tile on the diagonal is symmetric only to the rounding


def factors(stack, n, k):
    """A stack of S and T = S' C with a symmetric C, so that S and T differ and S T is symmetric all the same."""
    generator = torch.Generator().manual_seed(n + k)
    S = torch.randn(stack, n, k, generator=generator, dtype=torch.float64) / k**0.5
    C = torch.diag_embed(torch.rand(stack, k, generator=generator, dtype=torch.float64))
    P = torch.randn(stack, n, n, generator=generator, dtype=torch.float64)
    return [each.to(DEVICE, torch.float16) for each in (S, C @ S.mT, P + P.mT)]


@starts_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@runs_kernels
@pytest.mark.parametrize(
    ("stack", "n", "k"), [(1, 64, 64), (2, 150, 70), (3, 129, 33), (1, 256, 320), (2, 400, 64)], ids=str
)
def test_is_the_product(stack, n, k):
    """To the rounding of the result, written everywhere, and symmetric to the last bit."""
    S, T, P = factors(stack, n, k)
    exact, scale = S.double() @ T.double(), torch.finfo(torch.float16).eps
    eye = torch.eye(n, dtype=torch.float64, device=DEVICE)
    for plus, beta, alpha, diagonal in (("in place", 0.5, -2.0, 0.0), (None, 1.0, 1.0, 0.0), (P, 0.5, -2.0, 3.5)):
        out = P.clone() if plus == "in place" else torch.full_like(P, torch.nan)
        symmetric_product_on_cuda(S, T, out if plus == "in place" else plus, out, beta, alpha, diagonal)
        expected = alpha * exact + (0 if plus is None else beta * P.double()) + diagonal * eye
        torch.testing.assert_close(out.double(), expected, atol=2 * scale, rtol=scale)
        assert torch.equal(out[:, BLOCK:, :BLOCK], out[:, :BLOCK, BLOCK:].mT)


@runs_kernels
def test_takes_views():
    """Of any strides, for the factors of tall matrices are transposed."""
    X = torch.randn(2, 100, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    buffer = torch.zeros(2, 2, 90, 90, device=DEVICE, dtype=torch.float16)
    eye = torch.eye(90, device=DEVICE, dtype=torch.float16).expand(2, 90, 90)
    symmetric_product_on_cuda(X.mT, X, eye, buffer[:, 1], 2.0, 0.01)
    expected = 2 * eye.double() + 0.01 * X.mT.double() @ X.double()
    torch.testing.assert_close(buffer[:, 1].double(), expected, atol=2e-3, rtol=1e-3)
    assert not buffer[:, 0].any()


@pytest.mark.parametrize(
    ("batch", "n", "k", "dtype", "usable", "has_plus", "taken"),
    [
        (1, 256, 48, torch.float16, True, True, True),
        (1, 256, 48, torch.bfloat16, True, True, False),
        (1, 256, 48, torch.float32, True, True, False),
        (1, 64, 48, torch.float16, True, True, False),
        (1, 256, 48, torch.float16, False, True, False),
        (1, 264, 48, torch.float16, True, True, False),
        (1, 256, 40, torch.float16, True, True, False),
        (1, 256, 48, torch.float16, True, False, False),
        (66, 256, 48, torch.float16, True, False, False),
        (67, 256, 48, torch.float16, True, False, True),
    ],
    ids=str,
)
def test_is_used_where_it_saves(monkeypatch, batch, n, k, dtype, usable, has_plus, taken):
    """Here the kernel only listens."""
    asked = []
    monkeypatch.setattr(symmetric, "kernels_usable", lambda device: usable)
    monkeypatch.setattr(symmetric_kernel, "symmetric_product_on_cuda", lambda *arguments: asked.append(arguments))
    X, out = torch.ones(batch, n, k, dtype=dtype), torch.zeros(batch, n, n, dtype=dtype)
    symmetric_product(X, X.mT, plus=out.clone() if has_plus else None, out=out)
    assert bool(asked) is taken and bool(out.any()) is not taken


def test_adds_to_the_diagonal_without_the_kernel():
    X, out = torch.randn(2, 5, 8), torch.zeros(2, 5, 5)
    symmetric_product(X, X.mT, alpha=2.0, diagonal=3.0, out=out)
    torch.testing.assert_close(out, 2 * X @ X.mT + 3 * torch.eye(5), atol=1e-5, rtol=1e-5)
