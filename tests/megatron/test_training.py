# SPDX-License-Identifier: Apache-2.0
"""A real GPTModel learns the same under every parallelism."""

import pytest
from models import gpt, optimizer_of, parallel, train
from side_by_side import each_method

from emerging_optimizers.adaptive_muon.integrations.megatron import register


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@each_method
def test_tensor_parallel(method: str) -> None:
    losses = {}
    for tp in 1, 2, 4:
        with parallel(tp):
            model = gpt()
            losses[tp] = train(model, optimizer_of(model, method), range(10))
    assert losses[1][-1] < 0.95 * losses[1][0]
    print(losses)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("expert_tp", [1, 2])
def test_experts(expert_tp: int) -> None:
    losses = {}
    for tp, ep, etp in (1, 1, 1), (1, 2, 1), (2, 1, expert_tp), (2, 2, expert_tp):
        with parallel(tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp):
            model = gpt(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32, moe_token_dispatcher_type="allgather", moe_grouped_gemm=False)
            losses[tp, ep] = train(model, optimizer_of(model), range(10))
    print(losses)
    for of in losses.values():
        assert of == pytest.approx(losses[1, 1], rel=1e-5)
