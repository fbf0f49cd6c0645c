# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks have in common: the machine's description, timing by turns, tables, JSON."""

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


RESULTS = Path(__file__).parent / "results"


def circumstances(device: torch.device) -> dict[str, Any]:
    """Returns the machine and the versions that a result depends on."""
    packages = ("torch", "emerging-optimizers", "emerging-optimizers-adaptive-muon")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
    }


def installed(package: str) -> str:
    """Returns the version of a package, or that it is not installed: ours may lie in the path as files alone."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1] for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def by_turns(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
    *,
    clock: Callable[[], float] = time.perf_counter,
    order: random.Random | None = None,
) -> dict[str, list[float]]:
    """Returns the seconds of every round of every contestant, who take turns: drift of the machine meets them all.

    Args:
        steps: What each contestant does in a round.
        rounds: How many rounds are counted.
        device: What a round waits for.
        warm_up: How many rounds there are before.
        clock: Returns the seconds.
        order: Draws another order for each round; None for that of ``steps``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in tqdm(range(warm_up + rounds), desc="rounds", leave=False, disable=None):
        for name in [*steps] if order is None else order.sample([*steps], len(steps)):
            _wait(device)
            start = clock()
            steps[name]()
            _wait(device)
            if index >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns the ratio of two contestants, round by round: its median and its range."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ) + " |"  # fmt: skip

    rule = "|" + "|".join("-" * (width + 1) + ("-" if not index else ":") for index, width in enumerate(widths)) + "|"
    return "\n".join([line(headings), rule, *map(line, rows)])


def save(name: str, result: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Writes a result as JSON, and returns where."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
