# SPDX-License-Identifier: Apache-2.0
"""Trains a GPT-2-shaped model with six optimizers: a sweep of learning rates each, then several seeds at the best.

Stop it when you like: it goes on where it was. Results are JSON; figures.py makes figures and tables of them at the end.
"""

import argparse
import multiprocessing
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import figures
import torch
from protocol import METHODS, ON_DEVICE, SIZES, PaperProtocol, reported, tuning
from results import Results
from runs import SEEDS, VARIANTS, VARIED, Run, due
from text import Text, load
from tqdm import tqdm
from training import train


@lru_cache(maxsize=1)
def _text(path: Path | None) -> Text:
    """The text, read once by each worker."""
    return load(path)


def setting(size: PaperProtocol, text: Text, device: str) -> dict[str, Any]:
    """Returns what all runs of an experiment have in common."""
    return {
        "sweep": asdict(tuning(size)),
        "report": asdict(reported(size)),
        "text": text.describe(),
        "methods": {name: method.settings | ON_DEVICE[device] for name, method in METHODS.items()},
        "variants": VARIANTS,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "versions": {name: version(name) for name in ("torch", "emerging-optimizers")},
    }


def work(run: Run, size: str, path: Path | None, device: str) -> dict[str, Any]:
    """Makes a run, in a process of its own on a CPU with one thread, and returns what it was and measured.

    Args:
        run: What to train.
        size: A key of SIZES.
        path: The text.
        device: "cpu" or "cuda".
    """
    torch.set_num_threads(1)
    text, sweep = _text(path), run.stage == "sweep"
    record = train(
        run.method,
        text.train,
        text.tuning if sweep else text.validation,
        lr=run.lr,
        scalar_lr=run.scalar_lr,
        protocol=(tuning if sweep else reported)(SIZES[size]),
        seed=run.seed,
        device=device,
        show=False,
        changes={**ON_DEVICE[device], **run.changes},
    )
    return {
        **asdict(run),
        "parameters": record.parameters,
        "steps": record.steps,
        "losses": record.losses,
        "final_train_loss": record.final_train_loss,
    }


def finished(results: Results, workers: int, seeds: Sequence[int], *settings: Any) -> Iterator[str]:
    """Makes all runs that are due, several at a time, and yields the key of each when it is done."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        underway: dict[Future[dict[str, Any]], str] = {}
        while True:
            for run in due(results, seeds):
                if len(underway) < workers and run.key not in underway.values():
                    underway[pool.submit(work, run, *settings)] = run.key
            if not underway:
                return
            for future in wait(underway, return_when=FIRST_COMPLETED).done:
                key = underway.pop(future)
                results.add(key, future.result())
                yield key


def main() -> None:
    """Makes the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of the model and the run (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, help="your text, a file or directory (default: Python's standard library)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, help="runs at a time (default: the CPU's cores, on CUDA 1)")
    parser.add_argument("--results", type=Path, help="JSON file to go on with or begin (default: results/SIZE.json)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of each method (default: %(default)s)")
    arguments = parser.parse_args()
    seeds = SEEDS[: arguments.seeds]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = arguments.workers or (1 if arguments.device == "cuda" else cores)
    results = Results(arguments.results or figures.OWN.with_name(f"{arguments.size}.json"))
    try:
        results.start(setting(SIZES[arguments.size], _text(arguments.data), arguments.device))
    except ValueError as error:
        parser.error(str(error))
    fewest = sum(len(method.rates) for method in METHODS.values())
    fewest += len(seeds) * (len(METHODS) + len(VARIED) * len(VARIANTS))
    with tqdm(total=fewest, initial=len(results.runs), unit="run", smoothing=0.1) as bar:
        for key in finished(results, workers, seeds, arguments.size, arguments.data, arguments.device):
            bar.total = max(fewest, len(results.runs) + len(due(results, seeds)))
            bar.update()
            loss = results.runs[key]["losses"][-1]
            tqdm.write(f"{key}: {'diverged' if loss is None else format(loss, '.4f')}")
    figures.write(results, figures.PAGE)
    print(f"All runs are in {results.path}, figures beside it.")


if __name__ == "__main__":
    main()
