# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels at a fraction of Triton's own overhead, which a step of many small launches would wait for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


__all__ = ["launch"]

_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    arguments: Sequence[torch.Tensor | int | float],
    constants: Mapping[str, Any],
    *,
    specialized: bool = True,
    **options: int,
) -> None:
    """Launch a kernel on its first argument's device and the current stream.

    Triton compiles a kernel for what it reads off the arguments: dtypes, addresses and integers that are multiples of
    16, integers that are 1. A launch with the same of all these takes the compiled kernel as it is.

    Args:
        kernel: The kernel, a function under ``@triton.jit``.
        programs: The number of programs, along the first axis.
        arguments: Its arguments in order, tensors and numbers.
        constants: Its compile-time arguments in order, which follow the others.
        specialized: Whether Triton may compile for the integers; False if all are under ``do_not_specialize``.
        **options: Triton's options, such as ``num_warps``.
    """
    first = arguments[0]
    assert isinstance(first, torch.Tensor)
    facts = [
        (one.dtype, one.data_ptr() % 16 == 0) if isinstance(one, torch.Tensor) else one
        for one in (arguments if specialized else arguments[:1])
        if not isinstance(one, float)
    ]
    key = (kernel, first.device, *facts, *constants.values(), *options.values())
    if first.device.index in (None, torch.cuda.current_device() if first.is_cuda else None):
        _run(key, kernel, programs, arguments, constants, options)
    else:
        with torch.cuda.device(first.device):  # Triton starts kernels on the current device
            _run(key, kernel, programs, arguments, constants, options)


def _run(key: Any, kernel: Any, programs: int, arguments: Any, constants: Any, options: Any) -> None:
    """Launches on the current device."""
    compiled = _compiled.get(key)
    if compiled is None:
        # Triton's interpreter compiles nothing, and returns nothing.
        _compiled[key] = kernel[programs,](*arguments, **constants, **options)
    else:
        compiled[programs, 1, 1](*arguments, *constants.values())
