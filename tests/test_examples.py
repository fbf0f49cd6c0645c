# SPDX-License-Identifier: Apache-2.0
"""The demo runs from the command line and writes what it says; what is meant for torchrun runs in two processes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emerging_optimizers.adaptive_muon.moment2 import METHODS


EXAMPLES = Path(__file__).parent.parent / "examples"
# Blocks that need several processes are ```py, the others ```python. Their first line names the script they belong to.
BLOCKS = re.findall(
    r"```py\n# (\w+)\.py(.*?)```", (EXAMPLES.parent / "docs" / "apidocs" / "sharding.md").read_text(), re.DOTALL
)


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def run_in_two_processes(script, *arguments):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [*torchrun, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)


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
    for picture in ("train_gpt.png", "train_gpt_matrices.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


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


def traffic(method, mode):
    """The bytes a rank sends, on average, and the collectives, by the formulas of docs/apidocs/sharding.md.

    They are of matrices of 96 x 40 and 24 x 96 on two ranks, with sums of squares in float64.
    """
    moment2, sent = METHODS[method](), {"distributed": 8, "blockwise": 0}.get(mode, 16)  # the flag
    after = "orthogonalized" in moment2.observed
    before = len(moment2.observed) - after
    for rows, columns, split in ((96, 40, -2), (24, 96, -1)):
        kept = moment2.kept_dims(rows, columns)
        entries = math.prod({-2: rows, -1: columns}[dim] for dim in kept)
        if len(kept) == 2:  # V has an entry per element, and needs no sums
            before = after = 0
        own, gram = entries / (2 if split in kept else 1), columns if split == -2 else rows
        padded = max(8, 16 / entries)  # bytes of a sum in a message, which pads a single number to 16
        sent += {
            "layer_sharded": 2 * rows * columns + padded * (before * own + (before + after) * entries) / 2,
            "duplicated": 2 * rows * columns + padded * before * own,
            "distributed": 20 * gram**2 + 8 * (1 + (before + after) * entries),
            "blockwise": 0,
        }[mode]
    all_reduces = f"{7 if after else 6} all-reduce"
    collectives = {"layer_sharded": "2 all-to-all", "duplicated": "1 all-gather", "distributed": all_reduces}
    return sent, collectives.get(mode, "none")


def test_tensor_parallel():
    done = run_in_two_processes(EXAMPLES / "tensor_parallel.py", "--steps", 2)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +(\w+) +(\d\.\de[+-]\d+) +([\d,]+)  (.+)$", done.stdout, re.MULTILINE)
    modes = ("layer_sharded", "duplicated", "distributed", "blockwise")
    assert [row[:2] for row in rows] == [(method, mode) for method in METHODS for mode in modes], done.stdout
    for method, mode, difference, sent, collectives in rows:
        low, high = {"distributed": (0, 1e-4), "blockwise": (1e-3, 10)}.get(mode, (0, 1e-6))
        assert low <= float(difference) <= high, (method, mode)
        assert (int(sent.replace(",", "")), collectives) == traffic(method, mode), (method, mode)


def test_replicas():
    done = run_in_two_processes(EXAMPLES / "replicas.py", "--steps", 2, "--width", 32)
    assert done.returncode == 0, done.stderr
    alone, shared = (float(flops) for flops in re.findall(r"([\d.]+) GFLOP a replica", done.stdout))
    assert 0.45 * alone <= shared <= 0.55 * alone, done.stdout
    assert float(re.search(r"of a weight: (\S+)", done.stdout)[1]) <= 1e-6, done.stdout


@pytest.mark.parametrize("script", sorted({name for name, _ in BLOCKS}))
def test_documentation_of_sharding(tmp_path, script):
    path = tmp_path / f"{script}.py"
    # A gloo group that a script's variables still refer to may abort in Python's clean-up, in about one run of twenty.
    end, leave = "dist.destroy_process_group()", "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
    text = "".join(f"# {block}" for name, block in BLOCKS if name == script)
    assert text.rstrip().endswith(end)
    path.write_text(text.replace(end, f"dist.barrier()\n{end}{leave}"))  # nobody leaves while another talks to it
    done = run_in_two_processes(path)
    assert done.returncode == 0, done.stderr


def test_documentation_of_sharding_has_both_scripts():
    assert sorted({name for name, _ in BLOCKS}) == ["fsdp2", "tp"]
