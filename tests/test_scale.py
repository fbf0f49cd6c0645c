# SPDX-License-Identifier: Apache-2.0
"""``make bench-scale`` at a small size: the plans of real models are as even as the documentation says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tree import ROOT


pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script writes."""
    folder: Path = tmp_path_factory.mktemp("scale")
    command = [sys.executable, "benchmarks/scale.py", "--models", "gpt2", "llama70b", "--worlds", "4", "8", "32"]
    command += ["--exchanges", "4", "--exchange-model", "gpt2", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Llama 70B, HSDP 8" in done.stdout and (folder / "scale.png").stat().st_size > 10_000
    content: dict[str, Any] = json.loads((folder / "scale.json").read_text())
    return content


def test_owners_work_evenly(result: dict[str, Any]) -> None:
    assert [(each["model"], each["way"], each["ranks"]) for each in result["plans"]] == [
        (model, way, ranks)
        for model in ("GPT-2 124M", "Llama 70B")
        for way, worlds in (
            ("FSDP2", (4, 8, 32)),
            ("TP 8, replicas", (8, 32)),
            ("HSDP 8", (8, 32)),
            ("DDP", (4, 8, 32)),
        )
        for ranks in worlds
        if (model, way) != ("Llama 70B", "DDP")
    ]
    for each in result["plans"]:
        assert 1 <= each["over_best_of_whole_matrices"] <= each["over_ideal"]
        assert each["over_ideal"] <= 1.1 if each["matrices_per_owner"] >= 4 else each["rounds"] == 1


def test_what_a_plan_costs(result: dict[str, Any]) -> None:
    """Of Llama 70B on 8 ranks: each gets an eighth of M', and sends all but its own part; O takes half the bytes."""
    elements = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    elements_of_gpt2 = 12 * 12 * 768**2
    for each in result["plans"]:
        if each["model"] == "Llama 70B" and each["ranks"] == 8:
            assert each["bytes_sent"] == each["bytes_received"] == pytest.approx(6 * elements / 8 * 7 / 8, rel=0.01)
            assert each["temporary_bytes"] < 7 * 2**30 and each["seconds_to_plan"] < 1
        if each["model"] == "GPT-2 124M" and each["way"] == "DDP":  # no shards; every rank gets what it does not own
            owned = elements_of_gpt2 / each["ranks"]
            assert each["bytes_received"] == pytest.approx(2 * (elements_of_gpt2 - owned), rel=0.15)
    [exchange] = result["exchanges"]
    assert exchange["ranks"] == 4 and exchange["owned"] == 12 and exchange["seconds_of_exchange"] > 0
