# SPDX-License-Identifier: Apache-2.0
"""Starts a folder of tests in several processes, which talk by gloo on the CPU."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_in_processes(tests: Sequence[Path], processes: int, imports: str, **environment: str) -> None:
    """Runs pytest on files or folders in several processes, and fails with its output if a test does.

    Args:
        tests: What to run.
        processes: How many processes.
        imports: Statements that import what takes long, which is then done once.
        **environment: Additional environment variables.
    """
    command = [sys.executable, str(Path(__file__).with_name("forked.py")), str(processes), imports]
    # The first rank that fails ends the run; the others would wait for it. A second -q, beside that of pyproject.toml,
    # would leave out the summary, whose numbers are recorded.
    command += ["-x", "--no-header", "-p", "no:cacheprovider", *map(str, tests)]
    # Plugins of other packages, such as Hypothesis's, take each process seconds to import.
    own = {"OMP_NUM_THREADS": os.environ.get("TEST_THREADS", "1"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, **own, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
    if record := os.environ.get("TEST_RECORD"):  # of tools/test_against.py
        assert re.search(r"\d (passed|skipped)", done.stdout), f"pytest printed no summary: {done.stdout[-2000:]}"
        with open(record, "a", encoding="utf-8") as file:
            file.write(f"{processes} {counted(done.stdout, 'passed')} {counted(done.stdout, 'skipped')}\n")


def counted(output: str, outcome: str) -> int:
    """The number of tests with an outcome, from the first rank's summary."""
    numbers = re.findall(rf"\b(\d+) {outcome}\b", output)
    return int(numbers[0]) if numbers else 0
