# SPDX-License-Identifier: Apache-2.0
"""Starts a folder of tests in several processes, which talk by gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def run_in_processes(tests: Path, processes: int, *arguments: str, **environment: str) -> None:
    """Runs pytest on ``tests`` in every process of a torchrun, and fails with its output if a test does."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # The first rank that fails ends the run; the others would wait for it.
    pytest_ = ["-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", str(tests), *arguments]
    # Plugins of other packages, such as Hypothesis's, take each process seconds to import.
    own = {"OMP_NUM_THREADS": os.environ.get("TEST_THREADS", "1"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, **own, **environment}
    done = subprocess.run([*torchrun, *pytest_], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
