# SPDX-License-Identifier: Apache-2.0
"""What the demo says at the end: a table for the reader, and the same with all its circumstances for a program."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from methods import METHODS
from training import Protocol, Record


COLUMNS = (
    ("", "method"),
    ("learning", "rate"),
    ("train", "loss"),
    ("validation", "loss"),
    ("steps to", "AdamW's"),
    ("seconds to", "AdamW's"),
    ("ms", "per step"),
    ("of these", "optimizer"),
    ("state bytes", "per parameter"),
)


def table(records: Sequence[Record]) -> str:
    """Returns the measurements as text, one method per line, in the order given."""
    goal = next((record.final_loss for record in records if record.method == "adamw"), None)
    rows = [[heading[0] for heading in COLUMNS], [heading[1] for heading in COLUMNS]]
    rows += [_row(record, goal) for record in records]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines.insert(2, "-" * len(lines[0]))
    return "\n".join(lines)


def _row(record: Record, goal: float | None) -> list[str]:
    reached = None if goal is None else record.first_step_at(goal)
    seconds = None if reached is None else record.seconds[record.steps.index(reached)]
    return [
        record.method,
        f"{record.lr:g}",
        f"{record.final_train_loss:.4f}",
        f"{record.final_loss:.4f}",
        "-" if reached is None else str(reached),
        "-" if seconds is None else f"{seconds:.1f}",
        f"{record.step_ms:.1f}",
        f"{record.optimizer_ms:.1f}",
        f"{record.state_bytes_per_parameter:.2f}",
    ]


def footnote(protocol: Protocol, seed: int, sweep: dict[str, Any] | None) -> str:
    """Returns what one must know to read the table.

    Args:
        protocol: What all methods had in common.
        seed: Of this run.
        sweep: The setting under which the learning rates were chosen, or None if the user gave the rate.
    """
    chosen = "learning rate was given with --lr."
    if sweep is not None:
        chosen = f"""learning
rates were chosen on other text, the tuning part of {sweep["text"]["source"]},
in {sweep["steps"]} steps with seed {sweep["seed"]} (examples/learning_rates.json)."""
    tail = protocol.tail(protocol.steps)
    return f"""\
Sorted: the method that learned most in {protocol.steps} steps comes first. One seed, {seed}: differences of a hundredth may be chance.
Losses are in nats per byte (bits: divide by 0.693). The validation text served for nothing but this table; the {chosen} Train loss: mean of the last {tail} batches.
To AdamW's: the first evaluation, every {max(1, protocol.steps // protocol.evaluations)} steps, with a validation loss as low as AdamW's last one; - if never."""


def document(records: Sequence[Record], protocol: Protocol, text: dict[str, Any], seed: int, device: str) -> str:
    """Returns everything that was set and measured, as JSON; no name or path of this machine is in it."""
    facts = {
        "protocol": asdict(protocol),
        "seed": seed,
        "text": text,
        "methods": {record.method: METHODS[record.method].settings for record in records},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "emerging-optimizers", "emerging-optimizers-adaptive-muon")},
        },
        "machine": machine(device),
        "records": [{"final_loss": record.final_loss, **asdict(record)} for record in records],
    }
    # JSON has no word for the losses of a run that diverged: null.
    return json.dumps(json.loads(json.dumps(facts), parse_constant=lambda _: None), indent=2) + "\n"


def machine(device: str) -> dict[str, Any]:
    """Returns what kind of machine this is, and nothing that tells which."""
    facts = {"processor": _processor(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    return facts if device == "cpu" else facts | {"accelerator": torch.cuda.get_device_name()}


def _processor() -> str:
    """The processor's name: Linux keeps it in a file, other systems tell Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
