# SPDX-License-Identifier: Apache-2.0
"""Automodel's experts in one tensor: their orientation and their gates, by Automodel's own forward."""

from typing import Any

import pytest
import torch
from expert_matrices import check_matrices
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.experts import GroupedExperts, GroupedExpertsDeepEP
from side_by_side import normal
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


EXPERTS, DIM, INNER = 3, 32, 48
HALVES = "gate and up projection of 48 rows each"


def config(activation: str) -> MoEConfig:
    """Of a layer with two experts for each token."""
    return MoEConfig(
        n_routed_experts=EXPERTS,
        n_shared_experts=0,
        n_activated_experts=2,
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=True,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="softmax",
        route_scale=1.0,
        dim=DIM,
        inter_dim=INNER,
        moe_inter_dim=INNER,
        norm_topk_prob=False,
        expert_activation=activation,
        dtype=torch.float64,
    )


def routed(experts: nn.Module) -> tuple[nn.ModuleDict, HybridAdaptiveMuon, dict[int, Any]]:
    """A model of these experts with random weights, its optimizer, and the routes of its parameters."""
    for number, p in enumerate(experts.parameters()):
        p.data.copy_(normal(tuple(p.shape), number) / DIM**0.5)
    model = nn.ModuleDict({"experts": experts})
    optimizer = HybridAdaptiveMuon.from_model(model, stacked_experts=True, split_gate_up=True)
    return model, optimizer, {id(p): route for _, p, route in optimizer.routes}


@pytest.mark.parametrize(
    ("activation", "text"),
    [
        ("swiglu", HALVES),
        ("swigluoai", HALVES),
        ("geglu", HALVES),
        ("quick_geglu", f"{HALVES}, in turn"),
        ("relu2", "stored (in, out); not split"),
    ],
)
@torch.no_grad()
def test_each_expert_is_a_matrix_as_automodel_multiplies_by_it(activation: str, text: str) -> None:
    experts = GroupedExperts(config(activation))
    _, _, routes = routed(experts)
    assert text in routes[id(experts.gate_and_up_projs)].text
    x, mask = normal((6, DIM), 7).double(), torch.ones(6, dtype=torch.bool)
    weights, chosen = torch.full((6, 2), 0.5, dtype=torch.float64), torch.tensor([[0, 1], [1, 2], [0, 2]] * 2)
    up, down = experts.gate_and_up_projs, experts.down_projs
    # Its activations are computed in float32.
    check_matrices(experts, up, down, lambda: experts(x, mask, weights, chosen), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu"])
def test_experts_with_a_dispatcher_have_the_same_parts(activation: str) -> None:
    """Whose forward needs GPUs, and multiplies by the same tensors."""
    texts = []
    for cls in (GroupedExperts, GroupedExpertsDeepEP):
        experts = cls(config(activation))
        _, _, routes = routed(experts)
        texts.append([routes[id(p)].text for p in experts.parameters()])
    assert texts[0] == texts[1] and "stored (in, out)" in texts[0][0]
