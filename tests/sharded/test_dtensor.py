# SPDX-License-Identifier: Apache-2.0
"""Parameters that are DTensors: FSDP2, HSDP, tensor parallelism on a mesh, and both at once."""

from collections.abc import Callable

import pytest
import torch
from models import WAYS, fsdp, full, hsdp, local, models, train
from pieces import OPTIONS, difference
from torch import nn
from torch.distributed.tensor import DTensor

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_given_the_same_gradients(method: str, way: Callable[[nn.Module], None], mode: str) -> None:
    """Weights and state of the sharded model are the whole model's, with the layout read off the DTensors."""
    whole, sharded, places = models(way)
    pairs = [(p, q) for p, q in zip(whole.parameters(), sharded.parameters(), strict=True) if p.ndim == 2]
    options = {**OPTIONS, "moment2_method": method, "weight_decay": 0.1}
    optimizers = (
        AdaptiveMuon([p for p, _ in pairs], **options),
        AdaptiveMuon([q for _, q in pairs], tp_mode=mode, **options),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in pairs:
            p.grad = torch.randn(p.shape, generator=generator)
            piece = p.grad.flatten()[places[q]]
            q.grad = q.detach().clone()
            local(q.grad).copy_(piece)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in pairs:
        assert difference(full(q), p.detach()) <= 1e-6
        state, other = optimizers[0].state[p], optimizers[1].state[q]
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert difference(full(other[key]), value) <= 1e-6, key
            if isinstance(q, DTensor) and value.shape == p.shape:
                assert isinstance(other[key], DTensor) and other[key].placements == q.placements


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_training_of_a_model(method: str, way: Callable[[nn.Module], None]) -> None:
    """With its own gradients too; where the model's own products are split, rounding differs before the optimizer."""
    whole, sharded, _ = models(way)
    options = {**OPTIONS, "moment2_method": method, "scalar_lr": 1e-3}
    losses = [train(model, HybridAdaptiveMuon.from_model(model, **options), range(6)) for model in (whole, sharded)]
    assert losses[0][-1] < losses[0][0]
    within = 1e-5 if way in (fsdp, hsdp) else 1e-2
    assert losses[1] == pytest.approx(losses[0], rel=within)
    assert all(
        difference(full(q), p.detach()) <= within
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True)
    )
