# SPDX-License-Identifier: Apache-2.0
"""Chooses each method's learning rate by its loss on the tuning text, which training never sees.

A method's first five rates are in methods.py, each twice the one before; while the best is at an end of those tried,
the next beyond it is tried too. Stop it when you like: it goes on where it was.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import options
import plots
from methods import METHODS
from rates import COMMITTED, Rates
from text import Text
from tqdm import tqdm
from training import Protocol, train


def untried(rates: Rates, method: str) -> Iterator[float]:
    """Yields the rates still to be tried: the first ones, then one beyond the end where the best is."""
    tried = {f"{lr:g}" for lr in rates.losses(method)}
    yield from (lr for lr in METHODS[method].rates if f"{lr:g}" not in tried)
    while True:
        losses = rates.losses(method)
        best = min(losses, key=losses.__getitem__)
        if best == min(losses):
            yield best / 2
        elif best == max(losses):
            yield best * 2
        else:
            return


def sweep(rates: Rates, method: str, text: Text, protocol: Protocol, seed: int, device: str) -> None:
    """Tries what is untried of a method. All but AdamW train embeddings and norms at the rate chosen for AdamW."""
    for lr in untried(rates, method):
        scalar_lr = lr if method == "adamw" else rates.chosen("adamw")
        tqdm.write(f"{method} at {lr:g}")
        record = train(
            method, text.train, text.tuning, lr=lr, scalar_lr=scalar_lr, protocol=protocol, seed=seed, device=device
        )
        facts = {} if method == "adamw" else {"scalar_lr": scalar_lr}
        rates.add(method, lr, record.final_loss, **facts, settings=METHODS[method].settings)


def main() -> None:
    """Runs the sweep and draws it."""
    parser = options.parser(__doc__.splitlines()[0], seed=0)
    parser.add_argument("--out", type=Path, default=COMMITTED, help="JSON file to go on with or begin")
    arguments, methods, text = options.parse(parser)
    protocol = replace(Protocol(), steps=arguments.steps, evaluations=1, evaluation_windows=512)
    rates = Rates(arguments.out)
    try:
        rates.start({"seed": arguments.seed, "chosen_on": "tuning", **asdict(protocol), "text": text.describe()})
    except ValueError as error:
        parser.error(str(error))
    for method in dict.fromkeys(["adamw", *methods]):
        sweep(rates, method, text, protocol, arguments.seed, arguments.device)
        print(f"{method}: best rate {rates.chosen(method):g}")
    plots.sweep(rates, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
