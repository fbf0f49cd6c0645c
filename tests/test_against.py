# SPDX-License-Identifier: Apache-2.0
"""``make test-upstream`` and its kin: tests run against another version of a neighbor, and the record of the runs."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tree import ROOT, tool

import emerging_optimizers.adaptive_muon


TOOL = ROOT / "tools" / "test_against.py"
TABLE = tool("version_table")
TEST = """
def test_is_run(request):
    import emerging_optimizers, emerging_optimizers.adaptive_muon as ours
    assert emerging_optimizers.__version__ == "0.4.99" and ours.__file__ == {ours!r}
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the installed release with another number, and no repository."""
    installed = find_spec("emerging_optimizers")
    assert installed is not None and installed.submodule_search_locations is not None
    package = tmp_path / "checkout" / "emerging_optimizers"
    ours = shutil.ignore_patterns("adaptive_muon", "adaptive_muon_discovery", "__pycache__")
    shutil.copytree(installed.submodule_search_locations[0], package, ignore=ours)
    (package / "__init__.py").write_text('__version__ = "0.4.99"\n')
    return package.parent


def run(*arguments: object, tool: Path = TOOL) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(tool), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "TEST_RECORD"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_checkout_is_used_and_named(checkout: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(TEST.format(ours=emerging_optimizers.adaptive_muon.__file__))
    done = run("upstream", checkout, "-q", "-p", "no:cacheprovider", test)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"emerging_optimizers 0.4.99 of {checkout}, at ") and "1 passed" in done.stdout
    test.write_text(test.read_text().replace("0.4.99", "0.3.0"))
    assert run("upstream", checkout, "-q", "-p", "no:cacheprovider", test).returncode == 1


def test_all_tests_that_concern_upstream_are_run_by_default(checkout: Path) -> None:
    chosen = ("-k", "test_order_of_calls or test_in_processes or test_demo")
    left_out = ("--deselect", "tests/test_sharded.py::test_in_processes[4]")
    done = run("upstream", checkout, "--collect-only", *chosen, *left_out)
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert "in_processes[2]" in done.stdout and "in_processes[4]" not in done.stdout
    assert files == {"tests/test_hooks.py", "tests/test_sharded.py"}, done.stdout + done.stderr


def test_megatron(tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.20.99"\n')
    test = tmp_path / "test_it.py"
    test.write_text(
        'def test_is_run():\n    import megatron.core\n    assert megatron.core.__version__ == "0.20.99"\n'
    )
    done = run("megatron", tmp_path / "checkout", "-q", "-p", "no:cacheprovider", test)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"megatron.core 0.20.99 of {tmp_path / 'checkout'}, at ")
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "usage: "), (("jax", "."), "usage: "), (("upstream", "/nowhere"), "must have the folder")],
    ids=["nothing", "unknown", "no checkout"],
)
def test_what_is_not_given_is_named(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1 and message in done.stderr


def test_what_is_no_package_is_refused(checkout: Path) -> None:
    (checkout / "emerging_optimizers" / "__init__.py").write_text("raise ImportError('broken')\n")
    done = run("upstream", checkout)
    assert done.returncode == 1 and "could not be imported" in done.stderr and "broken" in done.stderr


# ------------------------------------------------------------------------------------------------------ other versions


def test_an_environment_with_a_version_is_made_once(tree: Path) -> None:
    """Here it is made already, and its Python is this one."""
    environment = tree / "build" / "torch-2.99.0"
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.write_text(f'#!/bin/sh\nMADE_ONCE=yes exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (environment / "installed").touch()
    (tree / "tests" / "test_python.py").write_text(
        "import os\ndef test_it():\n    assert os.environ['MADE_ONCE'] == 'yes'\n"
    )
    done = run("torch", "2.99.0", "-p", "no:cacheprovider", "tests/test_python.py", tool=tree / "tools" / TOOL.name)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_an_old_triton_defines_kernels_without_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "lib" / "python3.12" / "site-packages" / "triton" / "runtime" / "autotuner.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "class Autotuner:\n    def __init__(self):\n        self.do_bench = driver.active.get_benchmarker()\n"
    )
    runpy.run_path(str(TOOL))["define_kernels_without_gpu"](tmp_path)
    made: dict[str, Any] = {}
    exec(file.read_text(), made)
    kernel = made["Autotuner"]()
    with pytest.raises(NameError, match="driver"):
        kernel.do_bench(print, quantiles=())


# ---------------------------------------------------------------------------------------------------------- the record

ROW = {
    **{"neighbor": "torch", "version": "2.9.1", "source": "PyPI", "beside": {"emerging-optimizers": "0.3.0"}},
    **{"tests": {"1": [5, 0], "4": [3, 2]}, "commit": "abc", "date": "2026-11-26"},
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with the tool, the record, and few tests."""
    for name in ("tools/test_against.py", "tools/version_table.py", "tools/marked_tables.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("tests/torchrun.py", "tests/forked.py", "docs/versions.json", "docs/apidocs/versions.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    few = "import pytest\n\n@pytest.mark.parametrize('n', range(5))\ndef test_it(n):\n    if n > 2: pytest.skip()\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\n")  # as in this project
    (tmp_path / "tests" / "test_few.py").write_text(few)
    (tmp_path / "tests" / "test_nemo.py").write_text("def test_not_upstreams():\n    assert False\n")
    (tmp_path / "tests" / "ranks").mkdir()
    (tmp_path / "tests" / "ranks" / "test_rank.py").write_text(few.replace("5", "7"))
    (tmp_path / "tests" / "test_start.py").write_text(
        "import pytest\nfrom pathlib import Path\nfrom torchrun import run_in_processes\n\n"
        "@pytest.mark.parametrize('processes', [2, 1, 2])\ndef test_in_processes(processes):\n"
        "    run_in_processes([Path(__file__).parent / 'ranks'], processes, 'import torch')\n"
    )
    return tmp_path


def test_a_whole_run_that_passes_is_recorded(tree: Path) -> None:
    """With the numbers of tests by the number of processes, and without those that start others."""
    before = (tree / "docs" / "versions.json").read_text()
    options = ("-p", "no:cacheprovider", "--rootdir", tree)
    (tree / "docs" / "versions.json").write_text("[]\n")
    done = run("upstream", "installed", "--record", *options, tool=tree / "tools" / TOOL.name)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads((tree / "docs" / "versions.json").read_text())
    assert row["tests"] == {"1": [3 + 3, 2 + 4], "2": [3 + 3, 4 + 4]}
    assert (row["neighbor"], row["version"]) == ("emerging-optimizers", emerging_optimizers.__version__)
    assert row["source"] == "PyPI" and [*row["beside"]] == ["torch"]
    page = (tree / "docs" / "apidocs" / "versions.md").read_text()
    assert (
        f"| Emerging-Optimizers | {row['version']} | PyPI | torch {row['beside']['torch']} | 6, 6 in 2 | 6, 8 in 2 |"
        in page
    )
    assert before.count("\n") > 3


@pytest.mark.parametrize("why", ["not asked for", "failed", "some"])
def test_other_runs_are_not(why: str, tree: Path) -> None:
    before = (tree / "docs" / "versions.json").read_text()
    if why == "failed":
        (tree / "tests" / "test_bad.py").write_text("def test_bad():\n    assert False\n")
    record = () if why == "not asked for" else ("--record",)
    some = ("tests/test_few.py",) if why == "some" else ()
    done = run("upstream", "installed", "-p", "no:cacheprovider", *record, *some, tool=tree / "tools" / TOOL.name)
    assert done.returncode == (0 if why == "not asked for" else 1)
    assert (tree / "docs" / "versions.json").read_text() == before


def test_a_row_takes_the_place_of_the_same_versions(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TABLE, "RECORDS", tree / "docs" / "versions.json")
    monkeypatch.setattr(TABLE, "PAGE", tree / "docs" / "apidocs" / "versions.md")
    others = [row for row in TABLE.records() if (row["neighbor"], row["version"]) != ("torch", "2.9.1")]
    beside = {**ROW, "beside": {"emerging-optimizers": "0.4.0"}}
    for row in (ROW, beside, {**ROW, "date": "2026-11-27"}, {**ROW, "version": "2.10.0"}):
        TABLE.record(row)
    rows = TABLE.records()
    assert [row for row in rows if row not in others and row["version"] != "2.10.0"] == [
        {**ROW, "date": "2026-11-27"},
        beside,
    ]
    versions = [row["version"] for row in rows if row["neighbor"] == "torch"]
    assert versions.index("2.10.0") == versions.index("2.9.1") + 2  # as numbers
    assert "| 5, 3 in 4 | 0, 2 in 4 | 2026-11-27 | |" in TABLE.PAGE.read_text()


def test_the_committed_table_is_the_record() -> None:
    text = TABLE.PAGE.read_text(encoding="utf-8")
    assert TABLE.with_table(text, "versions", TABLE.table(TABLE.records())) == text, "run make version-table"
    assert TABLE.records() == json.loads(TABLE.RECORDS.read_text(encoding="utf-8"))
