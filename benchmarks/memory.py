# SPDX-License-Identifier: Apache-2.0
"""Peak temporary memory of an optimizer step: all that a step allocates beyond weights, gradients and state.

Allocations are counted by torch's dispatcher, on tensors without data, so that any model fits any machine. Started by
``torchrun --nproc_per_node 4 benchmarks/memory.py``, it counts a step with tensor parallelism over its ranks, in each mode.
These have data, but products of matrices are not computed: no allocation depends on what is in them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from counting import Counter
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


class WithoutProducts(TorchDispatchMode):
    """Leaves out batched products of matrices: their results have no values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            return func(*args, **(kwargs or {}))
        if "out" in (kwargs or {}):
            return kwargs["out"]
        left, right = args[-2:]
        return left.new_empty((left.size(0), left.size(1), right.size(2)))


def peak_of_shards(shapes: list[tuple[int, int]], mode: str, cap: int) -> int:
    """Return the peak of temporary bytes of a step of namo, of the rank that has most, split along the rows."""
    ranks, params = dist.get_world_size(), []
    for rows, columns in shapes:
        p = torch.nn.Parameter(torch.zeros(rows // ranks, columns))
        p.partition_dim = 0  # type: ignore[attr-defined]
        p.grad = torch.ones_like(p)
        params.append(p)
    group: Any = dist.group.WORLD
    optimizer = AdaptiveMuon(
        params, moment2_method="namo", nesterov=True, tp_group=group, tp_mode=mode, max_bytes_in_flight=cap
    )
    with WithoutProducts():
        optimizer.step()
        with Counter() as counter:
            optimizer.step()
    peak = torch.tensor(counter.peak)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def of_ranks(out: Path | None) -> None:
    """Print the peaks with tensor parallelism, and write the numbers."""
    dist.init_process_group("gloo")
    found: dict[str, dict[str, int]] = {}
    for name, shapes in SETS.items():
        for mode in ("layer_sharded", "duplicated", "distributed"):
            for cap in (2**30, 2**26):
                peak = peak_of_shards(shapes, mode, cap)
                found.setdefault(name, {})[f"{mode}, {cap}"] = peak
                if dist.get_rank() == 0:
                    print(f"{name:32} {mode:14} cap {cap / 2**20:6.0f} MiB {peak / 2**20:8.1f} MiB", flush=True)
    if out and dist.get_rank() == 0:
        out.write_text(json.dumps(found, indent=1) + "\n")
    dist.destroy_process_group()


def main() -> None:
    """Print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if dist.is_torchelastic_launched():
        of_ranks(arguments.out)
        return
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
