# SPDX-License-Identifier: Apache-2.0
"""Runs the tests that concern a neighbor against one version of it.

    python tools/test_against.py upstream ../Emerging-Optimizers [--record] [arguments of pytest]
    python tools/test_against.py megatron ../Megatron-LM
    python tools/test_against.py torch 2.6.0
    python tools/test_against.py nemo installed

A checkout is put before the installed release: only its package, by a link in a temporary folder, and it stays as it is. A version is installed by pip, with our package, into an environment in ``build``, which
is kept. ``installed`` is what this Python has. Our own package is found through its editable install.

Without a file of tests among the arguments, those that concern the neighbor are run. With ``--record``, a run of all of them that passes is written to ``docs/versions.json`` and to the documentation's table.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import version_table


ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Neighbor:
    """A package that ours is installed beside.

    Args:
        module: The module that Python imports.
        distribution: Its name on the index.
        tests: A pattern of the files of tests that concern it.
        without: The files among them that do not, without their endings.
        extras: What of our package is installed with it.
        checkout_in: The environment variable by which tests find the checkout itself, where it is at no tag of a release.
        beside: The neighbors whose versions a record names beside its own.
    """

    module: str
    distribution: str
    tests: str = "test_*.py"
    without: Sequence[str] = ()
    extras: str = "test"
    checkout_in: str | None = None
    beside: Sequence[str] = ("torch", "upstream")

    @property
    def folder(self) -> str:
        """The folder of a checkout that Python imports."""
        return self.module.partition(".")[0]


# The other neighbors' tests, and what is not the package.
NOT_CORE = ("test_automodel", "test_huggingface", "test_megatron", "test_nemo")
NOT_CORE += ("test_against", "test_docs", "test_examples", "test_experiments", "test_written_files")
NEIGHBORS = {
    "torch": Neighbor("torch", "torch", without=NOT_CORE, extras="test,huggingface"),
    "upstream": Neighbor(
        "emerging_optimizers", "emerging-optimizers", without=NOT_CORE, checkout_in="UPSTREAM_CHECKOUT"
    ),
    # It starts those of tests/megatron_core.
    "megatron": Neighbor("megatron.core", "megatron-core", tests="test_megatron.py", extras="test,megatron"),
    "nemo": Neighbor(
        "nemo", "nemo-toolkit", "test_nemo.py", extras="test,nemo", beside=("torch", "upstream", "lightning")
    ),
    "lightning": Neighbor("lightning", "lightning", tests="test_lightning*.py", extras="test,nemo"),
    "automodel": Neighbor("nemo_automodel", "nemo-automodel", tests="test_automodel.py", extras="test,automodel"),
}


class Found(NamedTuple):
    """A module as a test finds it: its version, and its file."""

    version: str
    file: Path


def found(module: str, environment: dict[str, str] | None = None) -> Found:
    """Return the version of a module, and its file, as a test finds it."""
    code = f"import {module} as found; print(found.__version__, found.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{module} could not be imported:\n{done.stderr}")
    version, file = done.stdout.splitlines()[-2:]
    return Found(version, Path(file))


def run_checkout(name: str, checkout: Path, arguments: Sequence[str]) -> int:
    """Run the tests that concern a neighbor against a checkout of it, and return pytest's exit code."""
    neighbor = NEIGHBORS[name]
    if not (checkout / neighbor.folder).is_dir():
        sys.exit(f"the checkout must have the folder {neighbor.folder}, got {checkout}. Pass the repository's root.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / neighbor.folder).symlink_to(checkout.resolve() / neighbor.folder)
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        source = described(checkout)
        if neighbor.checkout_in and source.startswith("commit"):  # at no tag of a release
            environment[neighbor.checkout_in] = str(checkout.resolve())
        version, file = found(neighbor.module, environment)
        if not file.is_relative_to(folder):
            sys.exit(
                f"{neighbor.module} must come from {checkout}, got {file}. Remove the import hook before PYTHONPATH."
            )
        print(f"{neighbor.module} {version} of {checkout}, at {source}", flush=True)
        return run_tests(name, version, source, arguments, environment)


def run_installed(name: str, arguments: Sequence[str]) -> int:
    """Run the tests that concern a neighbor against the installed one, and return pytest's exit code."""
    version, file = found(NEIGHBORS[name].module)
    print(f"{NEIGHBORS[name].module} {version}, {file}", flush=True)
    return run_tests(name, version, "PyPI", arguments, dict(os.environ))


def run_version(name: str, version: str, arguments: Sequence[str]) -> int:
    """Run the tests that concern a neighbor in an environment with that version, and return pytest's exit code."""
    neighbor = NEIGHBORS[name]
    folder = ROOT / "build" / f"{neighbor.distribution}-{version}"
    python, installed = folder / "bin" / "python", folder / "installed"
    if not installed.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # Triton's interpreter, before 3.6, makes numbers of arrays with one element, which newer numpy refuses.
        wanted = (f"{neighbor.distribution}=={version}", "numpy<2.4", "--editable", f"{ROOT}[{neighbor.extras}]")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        define_kernels_without_gpu(folder)
        installed.touch()
    return subprocess.run([str(python), __file__, name, "installed", *arguments]).returncode


def define_kernels_without_gpu(environment: Path) -> None:
    """Let an environment's Triton define kernels on a machine without a GPU, as Triton 3.4 does by itself.

    Before, which is beside torch 2.6 and 2.7, it asks for the GPU's driver when a kernel is defined, and upstream
    defines one when it is imported.
    """
    for file in environment.glob("lib/python*/site-packages/triton/runtime/autotuner.py"):
        asks = "self.do_bench = driver.active.get_benchmarker()"
        text = file.read_text(encoding="utf-8")
        later = "self.do_bench = lambda *args, **kwargs: driver.active.get_benchmarker()(*args, **kwargs)"
        file.unlink()  # it may be a link into a cache
        file.write_text(text.replace(asks, later), encoding="utf-8")


def run_tests(name: str, version: str, source: str, arguments: Sequence[str], environment: dict[str, str]) -> int:
    """Run the tests that concern a neighbor, record them if that is wanted, and return pytest's exit code."""
    neighbor = NEIGHBORS[name]
    recorded, arguments = "--record" in arguments, [each for each in arguments if each != "--record"]
    tests = [path for path in sorted((ROOT / "tests").glob(neighbor.tests)) if path.stem not in neighbor.without]
    if any(map(names_tests, ["", *arguments], arguments)):
        if recorded:
            sys.exit(
                "a record must be of all tests for a neighbor, got some. Leave out --record, or the files of tests."
            )
        tests = []
    commit = git(ROOT, "describe", "--always")
    if git(ROOT, "status", "--porcelain", "--", "emerging_optimizers", "tests"):
        commit += " with changes"
    with tempfile.TemporaryDirectory() as folder:
        report, in_processes = Path(folder) / "report.xml", Path(folder) / "in_processes"
        environment = {**environment, "TEST_RECORD": str(in_processes)}
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments, *map(str, tests)]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code == 0 and recorded:
            row = {
                "neighbor": neighbor.distribution,
                "version": version.partition("+")[0],
                "source": source,
                "beside": {
                    NEIGHBORS[each].distribution: found(NEIGHBORS[each].module, environment)[0].partition("+")[0]
                    for each in neighbor.beside
                    if each != name
                },
                "tests": counts(report, in_processes),
                "commit": commit,
                "date": date.today().isoformat(),
            }
            version_table.record(row)
            print("recorded:", json.dumps(row))
    return code


def counts(report: Path, in_processes: Path) -> dict[str, list[int]]:
    """Return how many tests passed and were skipped, by the number of processes."""
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    lines = in_processes.read_text(encoding="utf-8").splitlines() if in_processes.exists() else []
    skipped = int(suite.get("skipped", 0))
    # A test that starts others in processes is none of its own.
    by_processes = {"1": [int(suite.get("tests", 0)) - skipped - len(lines), skipped]}
    for line in lines:
        processes, *numbers = line.split()
        total = by_processes.setdefault(processes, [0, 0])
        total[:] = [a + int(b) for a, b in zip(total, numbers, strict=True)]
    return dict(sorted(by_processes.items(), key=lambda each: int(each[0])))


def names_tests(before: str, argument: str) -> bool:
    """Return whether an argument of pytest is a file of tests, and not the value of an option that leaves some out."""
    return before not in ("--deselect", "--ignore") and (ROOT / argument.partition("::")[0]).is_file()


def described(checkout: Path) -> str:
    """Return the tag of a checkout, or its commit and date."""
    if not (commit := git(checkout, "describe", "--always", "--exclude=*", "--dirty")):
        return "no commit"
    day = git(checkout, "log", "-1", "--format=%cs")
    tag = git(checkout, "describe", "--tags", "--exact-match", "--dirty")
    return f"tag {tag}" if tag else f"commit {commit} of {day}"


def git(checkout: Path, *arguments: str) -> str:
    """Return what git prints, "" where it fails."""
    done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in NEIGHBORS:
        sys.exit(f"usage: test_against.py {'|'.join(NEIGHBORS)} CHECKOUT|VERSION|installed [ARGUMENTS OF PYTEST]")
    name, against, *rest = sys.argv[1:]
    if against == "installed":
        sys.exit(run_installed(name, rest))
    if re.fullmatch(r"\d+(\.\d+)+\w*", against) and not Path(against).exists():
        sys.exit(run_version(name, against, rest))
    sys.exit(run_checkout(name, Path(against), rest))
