# SPDX-License-Identifier: Apache-2.0
"""Steps of the optimizer: beside the others', eager against a CUDA graph, and kernel by kernel."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from contestants import COMMON
from on_gpu.record import Record
from on_gpu.sizes import Sizes
from on_gpu.timing import wait, wall_ms
from shapes import ShapeSet
from step import as_table, measure
from torch.profiler import ProfilerActivity, profile

from emerging_optimizers.adaptive_muon import AdaptiveMuon


PRECISION = "medium"
OPTIONS: dict[str, Any] = COMMON | {"moment2_method": "namo", "fp32_matmul_prec": PRECISION}
# Kernels of a profile that are listed one by one.
LISTED = 25


def run(record: Record, sizes: Sizes) -> None:
    """Measure all sets: first beside the others, then ours alone."""
    device = record.device
    for name, of in sizes.sets.items():
        record.measure(f"step {name}", partial(beside_others, of, sizes.rounds, device), about=25)
    for name, of in sizes.sets.items():
        record.measure(f"eager {name}", partial(eager, of, sizes.rounds, device), about=5)
        record.measure(f"graph {name}", partial(replayed, of, sizes.rounds, device), about=5, needs_gpu=True)
    for name in list(sizes.sets)[:2]:
        record.measure(f"profile {name}", partial(profiled, sizes.sets[name], device), about=10, needs_gpu=True)


def beside_others(of: ShapeSet, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return the step benchmark of a set, and print its table."""
    result = measure(of, PRECISION, Namespace(algorithms=["auto"], only=None, rounds=rounds), device)
    print(f"\n{of.title}, {PRECISION}\n\n{as_table(result)}\n", flush=True)
    return result


def eager(of: ShapeSet, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the milliseconds of a step: until it is done, and until the CPU has enqueued it."""
    optimizer = AdaptiveMuon(of.params(device), **OPTIONS)
    done, enqueued = wall_ms(optimizer.step, device, rounds)
    return {"ms": done, "cpu_ms": enqueued}


def replayed(of: ShapeSet, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the milliseconds of a step that is replayed from a CUDA graph."""
    rate = torch.tensor(OPTIONS["lr"], device=device)
    optimizer = AdaptiveMuon(of.params(device), capturable=True, **(OPTIONS | {"lr": rate}))
    with captured(optimizer) as graph:
        done, enqueued = wall_ms(graph.replay, device, rounds)
    return {"ms": done, "cpu_ms": enqueued}


@contextmanager
def captured(optimizer: torch.optim.Optimizer, **options: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Give a CUDA graph of a step, after two steps that make the state and compile the kernels; then free it.

    Args:
        optimizer: Must be capturable.
        **options: Of ``torch.cuda.graph``.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        optimizer.step()
    try:
        yield graph
    finally:
        torch.cuda.synchronize()
        graph.reset()


def profiled(of: ShapeSet, device: torch.device) -> dict[str, Any]:
    """Return the number of kernels that a step starts, their time, and the longest of them by name."""
    optimizer = AdaptiveMuon(of.params(device), **OPTIONS)
    for _ in range(3):
        optimizer.step()
    wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        optimizer.step()
        wait(device)
    kernels = [
        {"us": each.self_device_time_total, "launches": each.count, "kernel": each.key[:160]}
        for each in found.key_averages()
        if each.device_type != torch.autograd.DeviceType.CPU and each.self_device_time_total > 0
    ]
    kernels.sort(key=lambda each: -each["us"])
    return {
        "launches": sum(each["launches"] for each in kernels),
        "us": sum(each["us"] for each in kernels),
        "kernels": kernels[:LISTED],
    }
