# SPDX-License-Identifier: Apache-2.0
"""What diagnostics cost: steps without them, beside those of another checkout, and with every step measured.

Both sides are in one process, on the same parameters, and take turns, in another order in every round:
``python benchmarks/diagnostics.py --before PATH``, where PATH is a checkout without diagnostics, such as of a git worktree.
On a CPU the process's own seconds are counted, in which other programs of a busy machine have a small part only.
"""

import argparse
import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, by_turns, circumstances, ratio, save, table
from shapes import SETS


OURS = "emerging_optimizers.adaptive_muon"


def main() -> None:
    """Measures, prints a table, and writes it as JSON."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--set", choices=SETS, default="gpt2")
    parser.add_argument("--methods", nargs="+", default=["adamuon", "normuon", "namo", "namo_d"])
    parser.add_argument("--rounds", type=int, default=30, help="counted rounds, after one to warm up")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")
    parser.add_argument("--name", default="diagnostics", help="of the JSON file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    result: dict[str, Any] = {"machine": circumstances(device), "set": args.set, "rounds": args.rounds, "methods": {}}
    for method in args.methods:
        params = SETS[args.set].params(device)  # all share them: a step costs the same whatever the numbers are
        options = {"moment2_method": method, "fp32_matmul_prec": "highest", "lr": 0.0, "weight_decay": 0.0}
        makers = {"off": adaptive_muon(), "off again": adaptive_muon()}
        if args.before:
            makers["before"] = adaptive_muon(args.before)
        steps: dict[str, Callable[[], object]] = {name: make(params, **options).step for name, make in makers.items()}
        steps["every step"] = adaptive_muon()(params, diagnostics_every=1, **options).step
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        seconds = by_turns(steps, args.rounds, device, warm_up=2, clock=clock, order=random.Random(0))
        base = "before" if args.before else "off"
        of_method = {name: ratio(of, seconds[base]) for name, of in seconds.items()}
        result["methods"][method] = {
            name: {"median_ms": 1e3 * statistics.median(of), f"x {base}": of_method[name]}
            for name, of in seconds.items()
        }
        print(method, {name: round(each["median"], 4) for name, each in of_method.items()}, flush=True)
        rows += [
            (f"{method}, {name}", f"{1e3 * statistics.median(of):.1f}", f"{of_method[name]['median']:.4f}")
            for name, of in seconds.items()
        ]
    print(table(("", "median ms", f"x {base}, median of rounds"), rows))
    print("wrote", save(args.name, result, RESULTS))


def adaptive_muon(checkout: Path | None = None) -> Any:
    """Returns the class AdaptiveMuon of this checkout, or of another one, which is imported beside it."""
    if checkout is None:
        return importlib.import_module(OURS).AdaptiveMuon
    ours = {name: sys.modules.pop(name) for name in [*sys.modules] if name == OURS or name.startswith(OURS + ".")}
    namespace = importlib.import_module("emerging_optimizers")
    path, namespace.__path__ = namespace.__path__, [str(checkout / "emerging_optimizers"), *namespace.__path__]
    attribute = namespace.__dict__.pop("adaptive_muon", None)
    try:
        other = importlib.import_module(OURS)
        assert Path(other.__file__).is_relative_to(checkout.resolve()), other.__file__
        return other.AdaptiveMuon
    finally:
        for name in [name for name in sys.modules if name == OURS or name.startswith(OURS + ".")]:
            del sys.modules[name]
        sys.modules.update(ours)
        namespace.__path__, namespace.adaptive_muon = path, attribute


if __name__ == "__main__":
    main()
