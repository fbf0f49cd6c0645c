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
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)


def test_experts() -> None:
    losses = {}
    for ep, expert_tp in (1, 1), (2, 1), (1, 2), (2, 2):
        with parallel(expert_model_parallel_size=ep, expert_tensor_parallel_size=expert_tp):
            model = gpt(
                num_moe_experts=4,
                moe_router_topk=2,
                moe_ffn_hidden_size=32,
                moe_token_dispatcher_type="allgather",
                moe_grouped_gemm=False,
            )
            losses[ep, expert_tp] = train(model, optimizer_of(model), range(10))
    print(losses)
    for of in losses.values():
        assert of == pytest.approx(losses[1, 1], rel=1e-5)


@each_method
@pytest.mark.parametrize("kind", ["legacy", "layout"])
def test_layer_wise(method: str, kind: str) -> None:
    losses = {}
    for layer_wise in "", kind:
        with parallel(2):
            model = gpt(bf16=True, layer_wise=layer_wise)
            losses[layer_wise] = train(
                model,
                optimizer_of(model, method, clip_grad=0.0, use_layer_wise_distributed_optimizer=bool(layer_wise)),
                range(10),
            )
    print(losses)
    assert losses[kind] == losses[""]
