# SPDX-License-Identifier: Apache-2.0
"""The figures: validation loss while training, the matrices meanwhile, and tuning loss against the learning rate."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rates import Rates
from training import SHOWN, Record


# Okabe and Ito's colors, told apart by the colour-blind; markers and dashes tell them apart in print too.
STYLES = {
    "adamw": {"color": "#000000", "marker": "o", "linestyle": "--"},
    "muon": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    "adamuon": {"color": "#56B4E9", "marker": "^", "linestyle": "-"},
    "normuon": {"color": "#009E73", "marker": "v", "linestyle": "-"},
    "namo": {"color": "#0072B2", "marker": "D", "linestyle": "-"},
    "namo_d": {"color": "#D55E00", "marker": "*", "linestyle": "-"},
}


def curves(records: Sequence[Record], path: Path) -> None:
    """Draws the validation loss of the records against steps and against seconds of training.

    Args:
        records: Best first; the legend keeps this order.
        path: Where to write the PNG.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for record in records:
        for axes, progress in zip(panels, (record.steps, record.seconds), strict=True):
            label = f"{record.method}  {record.final_loss:.3f}"
            axes.plot(progress, record.losses, label=label, linewidth=1.6, markersize=4, **STYLES[record.method])
    frame(panels[0], "training step", "validation loss, nats per byte")
    frame(panels[1], "seconds of training, evaluation left out", "")
    panels[0].set_ylim(*_range(records))
    for axes in panels:
        axes.set_xlim(left=0)
    panels[1].legend(title="loss after the last step", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# What the rows of the second figure are called.
TITLES = {"cosine": "cosine of gradient\nand momentum", "update_ratio": "RMS of the update\nover that of the weight"}


def matrices(records: Sequence[Record], path: Path) -> bool:
    """Draws what AdaptiveMuon measured of its matrices: a thin line for each of them, and their median.

    Args:
        records: Best first; the panels keep this order.
        path: Where to write the PNG.

    Returns:
        Whether there was anything to draw.
    """
    measured = [record for record in records if record.measured]
    if not measured:
        return False
    size = {"figsize": (2.2 + 2.6 * len(measured), 5.6), "layout": "constrained"}
    figure, panels = plt.subplots(len(SHOWN), len(measured), sharex=True, sharey="row", squeeze=False, **size)
    for row, value in zip(panels, SHOWN, strict=True):
        for axes, record in zip(row, measured, strict=True):
            color, lines = STYLES[record.method]["color"], [*record.measured[value].values()]
            for line in lines:
                axes.plot(record.measured_steps, line, color=color, linewidth=0.6, alpha=0.35)
            medians = [statistics.median(of_step) for of_step in zip(*lines, strict=True)]
            axes.plot(record.measured_steps, medians, color=color, linewidth=2.2)
            frame(axes, "training step" if value == SHOWN[-1] else "", TITLES[value] if axes is row[0] else "")
            axes.set_yscale("log" if value == "update_ratio" else "linear")
            if value == SHOWN[0]:
                axes.set_title(f"{record.method}, {len(lines)} matrices", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def sweep(rates: Rates, path: Path) -> None:
    """Draws the tuning loss of each method against its learning rate, on logarithmic rates."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    methods = [method for method in STYLES if rates.losses(method)]
    for method in methods:
        losses = rates.losses(method)
        label = f"{method}  {rates.chosen(method):g}"
        axes.plot(losses.keys(), losses.values(), label=label, linewidth=1.6, markersize=5, **STYLES[method])
    frame(axes, "peak learning rate of the hidden matrices", "tuning loss, nats per byte")
    axes.set_xscale("log")
    axes.legend(title="best rate", frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def frame(axes: Axes, horizontal: str, vertical: str) -> None:
    """Names the axes, and draws them lightly."""
    axes.set(xlabel=horizontal, ylabel=vertical)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _range(records: Sequence[Record]) -> tuple[float, float]:
    """From the lowest loss to the highest at a sixth of the way: the first fall from a random model is cut off."""
    lows = [min(filter(math.isfinite, record.losses), default=0.0) for record in records]
    highs = [record.losses[len(record.losses) // 6] for record in records]
    low, high = min(lows), max(filter(math.isfinite, highs), default=math.log(256))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
