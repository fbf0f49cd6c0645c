# SPDX-License-Identifier: Apache-2.0
"""Makes the figures and the tables of the results, and writes the tables into the documentation's page."""

import argparse
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from protocol import METHODS
from results import Results
from runs import VARIANTS, VARIED


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from plots import STYLES, frame


# The results that the page is about.
OWN = Path(__file__).with_name("results") / "cpu.json"
PAGE = Path(__file__).parents[2] / "docs/convergence.md"


def methods_table(results: Results) -> str:
    """Returns the methods, best first, as a Markdown table."""
    against = {run["seed"]: run["losses"][-1] for run in results.reported("muon")}
    rows = []
    for method in sorted(METHODS, key=lambda name: _rank(results.reported(name))):
        runs, rate, losses = results.reported(method), results.best(method), results.tuning_losses(method)
        differences = [run["losses"][-1] - against[run["seed"]] for run in runs]
        lowest, highest = min(losses), max(losses)
        rows.append(
            [
                method,
                f"{rate:g}",
                _spread([run["losses"][-1] for run in runs]),
                "" if method == "muon" else _range(differences, 3),
                f"{losses[rate / 2] - losses[rate]:+.3f}",
                f"{losses[rate * 2] - losses[rate]:+.3f}",
                f"{lowest:g} to {highest:g}",
            ]
        )
    head = [
        "method",
        "rate",
        "validation loss",
        "minus Muon's, by seed",
        "half the rate",
        "twice the rate",
        "rates tried",
    ]
    return _markdown(head, rows)


def variants_of(results: Results) -> list[str]:
    """Returns the variants that have been run, after "" for the methods as they are."""
    return ["", *(variant for variant in VARIANTS if all(results.reported(method, variant) for method in VARIED))]


def variants_table(results: Results) -> str:
    """Returns what each variant of NAMO and NAMO-D loses or gains, as a Markdown table."""
    rows = []
    for variant in variants_of(results):
        cells = []
        for method in VARIED:
            own = {run["seed"]: run["losses"][-1] for run in results.reported(method)}
            runs = results.reported(method, variant)
            differences = [run["losses"][-1] - own[run["seed"]] for run in runs]
            cells.append(_spread([run["losses"][-1] for run in runs]))
            cells.append(_range(differences, 4) if variant else "")
        rows.append([variant or "as in the paper", *cells])
    return _markdown(["", *(head for method in VARIED for head in (method, "minus its own, by seed"))], rows)


def draw(results: Results, path: Path) -> None:
    """Draws the curves and the sensitivity to the rate beside each other, the variants below.

    Args:
        results: All runs.
        path: Where to write the PNG.
    """
    figure = plt.figure(figsize=(11, 7.4), layout="constrained")
    panels = figure.subplot_mosaic([["curves", "rates"], ["variants", "variants"]], height_ratios=(5, 2.4))
    curves, rates, variants = panels["curves"], panels["rates"], panels["variants"]
    for method, style in STYLES.items():
        runs, losses, best = results.reported(method), results.tuning_losses(method), results.best(method)
        steps, columns = runs[0]["steps"], list(zip(*(run["losses"] for run in runs), strict=True))
        means = [statistics.fmean(column) for column in columns]
        label = f"{method}  {means[-1]:.3f}"
        bars = [_deviation(column) for column in columns]
        curves.errorbar(steps, means, bars, label=label, linewidth=1.6, markersize=4, capsize=3, **style)
        rates.plot([lr / best for lr in losses], losses.values(), linewidth=1.6, markersize=5, **style)
    high = max(filter(math.isfinite, (run["losses"][2] for method in STYLES for run in results.reported(method))))
    curves.set_ylim(None, high)
    frame(curves, "training step", "validation loss, nats per byte")
    curves.legend(title="mean, last step", frameon=False)
    rates.set_xscale("log", base=2)
    finite = [loss for method in STYLES for loss in results.tuning_losses(method).values() if math.isfinite(loss)]
    highest_best = max(min(results.tuning_losses(method).values()) for method in STYLES)
    rates.set_ylim(min(finite) - 0.02, max(min(finite) + 0.6, highest_best + 0.1))
    frame(rates, "learning rate over the method's best", "tuning loss, nats per byte")

    chosen = variants_of(results)
    names = ["as in the paper", *chosen[1:]]
    for offset, method in zip((0.15, -0.15), VARIED, strict=True):
        losses = [[run["losses"][-1] for run in results.reported(method, variant)] for variant in chosen]
        places = [len(names) - index + offset for index in range(len(names))]
        style = {**STYLES[method], "linestyle": "none"}
        variants.errorbar(
            list(map(statistics.fmean, losses)), places, xerr=list(map(_deviation, losses)), capsize=3, **style
        )
    variants.set_yticks([len(names) - index for index in range(len(names))], names)
    frame(variants, "validation loss, nats per byte", "")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def with_tables(page: str, results: Results) -> str:
    """Returns the page with its tables made anew: each follows its marker and ends at an empty line."""
    for name, table in (("methods", methods_table(results)), ("variants", variants_table(results))):
        marker = f"<!-- {name} -->\n"
        page, found = re.subn(rf"(?<={re.escape(marker)})(\|[^\n]*\n)*", lambda _, table=table: table, page)
        if found != 1:
            raise ValueError(f"The page must have the marker {marker!r} once, got it {found} times. Restore it.")
    return page


def _rank(runs: Sequence[dict[str, Any]]) -> tuple[bool, float]:
    mean = statistics.fmean(run["losses"][-1] for run in runs)
    return math.isnan(mean), mean


def _spread(losses: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not all(map(math.isfinite, losses)):
        return "diverged"
    mean = f"{statistics.fmean(losses):.4f}"
    return f"{mean} ± {_deviation(losses):.4f}" if len(losses) > 1 else mean


def _deviation(losses: Sequence[float]) -> float:
    """The standard deviation; zero of a single seed."""
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def _range(differences: Sequence[float], digits: int) -> str:
    """Mean, and in brackets the lowest and the highest."""
    mean = statistics.fmean(differences)
    return f"{mean:+.{digits}f} ({min(differences):+.{digits}f} to {max(differences):+.{digits}f})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ruler, *rows))


def write(results: Results, page: Path) -> None:
    """Draws the PNG beside the results; writes the tables into the page where the results are its own.

    Args:
        results: All runs.
        page: The page.
    """
    draw(results, results.path.with_suffix(".png"))
    if results.path.resolve() == OWN.resolve():
        page.write_text(with_tables(page.read_text(), results))
    else:
        print(f"{methods_table(results)}\n{variants_table(results)}")


def main() -> None:
    """Writes the PNG beside the results, and the tables into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=OWN)
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the markers (default: %(default)s)")
    arguments = parser.parse_args()
    write(Results(arguments.results), arguments.page)


if __name__ == "__main__":
    main()
