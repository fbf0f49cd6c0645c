# SPDX-License-Identifier: Apache-2.0
"""Our Triton kernel: on a GPU where there is one, and everywhere in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from emerging_optimizers.adaptive_muon.orthogonalize import symmetric, symmetric_kernel
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric import symmetric_product
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric_kernel import symmetric_product_on_cuda


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_the_kernel = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or Triton's interpreter"
)


@pytest.fixture(params=[1, 2**20], ids=["large tiles", "small tiles"])
def _tiles(request, monkeypatch):
    monkeypatch.setattr(symmetric_kernel, "_LARGE_FROM", request.param)


def factors(stack, n, k):
    """A stack of S and T = S' C with a symmetric C, so that S and T differ and S T is symmetric all the same."""
    generator = torch.Generator().manual_seed(n + k)
    S = torch.randn(stack, n, k, generator=generator, dtype=torch.float64) / k**0.5
    C = torch.diag_embed(torch.rand(stack, k, generator=generator, dtype=torch.float64))
    P = torch.randn(stack, n, n, generator=generator, dtype=torch.float64)
    return [each.to(DEVICE, torch.float16) for each in (S, C @ S.mT, P + P.mT)]


@pytest.mark.skipif(INTERPRETED, reason="is what started this process")
def test_in_the_interpreter():
    pytest_ = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        pytest_, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


@runs_the_kernel
@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("stack", "n", "k"), [(1, 64, 64), (2, 150, 70), (3, 129, 33), (1, 256, 300)], ids=str)
def test_is_the_product(stack, n, k):
    """To the rounding of the result, written everywhere, and symmetric to the last bit."""
    S, T, P = factors(stack, n, k)
    exact, scale = S.double() @ T.double(), torch.finfo(torch.float16).eps
    for plus, beta, alpha in (("in place", 0.5, -2.0), (None, 1.0, 1.0), (P, 0.5, -2.0)):
        out = P.clone() if plus == "in place" else torch.full_like(P, torch.nan)
        symmetric_product_on_cuda(S, T, out if plus == "in place" else plus, out, beta, alpha)
        expected = alpha * exact + (0 if plus is None else beta * P.double())
        torch.testing.assert_close(out.double(), expected, atol=2 * scale, rtol=scale)
        block = symmetric_kernel._LARGE["BLOCK"]
        assert torch.equal(out[:, block:, :block], out[:, :block, block:].mT)


@runs_the_kernel
@pytest.mark.usefixtures("_tiles")
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
    ("n", "dtype", "use_syrk", "taken"),
    [
        (256, torch.float16, True, True),
        (256, torch.bfloat16, True, False),
        (256, torch.float32, True, False),
        (64, torch.float16, True, False),
        (256, torch.float16, False, False),
    ],
    ids=str,
)
def test_is_used_where_it_saves(monkeypatch, n, dtype, use_syrk, taken):
    """Here the factors only say that they are on a GPU, and the kernel only listens."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    asked = []
    monkeypatch.setattr(symmetric, "symmetric_product_on_cuda", lambda *arguments: asked.append(arguments))
    X, out = torch.ones(1, n, 8, dtype=dtype).as_subclass(OnGpu), torch.zeros(1, n, n, dtype=dtype)
    symmetric_product(X, X.mT, out=out, use_syrk=use_syrk)
    assert bool(asked) is taken and bool(out.any()) is not taken
