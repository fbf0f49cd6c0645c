# SPDX-License-Identifier: Apache-2.0
"""The precision of products: set for a while, and afterwards exactly what the user had set, in whichever way.

Torch has two sets of switches for float32: ``torch.set_float32_matmul_precision`` and, since 2.9, ``fp32_precision`` for each
operation of each backend, which may follow that of the backend, and that the general one. Torch refuses to read the
first where the second contradicts it. All are global.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import Condition, local
from typing import Any

import torch

from emerging_optimizers.utils import FP32MatmulPrecT


__all__ = ["matmul_precision", "sums_in_float32"]

# Torch's functions for the new switches, by backend and operation. Its attributes do not reach all of them: that of
# torch.backends.mkldnn sets the general one.
_get: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)
_set: Any = getattr(torch._C, "_set_fp32_precision_setter", None)

# What the old switch makes of the new ones for products, on CUDA and in the CPU's oneDNN.
_NEW: dict[FP32MatmulPrecT, dict[str, str]] = {
    "highest": {"cuda": "ieee", "mkldnn": "ieee"},
    "high": {"cuda": "tf32", "mkldnn": "tf32"},
    "medium": {"cuda": "tf32", "mkldnn": "bf16"},
}

_Undo = Callable[[], None]


class _Turns:
    """Threads take turns at a global setting: those that need the same value share a turn, others wait."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._value: object = None
        self._holders = 0
        self._undo: _Undo = lambda: None
        self._of_thread = local()

    @contextmanager
    def at(self, value: object, set_to: Callable[[], _Undo]) -> Iterator[None]:
        """Keep the setting at a value. Inside, the same thread may set another value for a while.

        ``set_to`` sets the value, and returns what restores the setting.
        """
        around = getattr(self._of_thread, "current", None)
        if around:
            self._leave()
        self._enter(value, set_to)
        try:
            yield
        finally:
            self._leave()
            if around:
                self._enter(*around)

    def _enter(self, value: object, set_to: Callable[[], _Undo]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._holders or self._value == value)
            if not self._holders:
                self._value, self._undo = value, set_to()
            self._holders += 1
        self._of_thread.current = value, set_to

    def _leave(self) -> None:
        self._of_thread.current = None
        with self._changed:
            self._holders -= 1
            if not self._holders:
                self._undo()
            self._changed.notify_all()


_float32_turns, _float16_turns = _Turns(), _Turns()


def matmul_precision(precision: FP32MatmulPrecT) -> AbstractContextManager[None]:
    """Compute float32 products in a precision, whatever torch's switches are, and restore all of them."""
    return _float32_turns.at(precision, lambda: _set_to(precision))


def sums_in_float32() -> AbstractContextManager[None]:
    """Keep cuBLAS from summing products of float16 in float16, which it may by default where it splits the sum."""
    return _float16_turns.at("float32", _sum_in_float32)


def _sum_in_float32() -> _Undo:
    """Set cuBLAS's flags, and return what restores them."""
    flags, reduction, split_k = torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", "_split_k"
    names = (reduction, "allow_fp16_accumulation")
    before: dict[str, Any] = {name: getattr(flags, name) for name in names if hasattr(flags, name)}
    if hasattr(flags, reduction + split_k):  # the first is set together with it, as a pair
        before[reduction] = before[reduction], getattr(flags, reduction + split_k)

    def set_all(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(flags, name, value)

    set_all({name: (False, value[1]) if isinstance(value, tuple) else False for name, value in before.items()})
    return partial(set_all, before)


def _set_to(precision: FP32MatmulPrecT) -> _Undo:
    """Set all switches, and return what restores them."""
    if _is_set_to(precision):
        return lambda: None
    before = {} if _get is None else {backend: _own(backend, "matmul") for backend in _NEW[precision]}
    for backend in before:
        _set(backend, "matmul", "ieee")  # contradicts nothing, so that the old switch can be read
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)

    def undo() -> None:
        torch.set_float32_matmul_precision(old)
        for backend, value in before.items():
            _set(backend, "matmul", value)

    return undo


def _is_set_to(precision: FP32MatmulPrecT) -> bool:
    """Return whether both sets of switches have this precision already."""
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:  # they contradict each other
        return False
    new = {} if _get is None else {backend: _get(backend, "matmul") for backend in _NEW[precision]}
    # "none" is "ieee" where nothing is set.
    return old == precision and all((value, "ieee")[value == "none"] == _NEW[precision][b] for b, value in new.items())


def _own(backend: str, operation: str) -> str:
    """Return a new switch's own value: "none" for one that follows another.

    Torch gives the value that holds. Whether a switch follows the one above it shows when that is changed.
    """
    assert _get is not None
    if backend == "generic":
        return _get(backend, operation)
    above = (backend, "all") if operation != "all" else ("generic", "all")
    holds, of_above = _get(backend, operation), _own(*above)
    try:
        for trial in ("ieee", "tf32"):
            _set(*above, trial)
            if _get(backend, operation) != holds:
                return "none"
        return holds
    finally:
        _set(*above, of_above)
