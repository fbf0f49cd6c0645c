# SPDX-License-Identifier: Apache-2.0
"""Trains a small Conformer-CTC in NeMo with AdamW and with each method of adaptive_muon, and draws their losses.

Every run is NeMo's own script flow, speech_to_text_ctc.py, which differs by its ``optim`` block only. --sweep chooses
the learning rates first, on other utterances and another seed, and writes them to learning_rates.json. A name such as
"namo_d+conv" is a method with ``flatten_conv``; --method has those to compare.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib


matplotlib.use("Agg")

import lightning.pytorch as pl
import matplotlib.pyplot as plt
from nemo.utils import logging
from omegaconf import OmegaConf
from speech_to_text_ctc import main as nemo_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm
from wavs import write_manifests


sys.path.append(str(Path(__file__).parents[1]))  # the other examples'

from plots import STYLES
from rates import Rates


HERE = Path(__file__).parent
# The first rates tried; while the best is at an end of those tried, the sweep goes on beyond it.
FIRST_RATES = {
    "adamw": [1e-3, 2e-3, 4e-3],
    "adamuon": [1e-3, 2e-3, 4e-3],
    "normuon": [1e-2, 2e-2, 4e-2],
    "namo": [1e-2, 2e-2, 4e-2],
    "namo_d": [1e-2, 2e-2, 4e-2],
}
CONV = "+conv"
ALL = [*FIRST_RATES, *(method + CONV for method in FIRST_RATES if method != "adamw")]
TRAIN, VALIDATION, ERRORS = "train_loss", "val_loss", "val_wer"


def optim_block(method: str, lr: float, scalar_lr: float | None) -> dict[str, Any]:
    """The ``optim`` block of a method; AdamW's is what NeMo users have today."""
    block: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(HERE / "conformer_ctc.yaml").model.optim)  # type: ignore[assignment]
    if method == "adamw":
        kept = {key: block[key] for key in ("betas", "weight_decay", "sched")}
        return {"name": "adamw", "lr": lr, **kept}
    switch = {"flatten_conv": True} if method.endswith(CONV) else {}
    return {**block, "lr": lr, "moment2_method": method.removesuffix(CONV), "scalar_lr": scalar_lr, **switch}


def train(block: dict[str, Any], data: Path, folder: Path, *, seed: int, steps: int) -> dict[str, Any]:
    """Trains once with NeMo.

    Args:
        block: The ``optim`` block.
        data: Folder with the manifests.
        folder: Where NeMo's experiment goes.
        seed: Seed of the weights and of the order of the batches.
        steps: Number of steps.

    Returns:
        Losses by step, and NeMo's validation loss and word error rate after the last step.
    """
    config = OmegaConf.load(HERE / "conformer_ctc.yaml")
    config.model.optim = block
    config.model.train_ds.manifest_filepath = str(data / "train.json")
    config.model.validation_ds.manifest_filepath = str(data / "validation.json")
    config.trainer.max_steps = config.trainer.val_check_interval = steps  # validate once, at the end
    config.trainer.check_val_every_n_epoch = None
    config.trainer.enable_progress_bar = False
    config.exp_manager.exp_dir = str(folder)
    config.exp_manager.create_tensorboard_logger = True
    pl.seed_everything(seed)
    nemo_script(config)
    events = EventAccumulator(str(next(folder.rglob("events.out.*")).parent))
    events.Reload()
    read = {tag: [event.value for event in events.Scalars(tag)] for tag in (TRAIN, VALIDATION, ERRORS)}
    return {"losses": read[TRAIN], VALIDATION: read[VALIDATION][-1], ERRORS: read[ERRORS][-1], "seed": seed}


def untried(rates: Rates, method: str) -> Iterator[float]:
    """Yields the rates still to be tried: the first ones, then one beyond the end where the best is."""
    yield from (lr for lr in FIRST_RATES[method.removesuffix(CONV)] if lr not in rates.losses(method))
    while (best := rates.chosen(method)) in (min(rates.losses(method)), max(rates.losses(method))):
        yield best / 2 if best == min(rates.losses(method)) else best * 2


def sweep(rates: Rates, methods: Sequence[str], folder: Path, steps: int) -> None:
    """Tries what is untried of each method; all but AdamW train the AdamW part at the rate chosen for AdamW."""
    write_manifests(folder / "data", seed=1)
    rates.start({"steps": steps, "seed": 100, "data_seed": 1, "chosen_by": VALIDATION})
    for method in methods:
        for lr in untried(rates, method):
            tqdm.write(f"{method} at {lr:g}")
            block = optim_block(method, lr, None if method == "adamw" else rates.chosen("adamw"))
            run = train(block, folder / "data", folder / f"{method}-{lr:g}", seed=100, steps=steps)
            rates.add(method, lr, run[VALIDATION], optim=block)


def compare(
    rates: Rates, methods: Sequence[str], folder: Path, steps: int, seeds: int
) -> dict[str, list[dict[str, Any]]]:
    """Trains each method at its chosen rate with several seeds."""
    write_manifests(folder / "data", seed=0)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for method, seed in tqdm([(method, seed) for seed in range(seeds) for method in runs]):
        block = optim_block(method, rates.chosen(method), None if method == "adamw" else rates.chosen("adamw"))
        runs[method].append(train(block, folder / "data", folder / f"{method}-seed{seed}", seed=seed, steps=steps))
    return runs


def table(rates: Rates, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the results as text: means over the seeds, and the spread of the validation loss."""
    width = max(8, *map(len, runs))
    lines = [
        f"{'method':{width}} {'rate':>7} {'steps to a loss of 1':>21} {'validation loss':>16} {'min to max':>15} {'WER':>7}"
    ]
    for method, of_method in runs.items():
        first = [next((i for i, loss in enumerate(run["losses"]) if loss < 1), None) for run in of_method]
        reached = "-" if None in first else f"{mean(step for step in first if step is not None):.0f}"
        losses = [run[VALIDATION] for run in of_method]
        spread = f"{min(losses):.3f} to {max(losses):.3f}"
        errors = mean(run[ERRORS] for run in of_method)
        lines.append(
            f"{method:{width}} {rates.chosen(method):7g} {reached:>21} {mean(losses):16.3f} {spread:>15} {errors:7.1%}"
        )
    return "\n".join(lines)


def draw(rates: Rates, runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws the training losses of the runs, and the tuning losses against the rates."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for method, of_method in runs.items():
        style = {**STYLES[method.removesuffix(CONV)], "linewidth": 1.6, "markersize": 4}
        style |= {"linestyle": ":"} if method.endswith(CONV) else {}
        curve = [mean(each) for each in zip(*(run["losses"] for run in of_method), strict=True)]
        left.plot(range(1, len(curve) + 1), curve, label=method, **style, markevery=10)
        losses = rates.losses(method)
        right.plot(losses.keys(), losses.values(), label=f"{method}  {rates.chosen(method):g}", **style)
    left.set(xlabel="step", ylabel="CTC loss, mean of the seeds", yscale="log")
    right.set(xlabel="learning rate of the matrices", ylabel="tuning loss", xscale="log", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    left.legend(frameon=False)
    right.legend(title="best rate", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Trains, prints the table, writes JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--method", action="append", choices=ALL, help="one of them; may be repeated (default: all without +conv)"
    )
    parser.add_argument("--sweep", action="store_true", help="choose the learning rates first")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/nemo"), help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    # NeMo's script reads the command line too, where it is a script.
    del sys.argv[1:]
    logging.setLevel(logging.ERROR)
    out = arguments.out.resolve()
    rates, methods = Rates(HERE / "learning_rates.json"), arguments.method or [*FIRST_RATES]
    with TemporaryDirectory() as folder:
        if arguments.sweep:
            sweep(rates, methods, Path(folder) / "sweep", arguments.steps)
        runs = compare(rates, methods, Path(folder), arguments.steps, arguments.seeds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(runs, indent=1) + "\n")
    draw(rates, runs, out / "compare.png")
    print(table(rates, runs))
    print(f"\nMeasurements: {out / 'compare.json'}   Curves: {out / 'compare.png'}")


if __name__ == "__main__":
    main()
