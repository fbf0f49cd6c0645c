# SPDX-License-Identifier: Apache-2.0
"""How long something takes on a device."""

import statistics
import time
from collections.abc import Callable

import torch


def graph_ms(function: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of a function without the time to start its kernels: in a CUDA graph."""
    if device.type != "cuda":
        return wall_ms(function, device, 3)[0]
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(function, rep=20, return_mode="median"))


def event_ms(function: Callable[[], object], device: torch.device) -> float:
    """Return the median milliseconds of a function that starts one long kernel. In a graph a copy is a slower one."""
    if device.type != "cuda":
        return wall_ms(function, device, 3)[0]
    from triton.testing import do_bench

    return float(do_bench(function, return_mode="median"))


def wall_ms(function: Callable[[], object], device: torch.device, rounds: int) -> tuple[float, float]:
    """Return the median milliseconds until a function is done, and until it has only enqueued its work."""
    done, enqueued = [], []
    for index in range(rounds + 2):
        wait(device)
        start = time.perf_counter()
        function()
        returned = time.perf_counter()
        wait(device)
        if index >= 2:
            done.append(1e3 * (time.perf_counter() - start))
            enqueued.append(1e3 * (returned - start))
    return statistics.median(done), statistics.median(enqueued)


def wait(device: torch.device) -> None:
    """Wait until a device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
