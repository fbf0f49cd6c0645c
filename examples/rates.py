# SPDX-License-Identifier: Apache-2.0
"""The file of learning rates: what was tried, what came of it, and so which rate each method is run with."""

import json
import math
from pathlib import Path
from typing import Any


COMMITTED = Path(__file__).with_name("learning_rates.json")


class Rates:
    """Tuning losses by method and learning rate, kept in a JSON file that is written after each run.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path = COMMITTED) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    @property
    def methods(self) -> dict[str, Any]:
        """What is known of each method."""
        return self.content.setdefault("methods", {})

    def start(self, setting: dict[str, Any]) -> None:
        """Notes under which setting the losses are measured.

        Raises:
            ValueError: If the file holds losses of another setting, with which they could not be compared.
        """
        setting = json.loads(json.dumps(setting))
        before = self.content.setdefault("setting", setting)
        changed = [key for key in before.keys() | setting.keys() if before.get(key) != setting.get(key)]
        if self.methods and changed:
            raise ValueError(
                f"{self.path.name} must be of one setting, got different {', '.join(sorted(changed))}. "
                "Give another file with --out, or delete it to begin again."
            )

    def add(self, method: str, lr: float, loss: float, **facts: Any) -> None:
        """Notes the tuning loss of a method at a rate (null if it diverged), chooses again, and writes the file."""
        known = self.methods.setdefault(method, {"lr": None, **facts, "tuning_loss": {}})
        known["tuning_loss"][f"{lr:g}"] = loss if math.isfinite(loss) else None
        known["tuning_loss"] = {rate: known["tuning_loss"][rate] for rate in sorted(known["tuning_loss"], key=float)}
        losses = self.losses(method)
        known["lr"] = min(losses, key=losses.__getitem__)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=2) + "\n")

    def losses(self, method: str) -> dict[float, float]:
        """Returns the tuning loss at each rate tried, by ascending rate; a diverged run's is infinite."""
        tried = self.methods.get(method, {}).get("tuning_loss", {})
        return {float(rate): math.inf if loss is None else loss for rate, loss in tried.items()}

    def chosen(self, method: str) -> float:
        """Returns the rate with the lowest tuning loss.

        Raises:
            ValueError: If none was tried.
        """
        if method not in self.methods:
            raise ValueError(
                f"{self.path.name} must have a rate for {method}, got none. Run `make sweep`, or give --lr."
            )
        return float(self.methods[method]["lr"])
