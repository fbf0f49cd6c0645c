# SPDX-License-Identifier: Apache-2.0
"""Peak temporary memory of an optimizer step: all that a step allocates beyond weights, gradients and state.

Allocations are counted by torch's dispatcher, on tensors without data, so that any model fits any machine.
"""

import argparse
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it has made."""
        kwargs = kwargs or {}
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_of(shapes: list[tuple[int, int]], dtype: torch.dtype, **options: Any) -> int:
    """Return the peak of temporary bytes of a step that has its state."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
        # No value of a count can be read here.
        optimizer = AdaptiveMuon(params, nesterov=True, capturable=True, **options)
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        with Peak() as counted:
            optimizer.step()
    return counted.peak


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
