# SPDX-License-Identifier: Apache-2.0
"""A real GPTModel learns the same under every parallelism, in float32 and with bfloat16 weights."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, emerging_optimizers, get_megatron_optimizer
from models import MOE, cut, gpt, optimizer_of, parallel, seeded, train
from side_by_side import each_method
from torch import distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from emerging_optimizers.adaptive_muon.integrations.megatron.optimizer import (
    TensorParallelAdaptiveMuon,
    register,
    warn_of_blockwise,
)
from emerging_optimizers.adaptive_muon.integrations.megatron.splits import log_once


TABLE = emerging_optimizers._EMERGING_OPTIMIZERS
STOCK = TABLE["adaptive_muon"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    yield
    TABLE["adaptive_muon"] = STOCK


def losses_at(tp: int, method: str = "namo_d", **config: Any) -> list[float]:
    with parallel(tp):
        model = gpt()
        return train(model, optimizer_of(model, method, **config), range(10))


@each_method
def test_losses_do_not_depend_on_the_tensor_parallel_size(method: str) -> None:
    whole = losses_at(1, method)
    assert whole[-1] < 0.95 * whole[0]
    for tp in 2, 4:
        assert losses_at(tp, method) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("mode", ["duplicated", "distributed"])
def test_nor_on_how_the_whole_matrix_is_orthogonalized(mode: str) -> None:
    whole = losses_at(1)
    for tp in 2, 4:
        assert losses_at(tp, muon_tp_mode=mode) == pytest.approx(whole, rel=1e-5)


def test_blockwise_losses_do_and_the_user_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_blockwise.cache_clear()
    losses = [losses_at(tp, muon_tp_mode="blockwise") for tp in (1, 2, 2)]
    assert losses[1] == losses[2] != pytest.approx(losses[0], rel=1e-3)
    warnings = [record.getMessage() for record in caplog.records if "blockwise" in record.getMessage()]
    assert len(warnings) == (dist.get_rank() == 0)


def test_megatrons_own_losses_depend_on_the_tensor_parallel_size() -> None:
    """The reason for all this. The class of the releases does not take a step at all; that of 0.20 does."""
    TABLE["adaptive_muon"] = STOCK
    rates = {"lr": 1e-4, "muon_tp_mode": "duplicated"}
    try:
        whole = losses_at(1, "namo", **rates)
    except AttributeError as error:
        assert "scale_mode" in str(error)

        class WithScaleMode(STOCK.optimizer_cls):
            """As 0.20 mends it."""

            def __init__(self, *args: Any, scale_mode: str, **kwargs: Any) -> None:
                super().__init__(*args, scale_mode=scale_mode, **kwargs)
                self.scale_mode, self.extra_scale_factor = scale_mode, 1.0

        TABLE["adaptive_muon"] = emerging_optimizers.EmergingOptimizerEntry(
            WithScaleMode, config_to_kwargs=STOCK.config_to_kwargs
        )
        whole = losses_at(1, "namo", **rates)
    assert losses_at(2, "namo", **rates) != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_diagnostics_have_the_models_names_and_do_not_depend_on_the_parallelism(bf16: bool) -> None:
    """Also where bfloat16 parameters have float32 main ones in the optimizer. Queries, keys and values are apart."""
    register(diagnostics_every=1)
    seen = []
    for tp in 1, 4:
        with parallel(tp):
            model = gpt(bf16=bf16)
            optimizer = optimizer_of(model, "namo", muon_split_qkv=True)
            train(model, optimizer, range(2))
            [muon] = muons_of(optimizer)
            seen.append(muon.diagnostics())
    names = {f"decoder.layers.{i}.self_attention.linear_qkv.weight[{block}]" for i in range(2) for block in range(3)}
    names |= {f"decoder.layers.{i}.mlp.linear_fc{number}.weight" for i in range(2) for number in (1, 2)}
    assert names <= seen[0].keys() == seen[1].keys()
    for name, row in seen[0].items():
        assert seen[1][name] == pytest.approx(row, rel=0.1 if bf16 else 1e-3), name


def test_blockwise_diagnostics_name_the_shards() -> None:
    register(diagnostics_every=1)
    with parallel(2):
        model = gpt()
        optimizer = optimizer_of(model, "namo", muon_tp_mode="blockwise")
        train(model, optimizer, range(1))
        [muon] = muons_of(optimizer)
        assert all(f" (shard of rank {dist.get_rank() % 2})" in name for name in muon.diagnostics())


@pytest.mark.parametrize("mode", [{}, {"muon_tp_mode": "layer_sharded"}], ids=["megatron's default", "layer_sharded"])
def test_use_muon_of_a_parameter(mode: dict[str, str]) -> None:
    """What is tagged False goes to Megatron's scalar optimizer, also where Megatron has no such tag."""
    with parallel(2):
        model = gpt()
        tagged = model.module.decoder.layers[0].mlp.linear_fc1.weight
        tagged.use_muon = False
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adaptive_muon", lr=1e-2, **mode), [model])
        before = tagged.detach().clone()
        train(model, optimizer, range(1))
        [muon] = muons_of(optimizer)
        of_muon = [p for group in muon.param_groups for p in group["params"]]
        assert len(of_muon) == 4 * 2 - 1 and all(p is not tagged for p in of_muon) and not torch.equal(tagged, before)


@pytest.mark.parametrize("bf16", [False, True])
def test_position_embeddings_go_to_the_scalar_optimizer(bf16: bool) -> None:
    """Megatron's default, which it does not tag as embeddings."""
    with parallel(2):
        model = gpt(positions="learned_absolute", bf16=bf16)
        optimizer = optimizer_of(model)
        table = model.module.embedding.position_embeddings.weight
        before = table.detach().clone()
        train(model, optimizer, range(2))
        [muon] = muons_of(optimizer)
        of_muon = [p for group in muon.param_groups for p in group["params"]]
        assert len(of_muon) == 4 * 2 and all(p is not getattr(table, "main_param", table) for p in of_muon)
        assert not torch.equal(table, before)


def test_losses_do_not_depend_on_expert_and_expert_tensor_parallelism() -> None:
    losses = {}
    for ep, expert_tp in (1, 1), (2, 1), (2, 2), (1, 2):
        with parallel(expert_model_parallel_size=ep, expert_tensor_parallel_size=expert_tp):
            model = gpt(**MOE)
            if ep < expert_tp and all(getattr(p, "allreduce", True) for p in model.parameters()):
                # 0.18.2 does not tag experts here, and averages the gradients of different shards.
                with pytest.raises(ValueError, match="must have this rank in common only"):
                    optimizer_of(model)
                continue
            optimizer = optimizer_of(model)
            if ep > 1:  # Megatron makes a second instance for experts, 0.19 also with expert tensor parallelism
                assert len(optimizer.chained_optimizers) == 3
            losses[ep, expert_tp] = train(model, optimizer, range(10))
    for each in losses.values():
        assert each == pytest.approx(losses[1, 1], rel=1e-5)


@pytest.mark.parametrize("mode", ["layer_sharded", "blockwise"])
@pytest.mark.parametrize("sizes", [{"tp": 1}, {"tp": 2}, {"expert_model_parallel_size": 2}], ids=str)
def test_data_parallel_ranks_share_the_work(
    sizes: dict[str, int], mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Dense matrices among all ranks with the same strip, experts among those with the same experts."""
    caplog.set_level("INFO")
    losses, work, lines = {}, {}, {}
    for share in (True, False):
        register(share_replicas=share)
        caplog.clear()
        log_once.cache_clear()
        with parallel(**sizes):
            model = gpt(**(MOE if "tp" not in sizes else {}))
            optimizer = optimizer_of(model, muon_tp_mode=mode)
            losses[share] = train(model, optimizer, range(5))
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
        work[share] = torch.tensor(counter.get_total_flops())
        dist.all_reduce(work[share])
        lines[share] = [record for record in caplog.records if "share the orthogonalization" in record.getMessage()]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert bool(lines[True]) is (dist.get_rank() == 0) and not lines[False]
    if sizes.get("tp", 1) == 1 and "tp" in sizes:
        assert work[False] == 4 * work[True]
    else:  # two replicas of strips, or of experts; four of dense matrices
        assert 2 * work[True] <= work[False] <= 4 * work[True]


@each_method
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_weights_after_the_same_gradients(method: str, bf16: bool) -> None:
    """bfloat16 products of pieces round differently, so that losses can't tell; the main weights can."""

    def trained(tp: int) -> tuple[Any, dict[str, torch.Tensor]]:
        model = gpt(bf16=bf16)
        optimizer = optimizer_of(model, method)
        for step in range(3):
            for name, p in model.module.named_parameters():
                p.main_grad.copy_(seeded(name, p, 0.1, step))
            updated, norm, _ = optimizer.step()
            assert updated and norm > 1  # it was clipped
        return model, {name: getattr(p, "main_param", p).detach() for name, p in model.module.named_parameters()}

    with parallel(1):
        _, whole = trained(1)
        start = {name: getattr(p, "main_param", p).detach() for name, p in gpt(bf16=bf16).module.named_parameters()}
    for tp in 2, 4:
        with parallel(tp):
            model, mine = trained(tp)
            for name, p in model.module.named_parameters():
                moved, off = (whole[name] - start[name]).norm(), (mine[name] - cut(whole[name], name, p)).norm()
                # adamuon divides by the smallest elements of O, and turns the sign of some that are mere rounding.
                assert off <= moved * (1e-3 if method == "adamuon" else 5e-6), name
                assert p.dtype == (torch.bfloat16 if bf16 else torch.float32)


def muons_of(optimizer: Any) -> list[TensorParallelAdaptiveMuon]:
    """Our optimizers within Megatron's."""
    if hasattr(optimizer, "chained_optimizers"):
        return [muon for each in optimizer.chained_optimizers for muon in muons_of(each)]
    return [optimizer.optimizer] if isinstance(optimizer.optimizer, TensorParallelAdaptiveMuon) else []


@each_method
@pytest.mark.parametrize("kind", ["legacy", "layout"])
def test_layer_wise_distributed_optimizer(method: str, kind: str) -> None:
    losses = {}
    for layer_wise in "", kind:
        with parallel(2):
            model = gpt(bf16=True, layer_wise=layer_wise)
            name = "dist_adaptive_muon" if layer_wise else "adaptive_muon"
            # Clipping would sum the gradients' norm in another order.
            optimizer = optimizer_of(model, method, optimizer=name, clip_grad=0.0)
            losses[layer_wise] = train(model, optimizer, range(10))
    # Not bit for bit: a rank that has fewer of the matrices works on stacks of other sizes, whose last bits may differ,
    # and a bfloat16 weight is rounded to the next number then.
    assert losses[kind] == pytest.approx(losses[""], rel=1e-3)
    for muon in muons_of(optimizer):  # Megatron has dealt out the matrices
        assert all(muon.state_format.sharding.replicas_of(p) == 1 for g in muon.param_groups for p in g["params"])
