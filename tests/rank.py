# SPDX-License-Identifier: Apache-2.0
"""For conftest.py of tests that run in every process of a torchrun: hooks and fixtures that all of them share."""

import multiprocessing
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch import distributed as dist


collect_ignore_glob = [] if "RANK" in os.environ else ["test_*.py"]


_status: list[int] = []


def pytest_sessionfinish(exitstatus: int) -> None:
    """Keeps what pytest is going to return."""
    _status.append(int(exitstatus))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Ends a rank without Python's clean-up, in which a gloo group that something still refers to may abort."""
    if "RANK" in os.environ:
        for child in multiprocessing.active_children():  # Megatron's checkpoint writers, which would stay
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status[-1] if _status else 2)


@pytest.fixture(scope="session", autouse=True)
def processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """The process group of all processes.

    torchrun ends all of them when one fails. The timeout is for ranks that wait for each other, which must end too; it
    is long, since on a busy machine a rank may have to wait minutes for the others to be given time.
    """
    dist.init_process_group("gloo", timeout=timedelta(minutes=15))
    yield
    if not request.session.testsfailed:
        dist.barrier()  # nobody leaves while another still talks to it


@pytest.fixture
def group() -> dist.ProcessGroup:
    """The group of all processes."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD
