# SPDX-License-Identifier: Apache-2.0
"""Lets Megatron, which asks for CUDA devices, run on the CPU: for tests only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch.overrides import TorchFunctionMode


class CudaIsCpu(TorchFunctionMode):
    """Tensors that are asked for on a CUDA device are made on the CPU, and say they are CUDA tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def install() -> None:
    """Puts it in the place of CUDA, for as long as the process lives."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda *_, **__: None
    torch.cuda.synchronize = lambda *_, **__: None
    CudaIsCpu().__enter__()
