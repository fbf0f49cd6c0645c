# SPDX-License-Identifier: Apache-2.0
"""The addresses of many tensors on the GPU, for kernels that work on all of them in one launch."""

from collections.abc import Sequence
from itertools import batched
from typing import Any

import torch
import triton
import triton.language as tl


__all__ = ["addresses", "are_aligned", "at"]

_AT_ONCE = 16
_ALIGNED_TO = 16  # bytes that a thread loads at once
_NAMES = [f"p{i}" for i in range(_AT_ONCE)]


@triton.jit(do_not_specialize=_NAMES)
def _store(out, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15):
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


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the addresses of all matrices in tensors of one shape, dtype and device, shape ``(number,)``, int64.

    The addresses travel as arguments of a kernel. A copy from the host would read freed memory in a replayed graph.

    Args:
        tensors: Shape ``(..., rows, columns)``; leading dimensions, those of a stack, must be contiguous.
    """
    first = tensors[0]
    bytes_each = first.stride(-3) * first.element_size() if first.ndim > 2 else 0
    in_stack = first.shape[:-2].numel()
    found = [tensor.data_ptr() + i * bytes_each for tensor in tensors for i in range(in_stack)]
    table = torch.empty(-(-len(found) // _AT_ONCE) * _AT_ONCE, dtype=torch.int64, device=first.device)
    kernel: Any = _store
    for index, part in enumerate(batched(found, _AT_ONCE)):
        padded = (*part, *[part[0]] * (_AT_ONCE - len(part)))
        kernel[1,](table[index * _AT_ONCE :], *padded, num_warps=1)
    return table


def are_aligned(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether all rows of tensors of one shape begin where a thread can load several elements at once."""
    first = tensors[0]
    bytes_apart = [stride * first.element_size() for stride in first.stride()[:-1]]
    return all(each % _ALIGNED_TO == 0 for each in (*bytes_apart, *(tensor.data_ptr() for tensor in tensors)))


@triton.jit
def at(table, index, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address at an index of a table, of elements of a type."""
    address = tl.load(table + index).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, 16) if ALIGNED else address
