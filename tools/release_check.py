# SPDX-License-Identifier: Apache-2.0
"""Builds sdist and wheel, installs the wheel beside upstream in an empty environment, and tests what is there then.

Upstream's files must be the same before and after, and the tests run from the sdist, whose package is put away: what
they import is the wheel's. All tests run, the long sweeps among them. Arguments go to pytest.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path


ROOT = Path(__file__).parents[1]
# What checks the source tree itself.
OF_SOURCES = ("tests/test_package.py", "tests/test_upstream_patch.py", "tests/test_written_files.py")


def run(*command: object, cwd: Path) -> None:
    """Run a command, show what it prints, and end the program if it fails."""
    print("$", " ".join(map(str, command)), flush=True)
    done = subprocess.run(list(map(str, command)), cwd=cwd)
    if done.returncode:
        sys.exit(f"Not fit for release: the command above failed with {done.returncode}.")


def fingerprints(package: Path) -> dict[str, str]:
    """Return a hash of every file below a directory, without what Python compiles."""
    files = (path for path in sorted(package.rglob("*")) if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def require(ok: bool, message: str) -> None:
    """End the program with a message unless ``ok`` holds."""
    if not ok:
        sys.exit(f"Not fit for release: {message}")


def main() -> None:
    """Check a release."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _, for_pytest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        dist, environment = scratch / "dist", scratch / "environment"
        run(sys.executable, "-m", "build", "--outdir", dist, ROOT, cwd=scratch)
        [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")

        venv.create(environment, with_pip=True)
        python = environment / "bin/python"
        pip = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
        run(*pip, "emerging-optimizers", cwd=scratch)
        [package] = environment.glob("lib/python*/site-packages/emerging_optimizers")
        before = fingerprints(package)
        run(*pip, f"{wheel}[test]", cwd=scratch)
        run(python, "-m", "pip", "check", cwd=scratch)
        after = fingerprints(package)
        require(before.items() <= after.items(), "the wheel has changed files of upstream's.")
        own = sorted({Path(path).parts[0] for path in after.keys() - before.keys()})
        require(
            own == ["adaptive_muon", "adaptive_muon_discovery"], f"the wheel has put {own} into upstream's package."
        )
        print(f"Upstream's {len(before)} files are untouched; the wheel has {len(after) - len(before)} of its own.")

        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        [source] = scratch.glob("emerging_optimizers_adaptive_muon-*/")
        shutil.rmtree(source / "emerging_optimizers")
        ignored = [f"--ignore={path}" for path in OF_SOURCES]
        every = ("-m", "", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
        run(python, "-m", "pytest", *every, *ignored, *for_pytest, cwd=source)
    print("Fit for release.")


if __name__ == "__main__":
    main()
