# SPDX-License-Identifier: Apache-2.0
"""Triton kernel: matrices divided by numbers, and rounded, in one pass."""

import torch
import triton
import triton.language as tl

from emerging_optimizers.adaptive_muon.kernels.launch import are_aligned, launch


__all__ = ["divide_on_cuda"]

_BLOCK = 4096


@triton.jit
def divide_kernel(matrices, divisors, out, elements, blocks, BLOCK: tl.constexpr):
    """Work on one block of one matrix."""
    member = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    divisor = tl.load(divisors + member)
    loaded = tl.load(matrices + member * elements + place, mask=place < elements, other=0.0)
    quotient = tl.div_rn(loaded, tl.broadcast_to(divisor, loaded.shape))  # rounded as torch rounds it
    tl.store(out + member * elements + place, quotient.to(out.dtype.element_ty), mask=place < elements)


def divide_on_cuda(matrices: torch.Tensor, divisors: torch.Tensor, out: torch.Tensor) -> None:
    """Divide each matrix by its number.

    Args:
        matrices: Shape ``(batch, rows, columns)``, contiguous, float32.
        divisors: Shape ``(batch, 1, 1)``, contiguous, float32.
        out: Takes the result, contiguous, any floating dtype.
    """
    elements = matrices[0].numel()
    blocks = triton.cdiv(elements, _BLOCK)
    arguments = (matrices, divisors, out, elements, blocks)
    key = (matrices.shape, out.dtype, are_aligned(matrices, divisors, out))
    launch(divide_kernel, key, blocks * len(matrices), arguments, {"BLOCK": _BLOCK}, num_warps=8)
