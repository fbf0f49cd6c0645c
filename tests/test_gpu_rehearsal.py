# SPDX-License-Identifier: Apache-2.0
"""``make gpu ARGS=--rehearse``: all that a machine with a GPU is lent for runs here, at tiny sizes on the CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tree import ROOT

from emerging_optimizers.adaptive_muon.moment2 import METHODS


BENCHMARKS = ROOT / "benchmarks"
MODES = ("layer_sharded", "duplicated", "distributed")
TORCH_MUON = {"torch Muon"} if hasattr(torch.optim, "Muon") else set()  # from torch 2.9 on


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """What the rehearsal prints, and the content of its files by part."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} == {f"gpu-{part}.json" for part in ("right", "fast", "exact")}
    return done.stdout, {path.stem.removeprefix("gpu-"): json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes the benchmarks' modules importable by their plain names, for one test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith((str(BENCHMARKS), str(ROOT / "examples"))):
            del sys.modules[name]


def measured(content, beginning):
    """The measurements with names that begin so."""
    return {name: each for name, each in content["measurements"].items() if name.startswith(beginning)}


def test_every_file_has_its_circumstances(rehearsed):
    for content in rehearsed[1].values():
        assert content["complete"] and content["settings"]["rehearsal"]
        assert torch.__version__.startswith(content["machine"]["versions"]["torch"].split("+")[0])
        assert "triton" in content["machine"]["versions"]
        assert all("raised" not in each for each in content["measurements"].values())


def test_right_has_counts(rehearsed):
    runs = rehearsed[1]["right"]["measurements"]
    assert runs["test_symmetric_kernel.py"]["passed"] >= 5 and runs["test_symmetric_kernel.py"]["failed"] == 0
    for name in ("test_cuda.py", "test_cuda_features.py"):
        assert runs[name]["passed"] >= 3 and runs[name]["failed"] == 0, name
    alone = runs["test_cuda.py 2_to_the_31"]
    assert alone["passed"] + alone["skipped"] >= 3


def test_fast_has_ceilings_products_steps_and_shares(rehearsed):
    content = rehearsed[1]["fast"]
    assert content["measurements"]["ceiling: copy"]["bytes_per_second"] > 0
    assert content["measurements"]["ceiling: product"]["flops_per_second"] > 0
    products = measured(content, "product ")
    kinds = {name.split(",")[0].split(" ", 6)[-1] for name in products}
    assert kinds == {"gram of wide", "gram of tall", "square"}
    for name, each in products.items():
        assert each["error"] < 1e-3 if name.endswith("torch") else each == {"not measured": "needs a GPU"}
    taking_part = content["measurements"]["step gpt2"]["contestants"]
    assert {*(f"ours {method}" for method in METHODS), "upstream namo", "torch AdamW", *TORCH_MUON} <= set(taking_part)
    assert content["measurements"]["eager gpt2"]["cpu_ms"] > 0
    assert {"graph gpt2", "profile gpt2"} <= set(content["measurements"])
    for method in METHODS:
        measured_too = content["measurements"][f"diagnostics gpt2, {method}"]
        assert set(measured_too) == {"off", "off again", "every step", "every 10"}
        assert measured_too["off"]["ratio"] == 1
    assert content["measurements"]["bfloat16 gpt2, namo"]["both"]["ms"] > 0
    training = content["measurements"]["training"]
    assert training["micro_batches"] == 4
    assert all(0 < each["share"] < 1 for each in training["steps"].values())


def test_exact_has_rounding_and_ranks(rehearsed):
    content = rehearsed[1]["exact"]
    rounding = measured(content, "rounding ")
    assert len(rounding) == 3 * 3 and all(each["ours"] < 1e-3 < each["upstream"] for each in rounding.values())
    ranks = measured(content, "2 ranks, ")
    of_methods = {
        f"2 ranks, {what}, {method}, highest" for what in (*MODES, "rounds", "replicas") for method in METHODS
    }
    assert set(ranks) == of_methods | {"2 ranks, without a gradient"}
    assert ranks.pop("2 ranks, without a gradient") == {"steps until the error": 1}
    padded = measured(content, "one rank, ")
    assert set(padded) == {*(f"one rank, padded, {method}" for method in METHODS), "one rank, padded, rounds, namo"}
    assert all(each["messages"] > 0 for each in padded.values())
    assert padded["one rank, padded, rounds, namo"]["messages"] > padded["one rank, padded, namo"]["messages"]
    assert all(each["distance"] < 1e-4 for each in (*ranks.values(), *padded.values()))


def test_it_ends_with_a_table(rehearsed):
    end = rehearsed[0].partition("Milliseconds per step")[2]
    rows = [line.split("|")[1].strip() for line in end.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row.startswith("ours ")][: len(METHODS)] == [f"ours {method}" for method in METHODS]
    assert {"upstream namo", "torch AdamW", "floor", *TORCH_MUON} <= set(rows)


@pytest.mark.usefixtures("on_gpu")
def test_what_raises_is_noted_and_the_rest_goes_on(monkeypatch, tmp_path):
    from on_gpu import products
    from on_gpu.record import Record
    from on_gpu.sizes import REHEARSAL

    def fails(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(products, "multiplied", fails)
    record = Record(tmp_path / "a.json", torch.device("cpu"), 60, {})
    products.run(record, REHEARSAL)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["measurements"]["ceiling: product"]["raised"] == "RuntimeError: out of order"
    assert "ms" in found["measurements"]["product 1 x 32 x 48 gram of tall, torch"]
    assert not found["complete"]


@pytest.mark.usefixtures("on_gpu")
def test_each_measurement_is_written_at_once_and_none_begins_too_late(tmp_path):
    from on_gpu.record import Record

    record = Record(tmp_path / "a.json", torch.device("cpu"), 60, {})
    seen = []
    for name, about in (("a", 1), ("b", 100), ("c", 1)):
        record.measure(
            name, lambda: seen.append(json.loads(record.path.read_text())["measurements"]) or {}, about=about
        )
    assert [set(each) for each in seen] == [set(), {"a", "b"}]
    assert "about 100 s" in seen[1]["b"]["not measured"]


@pytest.mark.usefixtures("on_gpu")
def test_counts_are_pytests(tmp_path):
    from on_gpu import right

    assert {"test_cuda.py", "test_symmetric_kernel.py"} <= set(right.FILES)
    output = "x in 1.0s\n== 1 failed, 12 passed, 3 skipped, 1 error in 4.56s ==\n"
    assert right.counts(output) == {"passed": 12, "failed": 1, "skipped": 3, "error": 1}
    assert not any(right.counts("Killed").values())


@pytest.mark.usefixtures("on_gpu")
def test_failed_tests_are_named(tmp_path, monkeypatch):
    from on_gpu import right
    from on_gpu.record import Record
    from on_gpu.summary import summary

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_b():\n    assert 1 == 2\ndef test_c():\n    pass\n")
    monkeypatch.setattr(right, "ROOT", tmp_path)
    record = Record(tmp_path / "gpu-right.json", torch.device("cpu"), 60, {})
    record.note("test_a.py", right.tested("test_a.py", "test", 1, seconds=60))
    record.note("late", right.tested("test_a.py", "test", 1, seconds=0))
    found = record.content["measurements"]
    assert (found["test_a.py"]["status"], found["test_a.py"]["failed"], found["test_a.py"]["passed"]) == (1, 1, 1)
    assert "assert 1 == 2" in found["test_a.py"]["output"] and "stopped after" in found["late"]["status"]
    assert "    FAILED tests/test_a.py::test_b" in summary(tmp_path)


@pytest.mark.usefixtures("on_gpu")
def test_the_table_of_some_parts(tmp_path):
    from on_gpu.summary import floor_ms, summary

    assert "fast has not run" in summary(tmp_path)
    run = {"floor_bytes": 3e9, "flops": {"floor": 4e12}, "contestants": {"ours namo": {"median_ms": 7.0}}}
    found = {"step gpt2": run, "ceiling: copy": {"bytes_per_second": 3e12}, "eager gpt2": {"raised": "no"}}
    (tmp_path / "gpu-fast.json").write_text(json.dumps({"complete": False, "measurements": found}))
    assert "no floor" in summary(tmp_path) and "stopped before its end" in summary(tmp_path)
    found["ceiling: product"] = {"flops_per_second": 8e14}
    (tmp_path / "gpu-fast.json").write_text(json.dumps({"complete": True, "measurements": found}))
    assert floor_ms(run, 3e12, 8e14) == pytest.approx(1 + 5)
    assert "6 |" in next(line for line in summary(tmp_path).splitlines() if line.startswith("| floor"))


@pytest.mark.usefixtures("on_gpu")
def test_a_distance_that_is_no_number_is_the_worst(tmp_path):
    from on_gpu.record import Record
    from on_gpu.summary import summary

    record = Record(tmp_path / "gpu-exact.json", torch.device("cpu"), 60, {})
    for mode, distance in (("a", 1e-6), ("b", float("nan")), ("c", 1e-5)):
        record.note(f"2 ranks, {mode}, namo, highest", {"distance": distance})
    assert "2 ranks, namo, highest: at most nan" in summary(tmp_path)


@pytest.mark.usefixtures("on_gpu")
def test_ranks_that_fail_or_end_are_noted(tmp_path):
    import gpu_rehearsal_cases
    from on_gpu.processes import run_ranks
    from on_gpu.record import Record

    record = Record(tmp_path / "a.json", torch.device("cpu"), 60, {})
    with pytest.raises(RuntimeError, match="must end with 0 .*, got .*3"):
        run_ranks(record, 2, "gloo", gpu_rehearsal_cases.cases, None, 40)
    found = record.content["measurements"]
    assert found["works"] == {"rank": 1} and found["raises"]["raised"] == "ValueError: on both ranks"
    assert found["works again"] == {"rank": 1} and found["ends"]["raised"] == "1 of 2 ranks finished"


def test_make_runs_it_with_wheels_beside_the_checkout(tmp_path):
    """The overlay comes from the checkout, whatever a wheel of ours has; the command is what make would run."""
    make = ["make", "--dry-run", "gpu", "PYTHON=python3", "WHEELS=w", "ARGS=--parts right"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    commands = done.stdout.splitlines()
    install, copy, run = (
        next(index for index, line in enumerate(commands) if each in line) for each in (" w/*.whl", "cp -R", "gpu.py")
    )
    assert install < copy < run and "PYTHONPATH=" in commands[run] and commands[run].endswith("gpu.py --parts right")
    assert ".venv" not in done.stdout
