# SPDX-License-Identifier: Apache-2.0
"""The demo runs from the command line and writes what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 6000)
    return path


def test_demo(tmp_path, text):
    done = run("train_gpt.py", "--data", text, "--steps", 2, "--method", "adamw,muon,namo_d", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("AdamW's", "state bytes", "adamw", "muon", "namo_d", "tuning part"))
    measured = json.loads((tmp_path / "train_gpt.json").read_text())
    assert {record["method"] for record in measured["records"]} == {"adamw", "muon", "namo_d"}
    assert len({record["train_losses"][0] for record in measured["records"]}) == 1  # the same weights, the same batch
    assert len({record["train_losses"][1] for record in measured["records"]}) == 3
    assert str(text.parent) not in json.dumps(measured)
    assert (tmp_path / "train_gpt.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_goes_beyond_the_end_where_the_best_is_and_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from methods import METHODS
    from rates import Rates
    from sweep_learning_rates import untried

    def sweep(best):
        rates, tried = Rates(tmp_path / f"{best}.json"), []
        for lr in untried(rates, "namo"):
            tried.append(lr)
            rates.add("namo", lr, abs(lr - best))
            if len(tried) == 3:  # interrupted: the file holds all that is known
                rates = Rates(rates.path)
                tried += [rates.add("namo", lr, abs(lr - best)) or lr for lr in untried(rates, "namo")]
                assert not list(untried(Rates(rates.path), "namo"))
                return tried, rates.chosen("namo")

    first = list(METHODS["namo"].rates)
    assert sweep(first[2]) == (first, first[2])
    assert sweep(2 * first[-1]) == ([*first, 2 * first[-1], 4 * first[-1]], 2 * first[-1])
    assert sweep(first[0]) == ([*first, first[0] / 2], first[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "/nowhere"), "'/nowhere'"),
        (("--method", "sgd"), "adamuon"),
        (("--steps", "0"), "above zero"),
        (("--lr", "0.1"), "exactly one --method"),
    ],
)
def test_bad_options_end_it_at_once(arguments, message):
    done = run("train_gpt.py", *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_committed_rates_are_the_best_of_their_grids_and_within():
    methods = json.loads((EXAMPLES / "learning_rates.json").read_text())["methods"]
    assert set(methods) == {"adamw", "muon", "adamuon", "normuon", "namo", "namo_d"}
    for record in methods.values():
        losses = {float(lr): loss for lr, loss in record["tuning_loss"].items()}
        assert len(losses) >= 5 and record["lr"] == min(losses, key=losses.__getitem__)
        assert min(losses) < record["lr"] < max(losses)
