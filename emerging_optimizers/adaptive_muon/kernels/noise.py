# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding to bfloat16 within Triton kernels, to the bits of the module :mod:`..noise`."""

import triton
import triton.language as tl

from emerging_optimizers.adaptive_muon.noise import LARGEST, MULTIPLIERS


__all__ = ["rounded"]

_FIRST, _SECOND = (tl.constexpr(multiplier) for multiplier in MULTIPLIERS)
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def _stirred(x):
    """Return the hash of unsigned numbers without its last shift."""
    x = (x ^ (x >> 16)) * _FIRST
    return (x ^ (x >> 15)) * _SECOND


@triton.jit
def _hashed(keys, number):
    x = _stirred(tl.load(keys).to(tl.uint32) + number.to(tl.uint32))
    return x ^ (x >> 15)


@triton.jit
def rounded(values, keys, members, member, row, column):
    """Return a tile of one member's float32 values rounded to bfloat16, but in float32.

    Row and column are those in the whole matrix; the keys are for the rows of all members, then for their columns.
    """
    noise = _stirred(_hashed(keys + member, row) + _hashed(keys + members + member, column)) >> 16
    bits = values.to(tl.uint32, bitcast=True)
    bits = tl.where(tl.abs(values) < _LARGEST, bits + noise, bits) & 0xFFFF0000
    return tl.where(values != values, values, bits.to(tl.float32, bitcast=True))
