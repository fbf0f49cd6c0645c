# SPDX-License-Identifier: Apache-2.0
"""Launches of Triton kernels at a fraction of Triton's own overhead, which a step of many small launches would wait for."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch


__all__ = ["are_aligned", "launch"]

_compiled: dict[Hashable, Callable[..., None]] = {}


def launch(
    kernel: Any,
    key: Hashable,
    programs: int,
    arguments: Sequence[torch.Tensor | int | float],
    constants: Mapping[str, Any],
    **options: int,
) -> None:
    """Launch a kernel on its first argument's device and the current stream.

    Triton looks at every argument again at every launch. It compiles for dtypes, for addresses and integers that are
    multiples of 16, and for integers that are 1. Launches with the same key take what was compiled for the first of them.

    Args:
        kernel: The kernel, a function under ``@triton.jit``.
        key: Two launches of a kernel with one key must agree in all that Triton compiles for, in the number of programs,
            in constants and options.
        programs: The number of programs, along the first axis.
        arguments: Its arguments in order, tensors and numbers.
        constants: Its compile-time arguments in order, which follow the others.
        **options: Triton's options, such as ``num_warps``.
    """
    device = arguments[0].device  # type: ignore[union-attr]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton starts kernels on the current device
            launch(kernel, key, programs, arguments, constants, **options)
        return
    run = _compiled.get((kernel, device, key))
    if run is not None:
        run(*arguments, *constants.values())
        return
    compiled = kernel[programs,](*arguments, **constants, **options)
    if compiled is not None:  # Triton's interpreter compiles nothing
        _compiled[kernel, device, key] = compiled[programs, 1, 1]


def are_aligned(*tensors: torch.Tensor) -> tuple[bool, ...]:
    """Return for each tensor whether its address is a multiple of 16, as part of a key."""
    return tuple([tensor.data_ptr() % 16 == 0 for tensor in tensors])
