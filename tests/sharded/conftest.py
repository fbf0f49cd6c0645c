# SPDX-License-Identifier: Apache-2.0
"""Tests that run in every process of a torchrun; tests/test_sharded.py starts them in 1, 2 and 4 processes."""

import os
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist


collect_ignore_glob = [] if "RANK" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def processes() -> Iterator[None]:
    """The process group of all processes. A rank that fails alone leaves the others waiting no longer than this."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


@pytest.fixture
def group() -> dist.ProcessGroup:
    """The group of all processes."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD
