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
from emerging_optimizers.adaptive_muon.noise import Noise, round_into
from emerging_optimizers.adaptive_muon.rounding import make_keys


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
@pytest.mark.parametrize("decay", [0.0, 0.1, "tensor", "one tensor", "cautious"])
@pytest.mark.parametrize(
    ("W_dtype", "O_dtype"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.float16), (torch.float16, torch.float32)],
    ids=str,
)
def test_apply(shape, kind, decay, W_dtype, O_dtype):
    Ws, D = tensors(3, shape, W_dtype, rows_between=2), scales(kind, 3, shape)
    O, cautious = torch.stack(tensors(3, shape, O_dtype, seed=2)), decay == "cautious"
    if cautious:
        decay = 0.1 if kind == "matrix" else torch.full((1,) * D.ndim, 0.1, device=DEVICE)
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


def noise(number, shape, **place):
    """The noise for a batch of shards that begin at a place."""
    prefixes, steps = [(0, i, 0) for i in range(number)], [torch.tensor(1.0)] * number
    keys = make_keys(prefixes, steps, torch.device(DEVICE), steps_on_device=False)
    for experts in shape[:-2]:
        keys = keys[..., None] + torch.arange(experts, dtype=torch.int32, device=DEVICE)
    return Noise(keys, **place)


@runs_kernels
@pytest.mark.parametrize("place", [{}, {"top": 5, "left": 300}, {"top": 1, "left": 16}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stochastic_rounding_has_the_bits_of_torchs(shape, place):
    """Where no product and no sum is rounded: the numbers have few bits. NaN and the largest numbers are among them."""
    Ws, D = tensors(3, shape, torch.bfloat16, rows_between=2), torch.ones(3, *[1] * len(shape), device=DEVICE)
    O = torch.stack(tensors(3, shape, seed=2)).mul_(2**18).round_().div_(2**30)
    largest = torch.finfo(torch.bfloat16).max
    for W, extreme in zip(Ws, (torch.nan, largest, -largest), strict=True):
        W.clamp_(0.5, 1)[..., -1, -1] = extreme
    expected = [W.clone() for W in Ws]
    worked = [W.float() - each for W, each in zip(Ws, O, strict=True)]
    round_into(expected, worked, noise(3, shape, **place))
    apply_on_cuda(Ws, O, D, lr=1.0, decay=0.0, noise=noise(3, shape, **place))
    for W, expected_W in zip(Ws, expected, strict=True):
        torch.testing.assert_close(W, expected_W, atol=0, rtol=0, equal_nan=True)


@runs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept_dims", [None, (-1,)], ids=str)
def test_a_momentum_in_bfloat16(shape, kept_dims):
    """M' and the sums are made of the average in float32, whose rounding has the bits of torch's: all have few bits."""
    Ms = [M.clamp(0.5, 1) for M in tensors(3, shape, torch.bfloat16, rows_between=1)]
    Gs = [M.float() + G.mul(2**8).round().div(2**18) for M, G in zip(Ms, tensors(3, shape, seed=1), strict=True)]
    place = {"top": 3, "left": 8}
    expected_Ms = [M.clone() for M in Ms]
    worked = [M.float().lerp(G, 0.25) for M, G in zip(Ms, Gs, strict=True)]
    round_into(expected_Ms, worked, noise(3, shape, **place))
    options = {"momentum": 0.75, "nesterov": True, "kept_dims": kept_dims, "noise": noise(3, shape, **place)}
    M_prime, sums = average_on_cuda(Ms, Gs, **options)
    expected = torch.stack([G.lerp(M, 0.75) for M, G in zip(worked, Gs, strict=True)])
    torch.testing.assert_close(M_prime, expected, atol=1e-6, rtol=1e-6)
    assert len(sums) == (0 if kept_dims is None else 2)
    assert all(torch.equal(M, of_torch) for M, of_torch in zip(Ms, expected_Ms, strict=True))


@runs_kernels
@pytest.mark.parametrize("shape", [(3, 40, 50), (1, 64, 128), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_divide(shape, dtype):
    """To the last bit."""
    [matrices], [divisors] = tensors(1, shape), tensors(1, (shape[0], 1, 1), seed=3)
    out = torch.full_like(matrices, torch.nan, dtype=dtype)
    divide_on_cuda(matrices, divisors, out)
    assert torch.equal(out, (matrices / divisors).to(dtype))


@runs_kernels
@pytest.mark.parametrize("dim", [0, 1])
def test_an_expanded_gradient(dim):
    """Of which all rows are one, or all columns: the first has no distance between rows."""
    [row], [M] = tensors(1, (1, 48) if dim == 0 else (40, 1), seed=1), tensors(1, (40, 48))
    Gs, expected = [row.expand(40, 48)], M.clone().lerp(row, 0.1)
    M_prime, _ = passes.average([M], Gs, momentum=0.9, nesterov=False, kept_dims=(), observed=())
    torch.testing.assert_close(M, expected, atol=1e-6, rtol=1e-6)
    if dim == 0:
        average_on_cuda([M], Gs, momentum=0.9, nesterov=False, kept_dims=None)
        torch.testing.assert_close(M, expected.lerp(row, 0.1), atol=1e-6, rtol=1e-6)
