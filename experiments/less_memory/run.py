# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's model with state or weights in bfloat16 and in float32, several seeds each, and prints a table.

Stop it when you like: it goes on where it was. Forward and backward are in float32 in every run.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, override

import torch


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))

from gpt import GPT, Shape  # noqa: E402
from rates import Rates  # noqa: E402
from text import load  # noqa: E402
from training import Protocol, train  # noqa: E402


METHOD = "namo"
SIZES = {
    "demo": Protocol(),
    # For tests: whether everything works together.
    "tiny": Protocol(batch=2, evaluation_windows=4, shape=Shape(layers=1, width=16, heads=2, context=16)),
}
WHOLE = "float32"
# For each kind of run, whether its weights are in bfloat16, and its options.
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    WHOLE: (False, {}),
    "momentum in bfloat16": (False, {"momentum_dtype": "bfloat16"}),
    "weights in bfloat16, to nearest": (True, {}),
    "weights in bfloat16, stochastic": (True, {"stochastic_rounding": True}),
}


class Bfloat16GPT(GPT):
    """The model with its weights in bfloat16, of which every forward makes float32 copies."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__(shape, seed)
        self.bfloat16()

    @override
    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Maps bytes to scores, with the float32 copies in the weights' places."""
        if self.norm.weight.dtype == torch.float32:
            return super().forward(text)
        copies = {name: p.float() for name, p in self.named_parameters()}
        scores: torch.Tensor = torch.func.functional_call(self, copies, (text,))
        return scores


def table(runs: dict[str, dict[str, float]]) -> str:
    """Returns the losses, and their differences from float32 of the same seed, as a Markdown table."""
    rows = ["| | final loss | minus float32, by seed |", "|---|---:|---|"]
    for kind, by_seed in runs.items():
        both = [(loss, runs[WHOLE][seed]) for seed, loss in by_seed.items() if seed in runs.get(WHOLE, {})]
        minus = ", ".join(f"{loss - whole:+.4f}" for loss, whole in both) if kind != WHOLE else ""
        rows.append(f"| {kind} | {statistics.fmean(by_seed.values()):.4f} | {minus} |")
    return "\n".join(rows)


def main() -> None:
    """Runs what has not been run, writes each result, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="one or several (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--steps", type=int, default=150, help="training steps a run (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the model (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, help="your text, a file or directory (default: Python's standard library)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json", help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    protocol = replace(SIZES[arguments.size], steps=arguments.steps, evaluations=3)
    rates, text = Rates(), load(arguments.data)
    setting = {"protocol": asdict(protocol), "method": METHOD, "text": text.describe()}
    found = {"setting": setting, "torch": torch.__version__, "runs": {}}
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text())
        if found["setting"] != json.loads(json.dumps(setting)):
            parser.error(f"{arguments.out} must be of the same setting, got another. Give another file with --out.")
    runs: dict[str, dict[str, float]] = found["runs"]
    for seed in arguments.seeds:
        for kind in arguments.kind or KINDS:
            if str(seed) in runs.get(kind, {}):
                continue
            in_bfloat16, changes = KINDS[kind]
            record = train(
                METHOD,
                text.train,
                text.validation,
                lr=rates.chosen(METHOD),
                scalar_lr=rates.chosen("adamw"),
                protocol=protocol,
                seed=seed,
                show=False,
                changes=changes,
                make_model=Bfloat16GPT if in_bfloat16 else GPT,
            )
            runs.setdefault(kind, {})[str(seed)] = record.final_loss
            print(f"{kind}, seed {seed}: {record.losses}", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
