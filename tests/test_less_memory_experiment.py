# SPDX-License-Identifier: Apache-2.0
"""The experiment on less memory at a tiny size: every kind of run differs, and it goes on where it was."""

import json
import subprocess
import sys
from pathlib import Path


RUN = Path(__file__).parent.parent / "experiments" / "less_memory" / "run.py"


def test_all_kinds_and_on(tmp_path: Path) -> None:
    text, out = tmp_path / "mine.txt", tmp_path / "results.json"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 6000)

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, RUN, "--size", "tiny", "--data", text, "--out", out, "--seeds", "1", *more]
        return subprocess.run(command, capture_output=True, text=True, cwd="/")

    first = run("--steps", "4", "--kind", "float32")
    assert first.returncode == 0, first.stderr
    kept = json.loads(out.read_text())["runs"]
    whole = kept["float32"]["1"]
    kept["float32"]["1"] += 1.0  # so that it shows if the run is made again
    out.write_text(json.dumps({**json.loads(out.read_text()), "runs": kept}))
    rest = run("--steps", "4")
    assert rest.returncode == 0, rest.stderr
    runs = json.loads(out.read_text())["runs"]
    assert runs["float32"] == kept["float32"] and len(runs) == 4
    assert len({whole, *(of_kind["1"] for of_kind in runs.values())}) == 5
    assert len(rest.stdout.splitlines()) == 3 + 2 + 4  # the runs, and a table with a row for each kind
    refused = run("--steps", "5")
    assert refused.returncode == 2 and "must be of the same setting" in refused.stderr
