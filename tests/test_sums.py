# SPDX-License-Identifier: Apache-2.0
"""Sums over the elements of matrices equal those in float64, at sizes that a CPU works on in parts too."""

from collections.abc import Callable

import pytest
import torch

from emerging_optimizers.adaptive_muon.moment2 import sum_of_squared_products, sum_of_squares, sums_of_products
from emerging_optimizers.adaptive_muon.moment2.sums import in_parts


LARGE = (2, 700, 300)
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda matrix: matrix,
    "transposed": lambda matrix: matrix.mT,
    "columns of another": lambda matrix: matrix[..., 1::2],
    "rows of another": lambda matrix: matrix[..., 3:-5, :],
}


def dims(kept: tuple[int, ...]) -> tuple[int, ...]:
    return tuple({-2, -1} - {*kept})


@pytest.mark.parametrize("kept", [(), (-1,), (-2,), (-2, -1)])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [LARGE, (3, 2, 5, 9), (1, 70_000, 1), (1, 1, 70_000)], ids=str)
def test_sums_of_squares(kept: tuple[int, ...], view: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    matrix = VIEWS[view](torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    squares = matrix.double().square()
    expected = squares.sum(dims(kept), keepdim=True) if dims(kept) else squares
    sums = sum_of_squares(matrix, kept, torch.promote_types(dtype, torch.float32))
    assert sums.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-12 if dtype == torch.float64 else 2e-5, atol=0.0)
    # In 16 bit nothing but the result is rounded.
    own = sum_of_squares(matrix, kept)
    assert own.dtype == dtype
    finite = expected.abs() <= torch.finfo(dtype).max
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 2e-5)
    torch.testing.assert_close(own.double()[finite], expected[finite], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [LARGE, (1, 1400, 300), (1, 1, 40, 30), (1400, 300)], ids=str)
def test_sums_of_products(view: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (VIEWS[view](torch.randn(shape, generator=generator)) for _ in range(2))
    one = one.to(dtype)
    pairs = (one, other), (one, one), (other, other)
    for (a, b), total in zip(pairs, sums_of_products((one, other), [(0, 1), (0, 0), (1, 1)]), strict=True):
        expected = (a.double() * b.double()).sum((-2, -1), keepdim=True)
        assert total.shape == expected.shape
        torch.testing.assert_close(total.double(), expected, rtol=1e-5 * (a is b), atol=2e-6 * one.numel() ** 0.5)
    squares = sum_of_squared_products(one, other)
    expected = (one.double() * other.double()).square().sum((-2, -1), keepdim=True)
    torch.testing.assert_close(squares.double(), expected, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("shape", [(2**18, 2**5), (2**13, 2**10)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kept", [(), (-1,), (-2,)])
def test_sums_of_many_elements_lose_nothing(shape: tuple[int, int], transposed: bool, kept: tuple[int, ...]) -> None:
    """A norm of all of them is off by 2.5e-4 here, and one of the long columns by 3e-5."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).unsqueeze(0)
    matrix = matrix.mT if transposed else matrix
    expected = matrix.double().square().sum(dims(kept), keepdim=True)
    torch.testing.assert_close(sum_of_squares(matrix, kept).double(), expected, rtol=2e-6, atol=0.0)


def test_empty_shards_and_numbers_that_are_not_finite() -> None:
    for shape in ((2, 0, 5), (2, 5, 0)):
        for kept in ((), (-1,), (-2,)):
            sums = sum_of_squares(torch.empty(shape), kept)
            assert not sums.any() and sums.shape == torch.empty(shape).sum(dims(kept), keepdim=True).shape
        [total] = sums_of_products([torch.empty(shape)] * 2, [(0, 1)])
        assert total.tolist() == [[[0.0]]] * 2
    matrix = torch.ones(LARGE)
    matrix[0, 0, 0], matrix[1, 5, 7] = torch.inf, torch.nan
    for kept in ((), (-1,), (-2,)):
        sums = sum_of_squares(matrix, kept)
        assert sums[0].isinf().sum() == 1 and sums[1].isnan().sum() == 1


def test_no_temporary_tensor_is_as_large_as_the_matrix() -> None:
    """A part has at most as many elements as are named, and parts are all of the matrix in its order."""
    matrix = torch.arange(2 * 700 * 300).view(LARGE)
    for view, dim in ((matrix, -2), (matrix.mT, -1)):
        parts = [part for (part,) in in_parts(view)]
        assert max(part.numel() for part in parts) <= 2**17 < view.numel() and torch.equal(torch.cat(parts, dim), view)
    [(alone,)] = in_parts(matrix[:1, :200])
    assert alone.shape == (1, 200, 300)


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_along_long_rows_lose_nothing(transposed: bool) -> None:
    """A norm along one is off by 3e-4 here."""
    matrix = torch.rand((2, 2**24), generator=torch.Generator().manual_seed(0)) + 0.5
    expected = sum(part.double().square().sum() for part in matrix.split(2**20, -1))
    matrix = matrix.mT if transposed else matrix
    for kept in ((), (-1 if transposed else -2,)):
        torch.testing.assert_close(sum_of_squares(matrix, kept).double().sum(), expected, rtol=2e-6, atol=0.0)
