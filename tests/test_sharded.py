# SPDX-License-Identifier: Apache-2.0
"""Starts the tests of tests/sharded in four, two and one processes.

To run some of them by hand: ``torchrun --nproc_per_node 2 -m pytest -x tests/sharded -k blocks``.
"""

from pathlib import Path

import pytest
from torchrun import run_in_processes


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run with four processes saves, and the others load."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("processes", [4, 2, 1])  # in this order, for the checkpoints
def test_in_processes(processes: int, checkpoints: Path) -> None:
    imports = "import torch.distributed.checkpoint, torch.distributed.fsdp, emerging_optimizers.adaptive_muon"
    run_in_processes([Path(__file__).parent / "sharded"], processes, imports, CHECKPOINTS=str(checkpoints))
