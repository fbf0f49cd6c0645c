# SPDX-License-Identifier: Apache-2.0
"""A stand-in for CUDA, so that a rehearsal runs the tests that need a GPU: ``pytest -p cuda_on_cpu tests/test_cuda.py``.

Tensors "on cuda" are the CPU's, and say so: the optimizer takes its path of the CPU. A graph is a tape of the operations
between tensors: numbers stay in it as they were. Reading a tensor's value raises, as on CUDA, and so does indexing by a mask or a list.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import adam, optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


# What waits for the device.
_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")


class _OnCpu(TorchFunctionMode):
    """Gives the CPU to whoever asks for CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_on_cpu, (args, kwargs or {}))
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_cuda else value


class Graph(TorchDispatchMode):
    """Records operations without effect, and replays them."""

    def __init__(self) -> None:
        super().__init__()
        self._tape: list[tuple[Any, Any, Any, Any]] = []
        self._of_lists: list[torch.Tensor] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _READS or self._waits_for_indices(func, args):
            raise RuntimeError(f"a capture must not wait for the device, got {func._schema.name}")
        written = [
            kwargs[argument.name] if argument.kwarg_only else args[place]
            for place, argument in enumerate(func._schema.arguments)
            if argument.is_write and (argument.name in kwargs if argument.kwarg_only else place < len(args))
        ]
        self._before += [(each, each.clone()) for each in tree_leaves(written) if isinstance(each, torch.Tensor)]
        result = func(*args, **kwargs)
        self._tape.append((func, args, kwargs, result))
        if func._schema.name == "aten::lift_fresh":  # what Python makes of a list
            self._of_lists.append(result)
        return result

    def _waits_for_indices(self, func: Any, args: Any) -> bool:
        indices = args[1] if func._schema.name in ("aten::index", "aten::index_put_") else ()
        return any(
            index is not None and (index.dtype == torch.bool or any(index is each for each in self._of_lists))
            for index in indices
        )

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for tensor, value in reversed(self._before):
            tensor.detach().copy_(value)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """Run the tape. What an operation returned then keeps its place."""
        for func, args, kwargs, result in self._tape:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        """Forget the tape."""
        self._tape.clear()


@contextmanager
def _capture(graph: Graph, **_: Any) -> Any:
    with graph:
        yield


def _install() -> None:
    nothing = SimpleNamespace(wait_stream=lambda _: None)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (0, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(total_memory=0)
    torch.cuda.synchronize = torch.cuda.empty_cache = torch.cuda.set_sync_debug_mode = lambda *_: None
    torch.cuda.Stream = torch.cuda.current_stream = lambda *_: nothing
    torch.cuda.stream = lambda _: nullcontext()
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, _capture
    torch.cuda.is_current_stream_capturing = lambda: False
    # torch's AdamW asks the driver. The name of the check depends on the release.
    for module in (optimizer, adam):
        module._get_capturable_supported_devices = lambda *_, **__: ["cpu", "cuda"]
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        setattr(torch.optim.Optimizer, name, lambda _: None)
    _OnCpu().__enter__()


_install()
