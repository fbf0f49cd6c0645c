# SPDX-License-Identifier: Apache-2.0
"""What came of the runs: a JSON file, written after every run, from which an experiment goes on."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


__all__ = ["Results"]


class Results:
    """The losses of all runs by their keys.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"setting": {}, "runs": {}}

    def __contains__(self, key: str) -> bool:
        return key in self.runs

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """What each run was and what it measured."""
        runs: dict[str, dict[str, Any]] = self.content["runs"]
        return runs

    def start(self, setting: dict[str, Any]) -> None:
        """Notes the setting of all runs.

        Raises:
            ValueError: If the file has runs of another setting, with which new ones could not be compared.
        """
        setting = json.loads(json.dumps(setting))
        before = self.content["setting"] if self.runs else setting
        changed = sorted(key for key in before.keys() | setting.keys() if before.get(key) != setting.get(key))
        if changed:
            raise ValueError(
                f"{self.path} must be of one setting, got different {', '.join(changed)}. Give another file with "
                "--results, or move it away to begin again."
            )
        self.content["setting"] = setting

    def add(self, key: str, facts: dict[str, Any]) -> None:
        """Notes what a run was and measured, and writes the file; a loss that is not finite becomes null."""
        self.runs[key] = _finite(facts)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(beside, self.path)  # a reader, or a stop in between, never meets half a file

    def of(self, **facts: Any) -> Iterator[dict[str, Any]]:
        """Yields the runs with these facts."""
        return (run for run in self.runs.values() if all(run[name] == value for name, value in facts.items()))

    def tuning_losses(self, method: str) -> dict[float, float]:
        """Returns the tuning loss of a method at every rate tried, by ascending rate; a diverged run's is infinite."""
        losses = {run["lr"]: run["losses"][-1] for run in self.of(stage="sweep", method=method)}
        return {lr: math.inf if losses[lr] is None else losses[lr] for lr in sorted(losses)}

    def best(self, method: str) -> float:
        """Returns the rate of a method with the lowest tuning loss."""
        losses = self.tuning_losses(method)
        return min(losses, key=losses.__getitem__)

    def reported(self, method: str, variant: str = "") -> list[dict[str, Any]]:
        """Returns the runs of a method at its best rate, by seed; the losses of one that diverged end in NaN."""
        runs = sorted(self.of(stage="report", method=method, variant=variant), key=lambda run: run["seed"])
        return [run | {"losses": [math.nan if loss is None else loss for loss in run["losses"]]} for run in runs]


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value
