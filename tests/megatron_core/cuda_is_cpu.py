# SPDX-License-Identifier: Apache-2.0
"""Lets Megatron, which asks for CUDA devices, run on the CPU: for tests only."""

from collections.abc import Callable
from functools import cache
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


_all_gather = dist.all_gather


def _uneven_all_gather(
    tensors: list[torch.Tensor], tensor: torch.Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> Any:
    """all_gather that takes tensors of different sizes, as NCCL's does and gloo's does not."""
    if group is None or len({each.shape for each in tensors}) == 1:
        return _all_gather(tensors, tensor, group, async_op)
    tensors[group.rank()].copy_(tensor)
    for rank, each in enumerate(tensors):
        dist.broadcast(each, dist.get_global_rank(group, rank), group)
    return None


@cache
def install() -> None:
    """Puts it in the place of CUDA, for as long as the process lives, and those that are copies of it."""
    dist.all_gather = _uneven_all_gather
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda *_, **__: None
    torch.cuda.synchronize = lambda *_, **__: None
    CudaIsCpu().__enter__()
