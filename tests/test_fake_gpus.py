# SPDX-License-Identifier: Apache-2.0
"""A step on two GPUs that are not there: it waits for neither, and works on each parameter where that is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_features import made, of_features
from fake_gpus import fake_gpus
from on_cuda import OPTIONS
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


def steps_that_wait(
    params: list[nn.Parameter], optimizer: Any, waits: list[str], rate: str | None = None
) -> list[str]:
    """What waits for a GPU after the first step, where the rate of the matrices is a number, or on a device."""
    for step in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        if not step:  # which reads whether the rate is zero
            waits.clear()
            if rate is not None:
                optimizer.param_groups[0]["lr"] = torch.full((), 0.02, device=rate)
    return waits


@pytest.mark.parametrize("method", ["adamuon", "namo_d"])
@of_features
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
def test_a_step_waits_for_no_device(
    method: str, feature: str, capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_gpus(monkeypatch) as gpus:
        params, optimizer = made("cuda:1", method, feature, capturable=capturable)
        assert not steps_that_wait(params, optimizer, gpus.waits, "cuda:0" if capturable else None)


def test_what_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x: torch.Tensor
    reads: dict[str, Callable[[], object]] = {
        "a value": lambda: x.sum().item(),
        "a branch": lambda: bool(x.any()),
        "a list of indices": lambda: x[[0, 1]],
        "a mask": lambda: x[x > 0],
        "a tensor of a list": lambda: torch.tensor([1, 2], device="cuda"),
        "a copy": lambda: x.cpu(),
    }
    for name, read in reads.items():
        with fake_gpus(monkeypatch) as gpus:
            x = torch.empty(4, 3, device="cuda")
            assert not gpus.waits
            try:
                read()
            except RuntimeError:  # there is no value to return
                pass
            assert gpus.waits, name


@pytest.mark.parametrize(
    "options",
    [{}, {"diagnostics_every": 1}, {"stochastic_rounding": True, "momentum_dtype": "bfloat16"}, {"capturable": True}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_models_step_on_two_devices(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group has parameters on both, and its rate on one of them."""
    with fake_gpus(monkeypatch) as gpus:
        shapes = [(48, 32), (48, 32), (32,), (64, 48), (3, 5, 7)]
        params = [
            nn.Parameter(torch.empty(shape, device=f"cuda:{number % 2}", dtype=dtype))
            for number, shape in enumerate(shapes)
        ]
        optimizer = HybridAdaptiveMuon(params, moment2_method="namo_d", **(OPTIONS | options))
        assert not steps_that_wait(params, optimizer, gpus.waits, "cuda:1" if "capturable" in options else None)
        assert all(optimizer.state[p]["momentum_buffer"].device == p.device for p in (*params[:2], params[3]))
