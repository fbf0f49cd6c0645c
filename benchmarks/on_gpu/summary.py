# SPDX-License-Identifier: Apache-2.0
"""One table of what was measured: the step of ours against the others' and the floor; what failed; the worst errors."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import table
from on_gpu.record import NOT_MEASURED, RAISED, worst


PARTS = ("right", "fast", "exact")
OURS = "ours namo"


def summary(directory: Path) -> str:
    """Return the table, and a few lines on each part, from the JSON files that there are in a folder."""
    parts = {part: path for part in PARTS if (path := directory / f"gpu-{part}.json").exists()}
    contents = {part: json.loads(path.read_text(encoding="utf-8")) for part, path in parts.items()}
    lines = [*_steps(contents["fast"]["measurements"])] if "fast" in contents else ["The part fast has not run."]
    for part in PARTS:
        lines += [*_notes(part, contents[part])] if part in contents else [f"{part}: has not run"]
    return "\n".join(lines)


def floor_ms(run: dict[str, Any], bytes_per_second: float, flops_per_second: float) -> float:
    """Return the least milliseconds of a step: its bytes at the copy's bandwidth, its products at the product's rate."""
    return 1e3 * (run["floor_bytes"] / bytes_per_second + run["flops"]["floor"] / flops_per_second)


def _steps(found: dict[str, Any]) -> Iterator[str]:
    """The table of steps, a column for each set."""
    runs = {name.removeprefix("step "): run for name, run in found.items() if "contestants" in run}
    if not runs:
        yield "No step was measured."
        return
    names = list(dict.fromkeys(name for run in runs.values() for name in run["contestants"]))
    rows = [[name, *(_cell(run["contestants"].get(name, {}), "median_ms") for run in runs.values())] for name in names]
    for title, what, key in (("graph", "graph", "ms"), ("eager", "eager", "ms"), ("enqueued", "eager", "cpu_ms")):
        rows.append([f"{OURS}, {title}", *(_cell(found.get(f"{what} {name}", {}), key) for name in runs)])
    copy, product = found.get("ceiling: copy", {}), found.get("ceiling: product", {})
    if "bytes_per_second" in copy and "flops_per_second" in product:
        ceilings = copy["bytes_per_second"], product["flops_per_second"]
        rows.append(["floor", *(f"{floor_ms(run, *ceilings):.3g}" for run in runs.values())])
        rates = f"{ceilings[0] / 1e12:.3g} TB/s and {ceilings[1] / 1e12:.4g} TFLOP/s"
    else:
        rates = "not measured: no floor"
    yield "Milliseconds per step\n"
    yield table(("", *runs), rows)
    yield f"\nceilings: {rates}"


def _cell(measured: dict[str, Any], key: str) -> str:
    return f"{measured[key]:.3g}" if key in measured else "-"


def _notes(part: str, content: dict[str, Any]) -> Iterator[str]:
    """What a part has beside the table, and what is missing of it."""
    found = content["measurements"]
    missing = {kind: [name for name, each in found.items() if kind in each] for kind in (RAISED, NOT_MEASURED)}
    stopped = "" if content["complete"] else ", stopped before its end"
    yield f"{part}: {len(found) - sum(map(len, missing.values()))} measured{stopped}"
    for kind, names in missing.items():
        if names:
            yield f"  {kind} ({len(names)}): {'; '.join(names[:12])}{' ...' if len(names) > 12 else ''}"
    for name, each in found.items():
        if "passed" in each:
            yield f"  {name}: " + ", ".join(f"{each[key]} {key}" for key in ("passed", "failed", "skipped", "error"))
            failures = [line for line in each.get("output", "").splitlines() if line.startswith(("FAILED", "ERROR"))]
            yield from (f"    {line[:160]}" for line in failures[:10])
        if "steps" in each:
            shares = (f"{name} {100 * step['share']:.2g} %" for name, step in each["steps"].items())
            yield f"  share of a training step: {', '.join(shares)}"
        if name.startswith(("diagnostics ", "bfloat16 ")) and "off" in each:
            yield f"  {name}: " + ", ".join(f"{key} {of['ms']:.2f} ms ({of['ratio']:.3f})" for key, of in each.items())
        if name.startswith("rounding ") and "ours" in each:
            yield f"  {name}: " + ", ".join(f"{who} {error:.1e}" for who, error in each.items())
    yield from _products(found)
    yield from _distances(found)


def _products(found: dict[str, Any]) -> Iterator[str]:
    """Each symmetric product: the library's time, ours, and the errors."""
    for name, theirs in found.items():
        ours = found.get(name.replace(", torch", ", our kernel"), {})
        if name.startswith("product ") and name.endswith(", torch") and "ms" in theirs and "ms" in ours:
            ratio = ours["ms"] / theirs["ms"]
            yield (
                f"  {name.removesuffix(', torch')}: torch {theirs['ms']:.4f} ms, ours {ours['ms']:.4f} ms ({ratio:.2f}), "
                f"errors {theirs['error']:.1e} and {ours['error']:.1e}"
            )


def _distances(found: dict[str, Any]) -> Iterator[str]:
    """The largest distance of sharded from whole matrices, for each number of ranks, method and precision."""
    distances: dict[str, list[float]] = defaultdict(list)
    for name, each in found.items():
        if "distance" in each:
            ranks, _, *rest = name.split(", ")
            key = ", ".join([ranks, *rest])
            distances[key].append(each["distance"])
    for key, values in distances.items():
        yield f"  {key}: at most {worst(values):.1e} from the whole"
