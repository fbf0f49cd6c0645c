# SPDX-License-Identifier: Apache-2.0
"""What options cost: steps with them, in turns with steps without them, on the same card."""

import random
import statistics
from functools import partial
from typing import Any

import torch
from common import by_turns, ratio
from on_gpu.record import Record
from on_gpu.sizes import Sizes
from on_gpu.steps import OPTIONS
from shapes import ShapeSet

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


MEASURED: dict[str, dict[str, Any]] = {
    "off": {},
    "off again": {},
    "every step": {"diagnostics_every": 1},
    "every 10": {"diagnostics_every": 10},
}
ROUNDED: dict[str, dict[str, Any]] = {
    "off": {},
    "momentum": {"momentum_dtype": "bfloat16"},
    "weights": {"stochastic_rounding": True},
    "both": {"momentum_dtype": "bfloat16", "stochastic_rounding": True},
}


def run(record: Record, sizes: Sizes) -> None:
    """Measure diagnostics with all methods, and rounding with one, on the first set."""
    name, of = next(iter(sizes.sets.items()))
    for method in METHODS:
        make = partial(in_turns, of, sizes.rounds, record.device, MEASURED, method)
        record.measure(f"diagnostics {name}, {method}", make, about=10)
    rounded = partial(in_turns, of, sizes.rounds, record.device, ROUNDED, "namo", torch.bfloat16)
    record.measure(f"bfloat16 {name}, namo", rounded, about=10)


def in_turns(
    of: ShapeSet,
    rounds: int,
    device: torch.device,
    variants: dict[str, dict[str, Any]],
    method: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of each variant's step, and their ratio to the first's, by rounds."""
    # All share the weights, which do not move: a step costs the same whatever they are.
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in of.params(device)]
    for p in params:
        p.grad = torch.randn_like(p)
    options = OPTIONS | {"moment2_method": method, "lr": 0.0, "weight_decay": 0.0}
    steps = {name: AdaptiveMuon(params, **(options | variant)).step for name, variant in variants.items()}
    seconds = by_turns(steps, rounds, device, warm_up=3, order=random.Random(0))
    first = seconds[next(iter(variants))]
    return {
        name: {"ms": 1e3 * statistics.median(of_name), "ratio": ratio(of_name, first)["median"]}
        for name, of_name in seconds.items()
    }
