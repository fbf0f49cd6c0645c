# SPDX-License-Identifier: Apache-2.0
"""What the CPU is fast at."""

from functools import cache
from typing import Any

import torch


__all__ = ["has_bfloat16_units", "has_tiles", "is_amd_with_bfloat16_vectors"]

# The functions of torch.cpu have come one by one since 2.4; what an older torch cannot find out counts as absent.


@cache
def has_tiles() -> bool:
    """Return whether the CPU multiplies bfloat16 in tiles (AMX), so fast that half of a product saves nothing."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@cache
def has_bfloat16_units() -> bool:
    """Return whether the CPU has instructions for products of bfloat16; other CPUs are 10 times slower at them."""
    return has_tiles() or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


@cache
def is_amd_with_bfloat16_vectors() -> bool:
    """Return whether the CPU is an AMD Zen 4 or newer, whose vectors of bfloat16 are twice as fast as of float32."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in str(found.get("cpu_name")) and bool(found.get("avx512_bf16"))
