# SPDX-License-Identifier: Apache-2.0
"""For tests that need a GPU: parameters, gradients, steps that must not wait, and steps in a CUDA graph."""

from collections.abc import Sequence
from contextlib import contextmanager

import pytest
import torch


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(64, 48)] * 3 + [(48, 64)] * 2 + [(300, 500), (96, 96), (1100, 1030)]
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "nesterov": True, "bias_correction": True}


def on(device, dtype=torch.float32, shapes=SHAPES):
    """The same parameters on every device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def give_gradients(params, step):
    """The same on every device, and in the same place at every step, as a graph needs it."""
    generator = torch.Generator().manual_seed(1 + step)
    for p in params:
        gradient = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        p.grad = gradient if p.grad is None else p.grad.copy_(gradient)


def distance(params, others, begin):
    """How far two results are apart, relative to how far the first has come: the largest."""
    return max(
        float((q - p).norm() / (p - b).norm())
        for p, q, b in zip(
            *([each.detach().cpu().double() for each in of] for of in (params, others, begin)), strict=True
        )
    )


@contextmanager
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def first_step(optimizer):
    """Make the state and compile the kernels on a stream of its own, as CUDA graphs want it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)


def replays_equal(plain, captured, params: Sequence[torch.Tensor], others: Sequence[torch.Tensor], rate, most=1e-4):
    """Step both four times, the second by replays, with other gradients and rates at every step."""
    begin = [p.detach().clone() for p in params]
    give_gradients(others, 0)
    first_step(captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(4):
        for group in plain.param_groups:
            group["lr"] = 0.02 / (1 + step)
        rate.fill_(0.02 / (1 + step))
        give_gradients(params, step)
        plain.step()
        if step:
            give_gradients(others, step)
            graph.replay()
    assert distance(params, others, begin) <= most
