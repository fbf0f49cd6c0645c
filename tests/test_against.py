# SPDX-License-Identifier: Apache-2.0
"""``make test-upstream`` and ``make test-megatron``: tests run against a checkout in place of the installed release."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tree import ROOT

import emerging_optimizers.adaptive_muon


TOOL = ROOT / "tools" / "test_against.py"
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


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
    [((), "usage: "), (("torch", "."), "usage: "), (("upstream", "/nowhere"), "must have the folder")],
    ids=["nothing", "unknown", "no checkout"],
)
def test_what_is_not_given_is_named(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1 and message in done.stderr


def test_what_is_no_package_is_refused(checkout: Path) -> None:
    (checkout / "emerging_optimizers" / "__init__.py").write_text("raise ImportError('broken')\n")
    done = run("upstream", checkout)
    assert done.returncode == 1 and "could not be imported" in done.stderr and "broken" in done.stderr
