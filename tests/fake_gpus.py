# SPDX-License-Identifier: Apache-2.0
"""GPUs without memory, on which nothing is computed: what a step would wait for, or have on two devices, shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# What waits for the device where the tensor is on one.
_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select")


class FakeGpus(TorchDispatchMode):
    """Tensors on "cuda" have shapes, strides and dtypes, and no values. Those on the CPU are real.

    Attributes:
        waits: What has waited for a GPU, and what has copied to one or from one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        fake = any(isinstance(each, FakeTensor) for each in inputs)
        if not fake and torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        name = func._schema.name
        if fake and (name in _READS or _by_a_mask(func, args)):
            self.waits.append(name)
        with self._fake:
            result = func(*args, **kwargs)
        devices = {each.device.type for each in (*inputs, *tree_leaves(result)) if _is_array(each)}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            self.waits.append(f"{name} with {[(each.device.type, *each.shape) for each in inputs]}")
        return result


def _by_a_mask(func: Any, args: Any) -> bool:
    indices = args[1] if func._schema.name in ("aten::index", "aten::index_put_") else ()
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _is_array(each: Any) -> bool:
    """Whether it is no number on the CPU, which a kernel takes as an argument."""
    return isinstance(each, torch.Tensor) and (each.ndim > 0 or each.device.type == "cuda")


@contextmanager
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    """Two GPUs that are too old for Triton kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (0, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor copies a list to a GPU out of sight
    try:
        with FakeGpus() as gpus:
            yield gpus
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
