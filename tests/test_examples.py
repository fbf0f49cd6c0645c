# SPDX-License-Identifier: Apache-2.0
"""The demo runs from the command line and writes what it says; what is meant for torchrun runs in two processes.

So do the scripts that users copy, one for each framework.
"""

import json
import math
import os
import re
import shutil
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
    """The bytes a rank sends, on average, and the collectives, by the formulas of docs/apidocs/sharding.md and of the sums of squares.

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
    alone, shared = (float(flops) for flops in re.findall(r"([\d.]+) GFLOP per replica", done.stdout))
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


# The scripts that users copy: the package that each needs, what starts it, and the folder of its checkpoints.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
SCRIPTS = {
    "fsdp2": ("torch", TORCHRUN, "runs/fsdp2"),
    "huggingface_trainer": ("accelerate", [], "runs/huggingface_trainer"),
    "accelerate_loop": ("accelerate", ACCELERATE, "runs/accelerate_loop"),
    "lightning_module": ("lightning", [], "runs/lightning_module"),
    "megatron_gpt": ("megatron.core", [*TORCHRUN, str(Path(__file__).parent / "megatron_core" / "on_cpu.py")], None),
    "nemo/minimal": ("nemo.collections.asr", [], None),
}
SLOW = ("megatron_gpt", "nemo/minimal")
RESUMING = [script for script in SCRIPTS if SCRIPTS[script][2]]


def losses_of(script, folder):
    """Runs a script in a folder and returns the losses that it prints, by step."""
    package, start, _ = SCRIPTS[script]
    pytest.importorskip(package)
    losses, _ = started(start, EXAMPLES / f"{script}.py", folder)
    return losses


def started(start, path, folder):
    """Runs a script in a folder and returns the losses that it prints, by step, and all that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, *start, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"step (\d+) loss ([\d.e-]+)", done.stdout)
    return {int(step): float(loss) for step, loss in losses}, done.stdout


@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.long if s in SLOW else ()) for s in SCRIPTS])
def test_script_to_copy_trains_and_saves(tmp_path, script):
    losses = losses_of(script, tmp_path)
    assert list(losses) == list(range(1, 21))
    assert losses[20] < losses[10] < losses[1], losses
    if script in RESUMING:
        assert len(list((tmp_path / SCRIPTS[script][2]).glob("*[12]0*"))) == 2


@pytest.mark.long
@pytest.mark.parametrize("script", RESUMING)
def test_script_to_copy_resumes(tmp_path, script):
    """From its checkpoint of step 10 it comes to the same losses, bit for bit."""
    package, start, checkpoints = SCRIPTS[script]
    pytest.importorskip(package)
    text = (EXAMPLES / f"{script}.py").read_text()
    if script == "lightning_module":  # Lightning repeats the first batch, with AdamW too: here all batches are equal
        text, whole = text.replace("(160, 32))", "(16, 32)).repeat(10, 1)"), text
        assert text != whole
    (tmp_path / "script.py").write_text(text)
    losses, _ = started(start, tmp_path / "script.py", tmp_path)
    (last,) = (tmp_path / checkpoints).glob("*20*")
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    resumed, _ = started(start, tmp_path / "script.py", tmp_path)
    assert set(range(11, 21)) <= resumed.keys()
    assert script == "huggingface_trainer" or min(resumed) == 11  # Trainer logs the steps before, too
    assert resumed == {step: losses[step] for step in resumed}
    again, _ = started(start, tmp_path / "script.py", tmp_path)
    assert not any(step > 21 for step in again), "a run that was complete goes on"  # Trainer makes one step, at rate 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_to_copy_is_short_and_says_how_to_start_it(script):
    lines = (EXAMPLES / f"{script}.py").read_text().splitlines()
    assert len(lines) <= 60
    assert any(f"examples/{script}.py" in line for line in lines[:6])


@pytest.mark.long
def test_trainers_replicas_share_the_work_if_told(tmp_path):
    """Which the docstring of optimizer_cls_and_kwargs says how to do. Trainer wraps the model after that is called."""
    pytest.importorskip("accelerate")
    text, found = (EXAMPLES / "huggingface_trainer.py").read_text(), []
    text += "print(trainer.optimizer.optimizer.describe(each=False))\n"
    for option in ("", "replica_group=torch.distributed.group.WORLD,"):
        (tmp_path / "script.py").write_text(text.replace("scalar_lr=2e-3,", f"{option} scalar_lr=2e-3,"))
        found.append(started(TORCHRUN, tmp_path / "script.py", tmp_path))
        shutil.rmtree(tmp_path / "runs")
    (alone, described), (shared, described_shared) = found
    assert len(alone) == 20 and shared == pytest.approx(alone, rel=1e-6)
    assert "shared by 2 replicas" not in described and "8 shared by 2 replicas" in described_shared
