# SPDX-License-Identifier: Apache-2.0
"""Peak temporary memory of an optimizer step: all that a step allocates beyond weights, gradients and state.

Allocations are counted by torch's dispatcher, on tensors without data, so that any model fits any machine.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from counting import Counter
from torch._subclasses.fake_tensor import FakeTensorMode

from emerging_optimizers.adaptive_muon import AdaptiveMuon


SETS = {
    "GPT-2 124M, 48 hidden matrices": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    "Llama-8B, one layer": [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
    + [(14336, 4096), (14336, 4096), (4096, 14336)],
}
# Stochastic rounding is left out: it works on 65 536 elements at a time on a CPU, and without data takes minutes.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 weights": {},
    "cautious decay": {"weight_decay_method": "cautious"},
}


def peak_of(shapes: list[tuple[int, int]], dtype: torch.dtype, **options: Any) -> int:
    """Return the peak of temporary bytes of a step that has its state."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
        # No value of a count can be read here.
        optimizer = AdaptiveMuon(params, nesterov=True, capturable=True, **options)
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        with Counter() as counter:
            optimizer.step()
    return counter.peak


def main() -> None:
    """Print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name, shapes in SETS.items():
        largest = 4 * max(rows * columns for rows, columns in shapes)
        for method in ("namo", "adamuon"):
            for variant, options in VARIANTS.items():
                dtype = torch.bfloat16 if "bfloat16" in variant else torch.float32
                peak = peak_of(shapes, dtype, moment2_method=method, **options)
                found.setdefault(name, {})[f"{method}, {variant}"] = {"bytes": peak, "of_largest": peak / largest}
                print(f"{name:32} {method:8} {variant:22} {peak / 2**20:8.1f} MiB  {peak / largest:5.2f} x largest")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
