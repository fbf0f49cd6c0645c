# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, against everyone else on the same matrices, in one run: ``make bench``."""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, by_turns, circumstances, ratio, save, table
from contestants import contestants, twin
from counting import counted
from shapes import SETS, ShapeSet


def main() -> None:
    """Measures, prints a table for every set and precision, and writes it all as JSON."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, default=["gpt2", *(["llama8b-layer"] if cuda else []), "48x256", "200x64"]
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=["highest", "high", "medium"], default=["highest", "medium"]
    )
    parser.add_argument("--algorithms", nargs="+", choices=["auto", "gram", "standard"], default=["auto"])
    parser.add_argument("--only", nargs="+", help="contestants whose names contain one of these words")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 5, help="counted rounds, after one to warm up")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if not given")
    parser.add_argument("--name", default="step", help="of the JSON file")
    parser.add_argument("--directory", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result: dict[str, Any] = {"machine": circumstances(device), "rounds": args.rounds, "runs": []}
    for name in args.sets:
        for precision in args.precisions:
            run = measure(SETS[name], precision, args, device)
            result["runs"].append({"set": name, "precision": precision, **run})
            print(f"\n{SETS[name].title}, {precision}\n\n{as_table(run)}", flush=True)
    print("\nwrote", save(args.name, result, args.directory))


def measure(of: ShapeSet, precision: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Returns what was measured on one set of matrices."""
    params = of.params(device)  # all contestants share them: a step costs the same whatever the numbers are
    optimizers = {
        name: make(params)
        for name, make in contestants(precision, args.algorithms)
        if not args.only or any(word in name for word in args.only)
    }
    for optimizer in optimizers.values():
        optimizer.step()
    counts = {name: counted(optimizer) for name, optimizer in optimizers.items()}
    seconds = by_turns({name: optimizer.step for name, optimizer in optimizers.items()}, args.rounds, device)
    rows = {}
    for name in optimizers:
        against = {twin(name): ratio(seconds[name], seconds[twin(name)])} if twin(name) in seconds else {}
        rows[name] = {
            "ms": [1e3 * each for each in seconds[name]],
            "median_ms": 1e3 * statistics.median(seconds[name]),
            "against": against,
            **counts[name],
        }
    return {
        "title": of.title,
        "elements": of.elements,
        "flops": of.flops(),
        "floor_bytes": of.bytes(),
        "contestants": rows,
    }


def as_table(run: dict[str, Any]) -> str:
    """Returns one run as a table for people."""
    headings = (
        "",
        "ms",
        "x upstream",
        "range",
        "flops x floor",
        "bytes x floor",
        "launches",
        "peak B/el",
        "state B/el",
    )
    rows = []
    for name, row in run["contestants"].items():
        [against] = row["against"].values() or [None]
        rows.append(
            (
                name,
                f"{row['median_ms']:.3g}",
                f"{against['median']:.2f}" if against else "-",
                f"{against['min']:.2f}-{against['max']:.2f}" if against else "-",
                f"{row['flops'] / run['flops']['floor']:.2f}",
                f"{row['bytes'] / run['floor_bytes']:.1f}",
                str(row.get("kernel_launches", row["operations"])),
                f"{row['peak_temporary_bytes'] / run['elements']:.1f}",
                f"{row['state_bytes'] / run['elements']:.2f}",
            )
        )
    return table(headings, rows)


if __name__ == "__main__":
    main()
