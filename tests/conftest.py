# SPDX-License-Identifier: Apache-2.0
import os
import sys
from pathlib import Path

import pytest
import torch
from tree import ROOT


# On matrices this small a second thread only costs, and on a busy machine it costs much. TEST_THREADS=2 tries others.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

# `python -m pytest` makes what lies in the checkout importable, such as build/ and the metadata of an earlier version.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]


def pytest_configure() -> None:
    """Lets TEST_BFLOAT16_UNITS=0 or 1 say whether the CPU has units for bfloat16, whatever it has."""
    if forced := os.environ.get("TEST_BFLOAT16_UNITS"):
        from emerging_optimizers.adaptive_muon import newton_schulz

        pytest.MonkeyPatch().setattr(newton_schulz, "_cpu_has_bfloat16_units", lambda: bool(int(forced)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
