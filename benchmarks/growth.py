# SPDX-License-Identifier: Apache-2.0
"""How the time of a step grows with the size of the matrices, and with their number."""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, by_turns, circumstances, ratio, save
from contestants import contestants, twin
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from shapes import ShapeSet


METHOD = "namo"


def main() -> None:
    """Measures both, draws them, and writes PNG and JSON."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 128, 256, 512, 1024, *([2048, 4096] if cuda else [])]
    )
    parser.add_argument("--aspect", type=int, default=4, help="columns for each row in the growth with size")
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--size", type=int, default=128, help="sides of the matrices in the growth with their number")
    parser.add_argument("--precisions", nargs="+", default=["highest", "medium"] if cuda else ["highest"])
    parser.add_argument("--rounds", type=int, default=20 if cuda else 7)
    parser.add_argument("--directory", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    sweeps = {
        f"one matrix of n x {args.aspect} n": {n: ((n, args.aspect * n),) for n in args.sizes},
        f"n matrices of {args.size} x {args.size}": {n: ((args.size, args.size),) * n for n in args.numbers},
    }
    result: dict[str, Any] = {"machine": circumstances(device), "rounds": args.rounds, "sweeps": {}}
    figure, axes = plt.subplots(len(args.precisions), 2, figsize=(10, 4 * len(args.precisions)), squeeze=False)
    for row, precision in zip(axes, args.precisions, strict=True):
        for axis, (title, sweep) in zip(row, sweeps.items(), strict=True):
            measured = {
                n: measure(ShapeSet(title, shapes), precision, args.rounds, device) for n, shapes in sweep.items()
            }
            result["sweeps"][f"{title}, {precision}"] = measured
            draw(axis, f"{title}, {precision}", measured)
    figure.tight_layout()
    path = save("growth", result, args.directory)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    print("wrote", path, "and", path.with_suffix(".png"))


def measure(of: ShapeSet, precision: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Returns the milliseconds of every contestant's step."""
    params = of.params(device)
    taking_part = {
        name: make(params)
        for name, make in contestants(precision, ["auto", "standard"])
        if name.removeprefix("ours ").removeprefix("upstream ").split()[0] == METHOD or name == "torch AdamW"
    }
    seconds = by_turns({name: each.step for name, each in taking_part.items()}, rounds, device, warm_up=2)
    return {
        name: {"median_ms": 1e3 * statistics.median(each), "against": ratio(each, seconds[twin(name)])}
        for name, each in seconds.items()
    }


def draw(axis: Axes, title: str, measured: dict[int, dict[str, Any]]) -> None:
    """Draws one sweep: milliseconds over n, a line for each contestant."""
    for name in next(iter(measured.values())):
        axis.plot(list(measured), [each[name]["median_ms"] for each in measured.values()], marker="o", label=name)
    axis.set(title=title, xlabel="n", ylabel="milliseconds per step", xscale="log", yscale="log")
    axis.set_xticks(list(measured), [str(n) for n in measured])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
