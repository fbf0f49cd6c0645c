# SPDX-License-Identifier: Apache-2.0
"""Sums over the elements of matrices, exact and fast on a CPU too, without temporary tensors of their size there."""

from collections.abc import Collection, Iterator

import torch


__all__ = ["in_parts", "sum_of_products", "sum_of_squared_products", "sum_of_squares"]

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


def sum_of_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the sums of the products of elements, shape ``(..., 1, 1)``, of two batches of matrices."""
    return _total((a * b).sum((-2, -1), keepdim=True) for a, b in in_parts(one, other))


def sum_of_squared_products(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the sums of the squares of the products of elements, as :func:`sum_of_products` does."""
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


def _outer_dim(matrix: torch.Tensor) -> int:
    """Return the dimension, -2 or -1, along which elements lie farther apart in memory."""
    return -2 if matrix.stride(-1) <= matrix.stride(-2) else -1


def _total(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    """Add parts of a sum."""
    total = next(parts)
    for part in parts:
        total += part
    return total
