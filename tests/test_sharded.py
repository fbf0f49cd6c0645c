# SPDX-License-Identifier: Apache-2.0
"""Starts the tests of tests/sharded in four, two and one processes, which talk by gloo on the CPU.

To run some of them by hand: ``torchrun --nproc_per_node 2 -m pytest -x tests/sharded -k blocks``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


SHARDED = Path(__file__).parent / "sharded"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run with four processes saves, and the others load."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("processes", [4, 2, 1])  # in this order, for the checkpoints
def test_in_processes(processes: int, checkpoints: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # The first rank that fails ends the run; the others would wait for it.
    pytest_ = ["-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", str(SHARDED)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CHECKPOINTS": str(checkpoints)}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    done = subprocess.run([*torchrun, *pytest_], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
