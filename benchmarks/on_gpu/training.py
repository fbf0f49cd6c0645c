# SPDX-License-Identifier: Apache-2.0
"""The share of the optimizer's step in a training step of GPT-2 124M."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from on_gpu.record import Record
from on_gpu.sizes import Sizes
from on_gpu.steps import PRECISION
from on_gpu.timing import wall_ms

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


# The model is the demo's.
sys.path.append(str(Path(__file__).parents[2] / "examples"))

from gpt import GPT, Shape


def run(record: Record, sizes: Sizes) -> None:
    """Measure one micro-batch, and the steps of all optimizers on the same model."""
    record.measure("training", lambda: shares(sizes, record.device), about=30)


def shares(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Return the milliseconds of a micro-batch and of each optimizer's step, and the steps' shares.

    A training step is as many micro-batches as make up its tokens, without communication, and one step of the
    optimizer on the whole model. The model is not compiled: a compiled one is faster, and the share then larger.
    """
    layers, width, heads, context, vocabulary = sizes.model
    model = GPT(Shape(layers, width, heads, context, vocabulary), seed=0).to(device)
    windows = torch.randint(vocabulary, (sizes.micro_batch, context + 1), device=device)

    def micro_batch() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model.loss(windows)
        loss.backward()

    once, _ = wall_ms(micro_batch, device, 5)
    number = sizes.tokens // (sizes.micro_batch * context)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "micro_batch_ms": once,
        "micro_batches": number,
        "steps": {},
    }
    for name, make in optimizers(model, device):
        optimizer = make()
        ms, cpu_ms = wall_ms(optimizer.step, device, 5)
        result["steps"][name] = {"ms": ms, "cpu_ms": cpu_ms, "share": ms / (ms + number * once)}
        del optimizer
    return result


def optimizers(model: GPT, device: torch.device) -> list[tuple[str, Callable[[], Any]]]:
    """Return what makes the optimizers of the whole model: ours, and AdamW for everything."""
    options: dict[str, Any] = {"lr": 1e-3, "fp32_matmul_prec": PRECISION}
    found: list[tuple[str, Callable[[], Any]]] = [
        (f"ours {method}", partial(HybridAdaptiveMuon.from_model, model, moment2_method=method, **options))
        for method in METHODS
    ]
    return [*found, ("torch AdamW", lambda: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))]
