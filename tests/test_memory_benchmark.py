# SPDX-License-Identifier: Apache-2.0
"""A step's temporary memory is that of one large matrix, however many there are."""

import sys
from pathlib import Path

import pytest
import torch


def test_the_peak_does_not_grow_with_the_number_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import memory

    shape = (300, 400)
    one, many = (memory.peak_of([shape] * count, torch.float32, moment2_method="namo") for count in (2, 12))
    assert 300 * 400 * 4 < one < 6 * 300 * 400 * 4
    assert many < 1.1 * one
    del sys.modules["memory"]
