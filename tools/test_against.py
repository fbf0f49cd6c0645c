# SPDX-License-Identifier: Apache-2.0
"""Runs tests against a checkout of a neighbour, in place of its installed release.

    python tools/test_against.py upstream ../Emerging-Optimizers [arguments of pytest]
    python tools/test_against.py megatron ../Megatron-LM [arguments of pytest]

Without a file of tests among the arguments, those that concern the neighbour are run. The checkout stays as it is. Only its package is put before the installed one, by a link in a temporary folder. Our own
package is found through the editable install of this repository.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Neighbour:
    """A package that ours is installed beside.

    Args:
        package: The folder of the checkout that Python imports.
        module: The module that has ``__version__``.
        tests: A pattern of the files of tests that concern it.
        without: The files among them that do not, without their endings.
        checkout_in: The environment variable by which tests find the checkout itself, where its branch is main.
    """

    package: str
    module: str
    tests: str = "test_*.py"
    without: Sequence[str] = ()
    checkout_in: str | None = None


NEIGHBOURS = {
    "upstream": Neighbour(
        package="emerging_optimizers",
        module="emerging_optimizers",
        # The other neighbours' tests, and what is not the package.
        without=(
            *("test_automodel", "test_huggingface", "test_megatron", "test_nemo"),
            *("test_against", "test_docs", "test_examples", "test_experiments", "test_written_files"),
        ),
        checkout_in="UPSTREAM_CHECKOUT",
    ),
    # It starts those of tests/megatron_core.
    "megatron": Neighbour(package="megatron", module="megatron.core", tests="test_megatron.py"),
}


def found(module: str, environment: dict[str, str]) -> tuple[str, Path]:
    """Return the version of a module, and its file, as a test finds it."""
    code = f"import {module} as found; print(found.__version__, found.__file__, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{module} could not be imported from the checkout:\n{done.stderr}")
    version, file = done.stdout.splitlines()[-2:]
    return version, Path(file)


def run(neighbour: Neighbour, checkout: Path, arguments: Sequence[str]) -> int:
    """Run the tests that concern a neighbour against a checkout of it, and return pytest's exit code."""
    if not (checkout / neighbour.package).is_dir():
        sys.exit(f"the checkout must have the folder {neighbour.package}, got {checkout}: pass the repository's root")
    tests = [path for path in sorted((ROOT / "tests").glob(neighbour.tests)) if path.stem not in neighbour.without]
    if any(map(names_tests, ["", *arguments], arguments)):
        tests = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / neighbour.package).symlink_to(checkout.resolve() / neighbour.package)
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if neighbour.checkout_in and branch(checkout) == "main":
            environment[neighbour.checkout_in] = str(checkout.resolve())
        version, file = found(neighbour.module, environment)
        if not file.is_relative_to(folder):
            sys.exit(f"{neighbour.module} must come from {checkout}, got {file}: an import hook is before PYTHONPATH")
        print(f"{neighbour.module} {version} of {checkout}, at {described(checkout)}", flush=True)
        command = [sys.executable, "-m", "pytest", *arguments, *map(str, tests)]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def names_tests(before: str, argument: str) -> bool:
    """Return whether an argument of pytest is a file of tests, and not the value of an option that leaves some out."""
    return before not in ("--deselect", "--ignore") and (ROOT / argument.partition("::")[0]).is_file()


def branch(checkout: Path) -> str:
    """Return the branch of a checkout; "" or "HEAD" where it has none."""
    return _git(checkout, "rev-parse", "--abbrev-ref", "HEAD")


def described(checkout: Path) -> str:
    """Return the commit of a checkout, with its tag where it has one."""
    return _git(checkout, "describe", "--always", "--tags", "--dirty") or "no commit"


def _git(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in NEIGHBOURS:
        sys.exit(f"usage: test_against.py {'|'.join(NEIGHBOURS)} CHECKOUT [ARGUMENTS OF PYTEST]")
    sys.exit(run(NEIGHBOURS[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:]))
