# SPDX-License-Identifier: Apache-2.0
import os
import sys
from pathlib import Path

import pytest
import torch
from tree import ROOT


# On matrices this small a second thread only costs, and on a busy machine it costs much. TEST_THREADS=2 tries others.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

if "RANK" not in os.environ:  # tests that run in several processes draw nothing
    from hypothesis import HealthCheck, settings

    # A busy machine is no reason to fail, and each run tries the same examples.
    options = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("any machine", **options)
    settings.load_profile("any machine")

# `python -m pytest` makes what lies in the checkout importable, such as build/ and the metadata of an earlier version.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]


def pytest_configure() -> None:
    """Lets TEST_BFLOAT16_UNITS=0 or 1 say whether the CPU has units for bfloat16, whatever it has."""
    if forced := os.environ.get("TEST_BFLOAT16_UNITS"):
        from emerging_optimizers.adaptive_muon.orthogonalize import cpu

        pytest.MonkeyPatch().setattr(cpu, "has_bfloat16_units", lambda: bool(int(forced)))


# The files that take longest, in the order in which the two workers of "make test" take them: those with tests in
# several processes beside one without.
LONGEST = ["test_sharded", "test_newton_schulz", "test_upstream_patch", "test_megatron", "test_nemo", "test_examples"]
LONGEST += ["test_gpu_rehearsal"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Has pytest-xdist begin with what takes longest."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
