# SPDX-License-Identifier: Apache-2.0
"""Where the Triton kernels are used, by the version of Triton."""

from typing import Any

import pytest
import torch

from emerging_optimizers.adaptive_muon.kernels import usable


triton = pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("version", "enough"), [("3.2.0", False), ("2.3.1", False), ("3.3.0", True), ("3.10.0+git", True)]
)
def test_an_old_triton_is_not_used(version: str, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU none is. The log says why."""
    said: list[Any] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(usable.logging, "warning", lambda text, *values: said.append(text % values))
    device = torch.device("cuda", 90 + ["3.2.0", "2.3.1", "3.3.0", "3.10.0+git"].index(version))  # answers are kept
    assert not usable.kernels_usable(device)
    [line] = said
    assert (f"Triton must be >= 3.3, got {version}. Install torch 2.7 or newer." in line) is not enough
