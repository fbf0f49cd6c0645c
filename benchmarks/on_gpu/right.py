# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU, run by pytest in processes of their own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from on_gpu.record import Record
from on_gpu.sizes import Sizes


ROOT = Path(__file__).parents[2]
# The quickest first. What comes later may be without time.
FILES = tuple(
    dict.fromkeys(["test_symmetric_kernel.py", *sorted(path.name for path in (ROOT / "tests").glob("test_*cuda*.py"))])
)
# These take nearly all of a GPU's memory, and run after all others by themselves.
ALONE = "2_to_the_31"

_OUTCOMES = ("passed", "failed", "skipped", "error")


def run(record: Record, sizes: Sizes) -> None:
    """Run each file, then the tests that run by themselves."""
    choices = [(name, name, sizes.test_choice, sizes.test_workers) for name in FILES]
    choices += [(f"{name} {ALONE}", name, ALONE, 1) for name in FILES if ALONE in (ROOT / "tests" / name).read_text()]
    for title, name, choice, workers in choices:
        plugin = sizes.stand_in if "cuda" in name and choice != ALONE else ""
        what = name, choice, workers, plugin
        record.measure(title, lambda what=what: tested(*what, seconds=record.seconds_left), about=15)


def tested(name: str, choice: str, workers: int, plugin: str = "", *, seconds: float) -> dict[str, Any]:
    """Return the counts of a run of pytest, and the end of its output if not all is well.

    Args:
        name: The test file.
        choice: pytest's ``-k``.
        workers: The processes that share the tests, where pytest-xdist is installed.
        plugin: A module of ``tests`` that pytest loads first, if there is one.
        seconds: The time after which it is stopped.
    """
    command = [sys.executable, "-m", "pytest", f"tests/{name}", "-k", choice, "--tb=short", "-p", "no:cacheprovider"]
    if workers > 1 and find_spec("xdist"):
        command += ["-n", str(workers)]
    command += ["-p", plugin] if plugin else []
    path = os.pathsep.join(filter(None, ("tests", os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            status: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    result: dict[str, Any] = {"command": command[1:], "status": status, **counts(text)}
    return result if status == 0 else result | {"output": text[-6000:]}


def counts(output: str) -> dict[str, int]:
    """Return the numbers of pytest's last line: "1 failed, 2 passed, 3 skipped in 4.56s"."""
    line = next((each for each in reversed(output.splitlines()) if re.search(r" in [\d.]+s", each)), "")
    found = {outcome: re.search(rf"(\d+) {outcome}", line) for outcome in _OUTCOMES}
    return {outcome: int(match[1]) if match else 0 for outcome, match in found.items()}
