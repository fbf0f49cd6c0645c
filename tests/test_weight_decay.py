# SPDX-License-Identifier: Apache-2.0
"""Cautious weight decay: which elements decay, and by how much."""

from typing import Any

import pytest
import torch
from side_by_side import each_method, normal
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.passes import apply, decay_weights


HYPER: dict[str, Any] = {"lr": 0.5, "fp32_matmul_prec": "highest", "extra_scale_factor": 0.01}


class Hooked(AdaptiveMuon):
    """One with a function between decay and update."""

    def pre_weight_update_fn_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
        """Change nothing."""


def moved(W: torch.Tensor, method: str, kind: type[AdaptiveMuon] = AdaptiveMuon, **options: Any) -> torch.Tensor:
    """What a step with one gradient makes of a weight."""
    p = nn.Parameter(W.clone())
    optimizer = kind([p], moment2_method=method, **HYPER | options)
    p.grad = normal((9, 7), 1).to(W.dtype)
    optimizer.step()
    return p.detach()


@pytest.mark.parametrize("hooked", [False, True], ids=["", "one by one"])
@each_method
def test_an_element_decays_where_the_step_brings_it_nearer_to_zero(method: str, hooked: bool) -> None:
    """The step without decay says where; the decoupled decay says by how much."""
    W, kind = normal((9, 7)).double(), Hooked if hooked else AdaptiveMuon
    cautious = moved(W, method, kind, weight_decay=0.1, weight_decay_method="cautious")
    undecayed, decoupled = (moved(W, method, weight_decay=share) for share in (0.0, 0.1))
    agree = (W - undecayed) * W > 0
    assert 0.3 < agree.double().mean() < 0.7
    torch.testing.assert_close(cautious, torch.where(agree, decoupled, undecayed), atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("decay", [0.5, torch.full((1, 1, 1), 0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_signs_count_and_not_products(decay: Any, dtype: torch.dtype) -> None:
    """Whose product is too small for float32; and an update of zero lets a weight decay, as in the paper's formula."""
    tiny = 2.0**-100
    weights = [tiny, tiny, -tiny, -tiny, 1.0, 1.0, -1.0, 0.0, 2.0]
    updates = [tiny, -tiny, tiny, -tiny, 1.0, -1.0, 0.0, 1.0, -0.0]
    halved = [True, False, False, True, True, False, True, False, True]
    W, U = torch.tensor([weights], dtype=dtype), torch.tensor([[updates]], dtype=torch.float32)
    decay_weights([W], decay, U)
    expected = [w / 2 if half else w for w, half in zip(weights, halved, strict=True)]
    assert W.tolist() == [expected]
    W = torch.tensor([weights], dtype=dtype)
    apply([W], U, torch.ones(1, 1, 1), lr=0.0, decay=decay, cautious=True)
    assert W.tolist() == [expected]


def test_a_negative_factor_turns_the_update_and_its_sign() -> None:
    W = normal((9, 7))
    undecayed = moved(W, "namo", weight_decay=0.0, extra_scale_factor=-0.01)
    cautious = moved(W, "namo", weight_decay=0.1, weight_decay_method="cautious", extra_scale_factor=-0.01)
    agree = (W - undecayed) * W > 0
    assert torch.equal(cautious == undecayed, ~agree)
    assert (cautious.abs() < undecayed.abs())[agree].all()
