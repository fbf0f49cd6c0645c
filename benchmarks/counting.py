# SPDX-License-Identifier: Apache-2.0
"""What a step does, counted and not timed: operations, bytes, launches, and memory beside what it keeps."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Counter(TorchDispatchMode):
    """Counts the operations that compute, the bytes of their operands and results, and the most memory they hold.

    What an operation allocates and frees inside itself is not seen. Views and empty tensors are not operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        self._hold(outputs, inputs)
        if not func.is_view and not func.__name__.startswith(("empty", "new_empty", "_unsafe_view", "view", "detach")):
            self.operations += 1
            written = outputs or inputs[: len(inputs) // 2]  # an operation on lists in place returns nothing
            self.bytes += sum(each.nbytes for each in (*inputs, *written))
        return result

    def _hold(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
        known = {each.untyped_storage()._cdata for each in inputs}
        for each in outputs:
            storage = each.untyped_storage()
            if storage._cdata not in known:
                self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))


def counted(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the counts of one step, of an optimizer that has made its state."""
    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    with FlopCounterMode(display=False) as flops:
        optimizer.step()
    with Counter() as counter:
        optimizer.step()
    counts = {
        "flops": flops.get_total_flops(),
        "operations": counter.operations,
        "bytes": counter.bytes,
        "peak_temporary_bytes": counter.peak,
        "state_bytes": state_bytes(optimizer),
    }
    if device.type == "cuda":
        counts |= _on_cuda(optimizer, device)
    return counts


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of an optimizer's state."""
    tensors = [each for each in tree_leaves(list(optimizer.state.values())) if isinstance(each, torch.Tensor)]
    return sum(each.nbytes for each in tensors)


def _on_cuda(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """Kernels started, and the allocator's own peak."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    optimizer.step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize(device)
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return {"peak_temporary_bytes": peak, "kernel_launches": launches}
