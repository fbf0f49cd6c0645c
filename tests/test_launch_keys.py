# SPDX-License-Identifier: Apache-2.0
"""Launches of a kernel with one key take what Triton compiled for the first of them: it must fit all.

Triton itself says what it would compile for on an H100. No kernel runs.
"""

from itertools import cycle, product

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from emerging_optimizers.adaptive_muon.kernels import addresses, apply, average, normalize
from emerging_optimizers.adaptive_muon.noise import Noise
from emerging_optimizers.adaptive_muon.orthogonalize import symmetric_kernel


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    pytest.skip("Triton 3.2 has other signatures, and its kernels are not used", allow_module_level=True)

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
DTYPES = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1, 1), (1, 16), (16, 1), (16, 16), (16, 32), (33, 129), (5, 300), (3, 16, 48), (1, 4, 7)]
# Where tensors begin in their memory, and how many elements are between rows.
LAYOUTS = [(0, 0), (1, 0), (0, 3), (8, 8), (4, 12)]


@pytest.fixture
def launched(monkeypatch):
    """What Triton compiles for and the number of programs, by kernel and key. Two that differ fail."""
    found = {}

    def launch(kernel, key, programs, arguments, constants, **options):
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        _, signature, _ = bind(*arguments, *constants.values())
        of_launch = programs, signature, dict(constants), options
        assert found.setdefault((kernel, key), of_launch) == of_launch, kernel

    for module in (addresses, apply, average, normalize, symmetric_kernel):
        monkeypatch.setattr(module, "launch", launch)
    return found


def laid_out(shape, dtype, begin, gap):
    """A tensor that begins at an element of its memory, with a gap after each row."""
    *lead, columns = shape
    memory = torch.zeros(begin + torch.Size(lead).numel() * (columns + gap), dtype=dtype)
    return memory[begin:].view(*lead, columns + gap)[..., :columns]


@pytest.mark.parametrize("numbers", [[5, -7], [2**40, 2**40 + 16], [1, 1], [5, 2**47], range(40)], ids=str)
def test_a_table_takes_numbers_of_all_sizes(launched, numbers):
    """Where the momentum is in bfloat16, numbers of 32 bits come first, and then addresses."""
    for each in ([3, 4], numbers):
        addresses.table_of(each, torch.device("cpu"))
    [(_, signature, *_)] = launched.values()
    assert signature == [("*i64", "D"), *[("i64", None)] * 16]


def test_average(launched):
    places, gradients = cycle([(0, 0), (1, 16), (5, 32)]), cycle(LAYOUTS)
    cases = product(SHAPES, DTYPES, LAYOUTS, (False, True), (None, (), (-1,), (-2,)), (True, False))
    for shape, dtype, layout, rounds, kept_dims, nesterov in cases:
        noise = Noise(torch.zeros(2, 2, dtype=torch.int32), *next(places)) if rounds else None
        Ms = [*laid_out((2, *shape), torch.bfloat16 if rounds else torch.float32, *layout)]
        Gs = [*laid_out((2, *shape), dtype, *next(gradients))]
        average.average_on_cuda(Ms, Gs, momentum=0.9, nesterov=nesterov, kept_dims=kept_dims, noise=noise)
    assert len(launched) > 500


def test_apply(launched):
    places, of_O, of_D = cycle([(0, 0), (1, 16), (5, 32)]), cycle(LAYOUTS), cycle([0, 4, 1])
    cases = product(SHAPES, DTYPES, LAYOUTS, ((), (-1,), (-2,), (-2, -1)), (0.0, 0.1, None), (True, False))
    for shape, dtype, layout, kept_dims, decay, cautious in cases:
        noise = Noise(torch.zeros(2, 2, dtype=torch.int32), *next(places)) if dtype == torch.bfloat16 else None
        sizes = [size if dim in kept_dims else 1 for dim, size in zip((-2, -1), shape[-2:], strict=True)]
        D = laid_out((2, *shape[:-2], *sizes), torch.float32, next(of_D), 0)
        share = laid_out(D.shape, torch.float32, next(of_D), 0) if decay is None else decay
        Ws, O = [*laid_out((2, *shape), dtype, *layout)], laid_out((2, *shape), torch.float16, *next(of_O))
        apply.apply_on_cuda(Ws, O, D, lr=0.1, decay=share, cautious=cautious, noise=noise)
    assert len(launched) > 500


def test_divide(launched):
    for (batch, rows, columns), begin, dtype in product(((1, 1, 1), (3, 16, 16), (2, 64, 65)), (0, 1, 4), DTYPES):
        flat, divisors = torch.zeros(begin + batch * rows * columns), torch.ones(begin + batch)
        matrices = flat[begin:].view(batch, rows, columns)
        out = torch.empty(begin + flat.numel(), dtype=dtype)[begin : begin + matrices.numel()].view_as(matrices)
        normalize.divide_on_cuda(matrices, divisors[begin:].view(batch, 1, 1), out)
    assert len(launched) >= 3 * 3 * 2


def test_products(launched):
    sizes = (1, 16, 16), (2, 256, 128), (3, 300, 7), (1, 1, 64)
    for (batch, n, k), layout, of_plus, tall in product(sizes, LAYOUTS, (None, *LAYOUTS), (False, True)):
        X = laid_out((batch, *((k, n) if tall else (n, k))), torch.float16, *layout)
        out = laid_out((batch, n, n), torch.float16, *layout)
        plus = None if of_plus is None else laid_out((batch, n, n), torch.float16, *of_plus)
        symmetric_kernel.symmetric_product_on_cuda(*(X.mT, X) if tall else (X, X.mT), plus, out, 1.0, 0.0)
    assert len(launched) > 100
