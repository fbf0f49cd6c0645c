# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the two passes over all elements against torch's functions, which run where there is no GPU."""

import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter

from emerging_optimizers.adaptive_muon import passes
from emerging_optimizers.adaptive_muon.kernels.addresses import addresses_of
from emerging_optimizers.adaptive_muon.kernels.apply import apply_on_cuda
from emerging_optimizers.adaptive_muon.kernels.average import average_on_cuda
from emerging_optimizers.adaptive_muon.kernels.normalize import divide_on_cuda


SHAPES = [(32, 128), (33, 129), (5, 300), (70, 3), (1, 1), (3, 40, 50)]
OBSERVED = ("gradient", "momentum")


def tensors(number, shape, dtype=torch.float32, seed=0, rows_between=0):
    """Random tensors, each of which may be the first rows of a larger one."""
    generator = torch.Generator().manual_seed(seed)
    larger = (*shape[:-2], shape[-2] + rows_between, shape[-1])
    made = [torch.randn(larger, generator=generator).to(DEVICE, dtype) for _ in range(number)]
    return [each[..., : shape[-2], :] for each in made]


@starts_the_interpreter
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


@runs_kernels
@pytest.mark.parametrize("number", [1, 15, 16, 17, 40])
def test_addresses(number):
    made = tensors(number, (2, 3, 4))
    for _ in range(2):
        found = addresses_of(made)
        assert found.table.flatten()[: 2 * number].tolist() == [matrix.data_ptr() for each in made for matrix in each]
        assert found.aligned
    assert not addresses_of(tensors(number, (3, 3))).aligned
    assert not addresses_of([each[:, 1:] for each in tensors(number, (4, 4))]).aligned


@runs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept_dims", [None, (), (-1,), (-2,)], ids=str)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.95, True), (0.95, False), (0.3, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_average(shape, kept_dims, momentum, nesterov, dtype):
    """To the last bits, for sums are added in another order; the rows between are left alone."""
    Ms, Gs = tensors(3, shape, rows_between=2), tensors(3, shape, dtype, seed=1, rows_between=1)
    expected_Ms = [M.clone().cpu() for M in Ms]
    before = [M._base.clone() for M in Ms]
    expected, sums = passes.average(
        expected_Ms,
        [G.cpu() for G in Gs],
        momentum=momentum,
        nesterov=nesterov,
        kept_dims=kept_dims or (),
        observed=OBSERVED if kept_dims is not None else (),
    )
    M_prime, found = average_on_cuda(Ms, Gs, momentum=momentum, nesterov=nesterov, kept_dims=kept_dims)
    torch.testing.assert_close(M_prime.cpu(), expected, atol=1e-6, rtol=1e-6)
    assert len(found) == len(sums)
    for M, expected_M, base in zip(Ms, expected_Ms, before, strict=True):
        torch.testing.assert_close(M.cpu(), expected_M, atol=1e-6, rtol=1e-6)
        assert torch.equal(M._base[..., -2:, :], base[..., -2:, :])
    for sum_, expected_sum in zip(found, sums, strict=True):
        torch.testing.assert_close(sum_.cpu(), expected_sum, atol=1e-5, rtol=1e-5)


def scales(kind, number, shape):
    """D of each kind that a method may have."""
    *lead, rows, columns = shape
    sizes = {"matrix": (1, 1), "columns": (1, columns), "rows": (rows, 1), "elements": (rows, columns)}[kind]
    return torch.rand(number, *lead, *sizes, generator=torch.Generator().manual_seed(7)).to(DEVICE) + 0.5


@runs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["matrix", "columns", "rows", "elements"])
@pytest.mark.parametrize("decay", [0.0, 0.1, "tensor", "one tensor"])
@pytest.mark.parametrize(
    ("W_dtype", "O_dtype"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.float16), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("cautious", [False, True], ids=["", "cautious"])
def test_apply(shape, kind, decay, W_dtype, O_dtype, cautious):
    Ws, D = tensors(3, shape, W_dtype, rows_between=2), scales(kind, 3, shape)
    O = torch.stack(tensors(3, shape, O_dtype, seed=2))
    if decay == "tensor":
        decay = 0.1 * D
    elif decay == "one tensor":
        decay = torch.full((1,) * D.ndim, 0.1, device=DEVICE)
    expected, before = [W.clone().cpu() for W in Ws], [W._base.clone() for W in Ws]
    of_torch = decay.cpu() if isinstance(decay, torch.Tensor) else decay
    passes.apply(expected, O.cpu(), D.cpu(), lr=0.3, decay=of_torch, cautious=cautious)
    apply_on_cuda(Ws, O, D, lr=0.3, decay=decay, cautious=cautious)
    scale = torch.finfo(W_dtype).eps
    for W, expected_W, base in zip(Ws, expected, before, strict=True):
        torch.testing.assert_close(W.cpu(), expected_W, atol=2 * scale, rtol=2 * scale)
        assert torch.equal(W._base[..., -2:, :], base[..., -2:, :])


@runs_kernels
def test_apply_takes_an_orthogonalized_momentum_of_any_strides():
    Ws, D = tensors(2, (20, 30)), scales("columns", 2, (20, 30))
    O = torch.stack(tensors(2, (30, 50), torch.float16)).mT[:, 10:30]
    expected = [W.clone().cpu() for W in Ws]
    passes.apply(expected, O.cpu(), D.cpu(), lr=0.3, decay=0.1)
    apply_on_cuda(Ws, O, D, lr=0.3, decay=0.1)
    for W, expected_W in zip(Ws, expected, strict=True):
        torch.testing.assert_close(W.cpu(), expected_W, atol=1e-6, rtol=1e-6)


@runs_kernels
@pytest.mark.parametrize("shape", [(3, 40, 50), (1, 64, 128), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_divide(shape, dtype):
    """To the last bit."""
    [matrices], [divisors] = tensors(1, shape), tensors(1, (shape[0], 1, 1), seed=3)
    out = torch.full_like(matrices, torch.nan, dtype=dtype)
    divide_on_cuda(matrices, divisors, out)
    assert torch.equal(out, (matrices / divisors).to(dtype))
