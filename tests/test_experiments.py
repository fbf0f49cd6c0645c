# SPDX-License-Identifier: Apache-2.0
"""The experiment on convergence: what is run when, that it goes on where it was, and that its page has its numbers."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
EXPERIMENT = ROOT / "experiments" / "gpt2"


@pytest.fixture
def parts(monkeypatch):
    """The experiment's modules, which are imported by plain names, and gone afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    import figures
    import protocol
    import results
    import run
    import runs

    yield type("Parts", (), {"figures": figures, "protocol": protocol, "results": results, "run": run, "runs": runs})
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if Path(file).parent in (EXPERIMENT, ROOT / "examples"):
            del sys.modules[name]


def facts(run, loss):
    return {
        **{name: getattr(run, name) for name in ("stage", "method", "variant", "lr", "scalar_lr", "seed")},
        "parameters": 1,
        "steps": [1, 2, 3, 4],
        "losses": [4.0, 3.0, 2.5, loss] if run.stage == "report" else [loss],
        "final_train_loss": loss,
    }


def fabricated(parts, path, best=0.03, leave=0):
    """Results in which every method learns best at a rate near ``best``, but for the last runs."""
    results = parts.results.Results(path)
    order = []
    while todo := parts.runs.due(results):
        for run in todo:
            loss = 2 + math.log(run.lr / best) ** 2 / 10 + len(run.variant) / 100 + run.seed / 1000
            results.runs[run.key] = facts(run, loss)
            order.append(run)
    for run in order[len(order) - leave :]:
        del results.runs[run.key]
    return results, order


def test_rates_come_first_and_adamws_before_all(parts, tmp_path):
    results, order = fabricated(parts, tmp_path / "r.json")
    methods = [run.method for run in order]
    first_of_others = next(index for index, name in enumerate(methods) if name != "adamw")
    assert not [run for run in order[first_of_others:] if run.method == "adamw" and run.stage == "sweep"]
    best = results.best("adamw")
    assert best / 2 in results.tuning_losses("adamw") and best * 2 in results.tuning_losses("adamw")
    for run in order[first_of_others:]:
        assert run.scalar_lr == best
    for run in order:
        if run.stage == "report":
            assert run.lr == results.best(run.method) and run.seed != 0
    for method in parts.protocol.METHODS:
        losses = results.tuning_losses(method)
        assert min(losses) < results.best(method) < max(losses)
        assert [run["seed"] for run in results.reported(method)] == list(parts.runs.SEEDS)
        count = len(parts.runs.VARIANTS) if method in parts.runs.VARIED else 0
        assert sum(bool(results.reported(method, variant)) for variant in parts.runs.VARIANTS) == count


def test_a_rate_that_diverges_is_not_chosen(parts, tmp_path):
    results = parts.results.Results(tmp_path / "r.json")
    for run in parts.runs.due(results):
        results.add(run.key, facts(run, math.nan if run.lr > 0.003 else run.lr))
    again = parts.results.Results(tmp_path / "r.json")
    assert again.tuning_losses("adamw")[0.016] == math.inf and again.best("adamw") == 0.001
    assert [run.lr for run in parts.runs.due(again)] == [0.0005]


def test_it_goes_on_where_it_was(parts, tmp_path):
    path = tmp_path / "tiny.json"
    text = tmp_path / "mine.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 6000)
    results, order = fabricated(parts, path, leave=2)
    kept = dict(results.runs)
    command = [sys.executable, EXPERIMENT / "run.py", "--size", "tiny", "--data", text, "--results", path]
    path.write_text(json.dumps({"setting": {"steps": 5}, "runs": kept}))
    refused = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert refused.returncode == 2 and "of one setting" in refused.stderr
    assert json.loads(path.read_text())["runs"] == kept

    noted = parts.run.setting(parts.protocol.SIZES["tiny"], parts.run.load(text), "cpu")
    path.write_text(json.dumps({"setting": noted, "runs": kept}))
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    after = json.loads(path.read_text())["runs"]
    new = {run.key for run in order[-2:]}
    assert set(after) == set(kept) | new and all(after[key] == kept[key] for key in kept)
    assert all(len(after[key]["losses"]) == len(after[key]["steps"]) > 1 for key in new)


def test_variants_reach_the_optimizer(parts, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 6000)
    losses = {}
    for variant in ("", *parts.runs.VARIANTS):
        run = parts.runs.Run("report", "namo", variant, 0.5, 0.01, 1)
        losses[variant] = parts.run.work(run, "tiny", text, "cpu")["losses"][-1]
    assert len(set(losses.values())) == len(losses)


def test_figures_and_tables(parts, tmp_path):
    results, _ = fabricated(parts, tmp_path / "r.json")
    parts.figures.draw(results, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    table = parts.figures.methods_table(results).splitlines()
    assert len(table) == 2 + len(parts.protocol.METHODS)
    means = [float(line.split("|")[3].split("±")[0]) for line in table[2:]]
    assert means == sorted(means)
    differences = [re.findall(r"[+-][.\d]+", line.split("|")[4]) for line in table[2:]]
    assert sorted(map(len, differences)) == [0, 3, 3, 3, 3, 3]  # mean, lowest, highest; none for Muon itself
    assert all(len(set(each)) < 2 for each in differences)  # seeds are paired: they differ alike
    rows = parts.figures.variants_table(results).splitlines()
    assert len(rows) == 3 + len(parts.runs.VARIANTS)
    assert "+0.0800 (+0.0800 to +0.0800)" in rows[2 + list(parts.runs.VARIANTS).index("no decay") + 1]
    page = "a\n\n<!-- methods -->\n| old |\n\nb\n\n<!-- variants -->\n\nc\n"
    new = parts.figures.with_tables(page, results)
    assert "| old |" not in new and new.endswith("\n\nc\n") and parts.figures.with_tables(new, results) == new
    with pytest.raises(ValueError, match="once"):
        parts.figures.with_tables("nothing", results)


def test_the_page_has_the_numbers_of_the_results(parts):
    results = parts.results.Results(EXPERIMENT / "results" / "cpu.json")
    page = parts.figures.PAGE.read_text()
    assert ("under way" in page) == bool(parts.runs.due(results))
    if "under way" not in page:
        assert parts.figures.with_tables(page, results) == page


def test_the_page_on_choosing_has_the_best_rates(parts):
    results = parts.results.Results(EXPERIMENT / "results" / "cpu.json")
    page = parts.figures.PAGE.with_name("choosing.md").read_text()
    table = page.split("[convergence](convergence.md), ")[1].split("\n\n")[0].splitlines()[2:]
    rates = {row[1].strip(" `").lower(): float(row[3]) for row in (line.split("|") for line in table)}
    assert rates == {method: results.best(method) for method in parts.protocol.METHODS}
