# SPDX-License-Identifier: Apache-2.0
"""The addresses of many tensors on the GPU, for kernels that work on all of them in one launch."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import batched
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from emerging_optimizers.adaptive_muon.kernels.launch import launch


__all__ = ["Addresses", "addresses_of", "at", "table_of"]

_AT_ONCE = 16
_ALIGNED_TO = 16  # bytes that a thread loads at once


class Addresses(NamedTuple):
    """The addresses of matrices.

    Args:
        table: The addresses, int64 on the GPU; there may be more entries, which mean nothing.
        aligned: Whether all rows begin where a thread can load several elements at once.
    """

    table: torch.Tensor
    aligned: bool


# By itself Triton would compile for 32 bits where the first numbers are small, and later launches would cut off addresses.
@triton.jit(do_not_specialize=[f"p{i}" for i in range(_AT_ONCE)])
def store_kernel(
    out,
    p0: tl.int64, p1: tl.int64, p2: tl.int64, p3: tl.int64,  # type: ignore[valid-type]
    p4: tl.int64, p5: tl.int64, p6: tl.int64, p7: tl.int64,  # type: ignore[valid-type]
    p8: tl.int64, p9: tl.int64, p10: tl.int64, p11: tl.int64,  # type: ignore[valid-type]
    p12: tl.int64, p13: tl.int64, p14: tl.int64, p15: tl.int64,  # type: ignore[valid-type]
):  # fmt: skip
    tl.store(out + 0, p0)
    tl.store(out + 1, p1)
    tl.store(out + 2, p2)
    tl.store(out + 3, p3)
    tl.store(out + 4, p4)
    tl.store(out + 5, p5)
    tl.store(out + 6, p6)
    tl.store(out + 7, p7)
    tl.store(out + 8, p8)
    tl.store(out + 9, p9)
    tl.store(out + 10, p10)
    tl.store(out + 11, p11)
    tl.store(out + 12, p12)
    tl.store(out + 13, p13)
    tl.store(out + 14, p14)
    tl.store(out + 15, p15)


@triton.jit
def at(table, index, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address at an index of a table, of elements of a type."""
    address = tl.load(table + index).to(tl.pointer_type(TYPE))  # type: ignore[arg-type]
    return tl.multiple_of(address, 16) if ALIGNED else address


def addresses_of(tensors: Sequence[torch.Tensor]) -> Addresses:
    """Return the addresses of all matrices in tensors of one shape, dtype, device and strides.

    Args:
        tensors: Shape ``(rows, columns)``, or ``(stack, rows, columns)``.
    """
    first = tensors[0]
    starts = tuple([tensor.data_ptr() for tensor in tensors])
    bytes_apart = tuple([stride * first.element_size() for stride in first.stride()[:-1]])
    in_stack = first.size(0) if first.ndim > 2 else 1
    if not first.is_cuda or torch.cuda.is_current_stream_capturing():
        # What a graph reads must be its own: memory of the cache would be freed under it one day.
        return _addresses(starts, bytes_apart, in_stack, first.device)
    stream = torch.cuda.current_stream(first.device)
    return _remembered(starts, bytes_apart, in_stack, first.device, stream)


def table_of(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return numbers as int64 on a GPU, in a table with more entries, which mean nothing.

    They travel as arguments of a kernel. A copy from the host would read freed memory in a replayed graph.
    """
    table = torch.empty(-(-len(numbers) // _AT_ONCE), _AT_ONCE, dtype=torch.int64, device=device)
    for row, part in zip(table, batched(numbers, _AT_ONCE), strict=True):
        padded = (*part, *[part[0]] * (_AT_ONCE - len(part)))
        launch(store_kernel, None, 1, (row, *padded), {}, num_warps=1)
    return table


def _addresses(
    starts: tuple[int, ...], bytes_apart: tuple[int, ...], in_stack: int, device: torch.device
) -> Addresses:
    """Return the addresses of matrices in stacks that start at these."""
    table = table_of([start + i * bytes_apart[0] for start in starts for i in range(in_stack)], device)
    return Addresses(table, all(each % _ALIGNED_TO == 0 for each in (*starts, *bytes_apart)))


@lru_cache(maxsize=4096)
def _remembered(
    starts: tuple[int, ...],
    bytes_apart: tuple[int, ...],
    in_stack: int,
    device: torch.device,
    stream: torch.cuda.Stream,  # another one might read the table before it is written
) -> Addresses:
    """Return the same, computed once."""
    return _addresses(starts, bytes_apart, in_stack, device)
