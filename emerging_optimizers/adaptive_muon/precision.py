# SPDX-License-Identifier: Apache-2.0
"""The precision of float32 products: set for a while, and afterwards exactly what the user had set, in whichever way.

Torch has two sets of switches: ``torch.set_float32_matmul_precision`` and, since 2.9, ``fp32_precision`` for each
backend. It refuses to read the first where the second contradicts it. Both are global: two threads that need different
precisions take turns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import backends

from emerging_optimizers.utils import FP32MatmulPrecT


__all__ = ["SWITCHES", "matmul_precision"]

# Held while torch's global switches for products are not the user's.
SWITCHES = RLock()

# What the old switch makes of the new ones, for CUDA and for the CPU's oneDNN.
_NEW = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}


@contextmanager
def matmul_precision(precision: FP32MatmulPrecT) -> Iterator[None]:
    """Has float32 products computed in a precision, whatever torch's switches are, and restores all of them.

    Args:
        precision: "highest", "high" or "medium", as in ``torch.set_float32_matmul_precision``.
    """
    with SWITCHES:
        if _is_set_to(precision):
            yield
            return
        before = _inherited_or_set()
        for switch in _switches():
            switch.fp32_precision = "ieee"  # contradicts nothing, so that the old switch can be read
        old = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(precision)
            yield
        finally:
            torch.set_float32_matmul_precision(old)
            for switch, value in zip(_switches(), before, strict=True):
                switch.fp32_precision = value


def _switches() -> list[Any]:
    """The new switches that the old one sets too: of CUDA's and oneDNN's products."""
    switches = (backends.cuda.matmul, getattr(backends.mkldnn, "matmul", None))
    return [switch for switch in switches if hasattr(switch, "fp32_precision")]


def _inherited_or_set() -> list[str]:
    """The values of the new switches, "none" for one that follows ``torch.backends.fp32_precision``.

    Torch gives the value that holds. Whether a switch follows the general one shows when that is changed.
    """
    values = [switch.fp32_precision for switch in _switches()]
    if not values:
        return []
    set_general: Any = backends.set_flags  # untyped
    [general] = set_general(None)
    followers = set()
    try:
        for trial in ("ieee", "tf32"):
            set_general(trial)
            now = [switch.fp32_precision for switch in _switches()]
            followers |= {index for index, (a, b) in enumerate(zip(now, values, strict=True)) if a != b}
    finally:
        set_general(general)
    return ["none" if index in followers else value for index, value in enumerate(values)]


def _is_set_to(precision: FP32MatmulPrecT) -> bool:
    """Whether both sets of switches say this precision already."""
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # they contradict each other
        return False
    values = (switch.fp32_precision for switch in _switches())
    # "none" is "ieee" where nothing else is set.
    return old == precision and all(
        value in (wanted, "none" if wanted == "ieee" else wanted)
        for value, wanted in zip(values, _NEW[precision], strict=False)
    )
