# SPDX-License-Identifier: Apache-2.0
"""Sums over the elements of matrices, exact and fast on a CPU too, without temporary tensors of their size there."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import reduce

import torch


__all__ = ["in_parts", "sum_of_squared_products", "sum_of_squares", "sums_of_products"]

# Elements that stay in the own cache of a CPU's core. Parts of them take 0.5 of the time of a large temporary tensor.
_CACHED = 2**17


def sum_of_squares(matrix: torch.Tensor, kept_dims: Collection[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the sums of squares along the dimensions that are not kept, which get size 1.

    The sums of a whole matrix are the sums of its shards' sums.

    Args:
        matrix: Shape ``(..., rows, columns)``, a batch of matrices or of shards.
        kept_dims: Which of the dimensions -2 and -1 to keep; with both, the elements' squares.
        dtype: The dtype of the sums, the matrix's by default.
    """
    summed, dtype = tuple(dim for dim in (-2, -1) if dim not in kept_dims), dtype or matrix.dtype
    if not summed:
        return matrix.to(dtype).square()
    norms: torch.Tensor
    if matrix.device.type != "cpu":
        norms = torch.linalg.vector_norm(matrix, dim=summed, keepdim=True, dtype=dtype)
        return norms.square_()
    wide, outer = torch.promote_types(dtype, torch.float32), _outer_dim(matrix)
    if (inner := -3 - outer) in summed and matrix.size(inner) > _CACHED:  # too long for a norm, see below
        return _total(sum_of_squares(part, kept_dims, wide) for part in torch.split(matrix, _CACHED, inner)).to(dtype)
    if summed == (outer,):  # along which norms take ten times as long
        return _total(part.to(wide).square().sum(outer, keepdim=True) for (part,) in in_parts(matrix)).to(dtype)
    # One norm of all is a plain sum in float32, which is too small by half a percent with 2^26 elements.
    norms = torch.linalg.vector_norm(matrix, dim=inner, keepdim=True, dtype=wide)
    norms.square_()
    return (norms.sum(outer, keepdim=True) if outer in summed else norms).to(dtype)


def sums_of_products(matrices: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Return for each pair of places the sums of the products of elements of the batches there, shape ``(..., 1, 1)``.

    They are in the widest of the matrices' dtypes, at least float32. A CPU reads the matrices once for all pairs.
    """
    dtype = reduce(torch.promote_types, (matrix.dtype for matrix in matrices), torch.float32)
    parts = ([each.to(dtype) for each in part] for part in in_parts(*matrices))
    sums = ([_product(part[i], part[j]) for i, j in pairs] for part in parts)
    return [_total(iter(of_pair)) for of_pair in zip(*sums, strict=True)]


def sum_of_squared_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the sums of the squares of products of elements, shape ``(..., 1, 1)``, of two batches of matrices."""
    return _total((a * b).square_().sum((-2, -1), keepdim=True) for a, b in in_parts(one, other))


def in_parts(*matrices: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield tensors of one shape in parts of rows or columns that a CPU's core has in its cache; elsewhere whole."""
    first = matrices[0]
    if first.device.type != "cpu" or torch.compiler.is_compiling() or first.numel() <= _CACHED:
        yield matrices
        return
    outer = _outer_dim(first)
    size = max(_CACHED * first.size(outer) // first.numel(), 1)
    yield from zip(*(torch.split(matrix, size, outer) for matrix in matrices), strict=True)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the sums of products of two parts; of one matrix on a CPU in 0.65 of the time of a temporary tensor."""
    flat = a.device.type == "cpu" and math.prod(a.shape[:-2]) == 1 and a.is_contiguous() and b.is_contiguous()
    if flat:
        return torch.dot(a.reshape(-1), b.reshape(-1)).view((1,) * a.ndim)
    return sum_of_squares(a, ()) if a is b else (a * b).sum((-2, -1), keepdim=True)


def _outer_dim(matrix: torch.Tensor) -> int:
    """Return the dimension, -2 or -1, along which elements lie farther apart in memory."""
    return -2 if matrix.stride(-1) <= matrix.stride(-2) else -1


def _total(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """Add parts of a sum."""
    total = next(parts)
    for part in parts:
        total += part
    return total
