# SPDX-License-Identifier: Apache-2.0
"""Experts of real GPTModels under expert parallelism, grouped linear layers, and routers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import emerging_optimizers
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import global_vars
from models import EXPERTS, MOE, cut, gpt, optimizer_of, parallel, seeded, train, whole_name
from side_by_side import normal
from torch import distributed as dist
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.integrations.megatron import TensorParallelAdaptiveMuon, register
from emerging_optimizers.adaptive_muon.integrations.megatron.layouts import replica_group_of
from emerging_optimizers.adaptive_muon.integrations.megatron.patterns import tag_patterns


TABLE = emerging_optimizers._EMERGING_OPTIMIZERS
STOCK = TABLE["adaptive_muon"]
OPTIONS: dict[str, Any] = dict(lr=1e-2, moment2_method="namo_d", weight_decay=0.0, fp32_matmul_prec="highest")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    yield
    TABLE["adaptive_muon"] = STOCK


def muons_of(optimizer: Any) -> list[TensorParallelAdaptiveMuon]:
    """Our optimizers within Megatron's."""
    if hasattr(optimizer, "chained_optimizers"):
        return [muon for each in optimizer.chained_optimizers for muon in muons_of(each)]
    return [optimizer.optimizer] if isinstance(optimizer.optimizer, TensorParallelAdaptiveMuon) else []


def matrices_of(optimizer: Any) -> set[int]:
    """The identities of the parameters that AdaptiveMuon updates, or of their main parameters."""
    return {id(p) for muon in muons_of(optimizer) for group in muon.param_groups for p in group["params"]}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("sizes", [(2, 1), (4, 1), (2, 2)], ids=["EP 2 x EDP 2", "EP 4", "EP 2 x ETP 2"])
def test_experts_are_the_same_as_separate_weights(sizes: tuple[int, int], gate_up: bool, share: bool) -> None:
    """Three steps on gradients that are the same on an expert's replicas only."""
    register(split_gate_up=gate_up, share_replicas=share)
    with parallel(1):
        start = {name: p.detach().clone() for name, p in gpt(**MOE).module.named_parameters() if "experts" in name}
        parts = {
            name: [nn.Parameter(part.clone()) for part in (w.chunk(2) if gate_up and "fc1" in name else [w])]
            for name, w in start.items()
        }
        separate = AdaptiveMuon([part for each in parts.values() for part in each], **OPTIONS)
        for step in range(3):
            for name, p in gpt(**MOE).module.named_parameters():
                if name in parts:
                    grad = seeded(name, p, 0.1, step)
                    for part, of_part in zip(parts[name], grad.chunk(len(parts[name])), strict=True):
                        part.grad = of_part.clone()
            separate.step()
        expected = {name: torch.cat([part.detach() for part in each]) for name, each in parts.items()}
    ep, expert_tp = sizes
    with parallel(expert_model_parallel_size=ep, expert_tensor_parallel_size=expert_tp):
        model = gpt(**MOE)
        optimizer = optimizer_of(model, weight_decay=0.0, clip_grad=0.0, muon_nesterov=False)
        for step in range(3):
            for name, p in model.module.named_parameters():
                p.main_grad.copy_(seeded(name, p, 0.1, step))
            optimizer.step()
        seen = 0
        for name, p in model.module.named_parameters():
            if "experts" not in name:
                continue
            whole, before = (cut(of[whole_name(name)], name, p) for of in (expected, start))
            within = 1e-6 if expert_tp == 1 else 2e-6  # products of shards are rounded in another order
            assert (p.detach() - whole).norm() <= within * whole.norm() and not torch.equal(p, before), name
            seen += 1
        assert seen == 2 * 2 * EXPERTS // ep


def test_messages_of_experts_stay_among_their_replicas() -> None:
    """A replica of an expert that differs is found by the ranks that hold this expert, and by no others."""
    with parallel(expert_model_parallel_size=2):
        model = gpt(**MOE)
        optimizer = optimizer_of(model)
        replicas = dist.get_process_group_ranks(parallel_state.get_expert_data_parallel_group())
        if dist.get_rank() == 3:
            next(p for name, p in model.module.named_parameters() if "local_experts.0.linear_fc1" in name).data += 1
        [of_experts] = [
            muon
            for muon in muons_of(optimizer)
            if any(not getattr(p, "allreduce", True) for group in muon.param_groups for p in group["params"])
        ]
        for group in of_experts.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        assert len(replicas) == 2
        if 3 in replicas:
            with pytest.raises(ValueError, match="the same bits|replicas"):
                of_experts.step()
        else:
            of_experts.step()
        dist.barrier()


@pytest.mark.parametrize("use_muon", [None, True, False])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_routers_go_to_the_scalar_optimizer_unless_they_are_tagged(bf16: bool, use_muon: bool | None) -> None:
    with parallel(expert_model_parallel_size=2):
        model = gpt(bf16=bf16, **MOE)
        routers = {name: p for name, p in model.module.named_parameters() if name.endswith("router.weight")}
        assert len(routers) == 2
        for router in routers.values():
            if use_muon is not None:
                router.use_muon = use_muon
        optimizer = optimizer_of(model)
        matrices, before = matrices_of(optimizer), {name: p.detach().clone() for name, p in routers.items()}
        train(model, optimizer, range(2))
        for name, p in routers.items():
            assert (id(getattr(p, "main_param", p)) in matrices) is bool(use_muon), name
            assert not torch.equal(p, before[name])


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_diagnostics_of_experts_have_a_prefix_of_their_own(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """Also where 0.18.2 does not tag the main parameters of experts."""
    rows: list[dict[str, float]] = []
    for name, value in {
        "_GLOBAL_ARGS": SimpleNamespace(curr_iteration=0, tensorboard_log_interval=1),
        "_GLOBAL_WANDB_WRITER": SimpleNamespace(log=lambda row, step: rows.append(row)),
        "_GLOBAL_TENSORBOARD_WRITER": None,
    }.items():
        monkeypatch.setattr(global_vars, name, value)
    register(diagnostics_every=1)
    with parallel(expert_model_parallel_size=2):
        model = gpt(bf16=bf16, **MOE)
        train(model, optimizer_of(model), range(1))
    assert sorted({name.split("/")[0] for name in row}.pop() for row in rows) == [
        "adaptive_muon",
        "adaptive_muon_experts",
    ]


@pytest.mark.parametrize("kind", ["legacy", "layout"])
def test_experts_with_the_layer_wise_optimizer(kind: str) -> None:
    """Whose parameter layout, where there is one, keeps routers with the matrices."""
    losses = {}
    for layer_wise in "", kind:
        with parallel(1):
            model = gpt(bf16=True, layer_wise=layer_wise, **MOE)
            name = "dist_adaptive_muon" if layer_wise else "adaptive_muon"
            routers = [p for name, p in model.module.named_parameters() if name.endswith("router.weight")]
            if kind == "layout":
                for router in routers:
                    router.use_muon = True
            losses[layer_wise] = train(model, optimizer_of(model, optimizer=name, clip_grad=0.0), range(5))
    assert losses[kind] == pytest.approx(losses[""], rel=1e-3)


class GroupedLinear(nn.Module):
    """What Transformer Engine's layer shows: a weight for each of the experts here, and its numbers."""

    def __init__(self, number: int, inputs: int, outputs: int, dim: int) -> None:
        super().__init__()
        self.num_gemms, self.in_features, self.out_features = number, inputs, outputs
        for index in range(number):
            weight = nn.Parameter(normal((outputs, inputs), 10 * outputs + index))
            weight.partition_dim, weight.expert_tp, weight.allreduce = dim, True, False
            self.register_parameter(f"weight{index}", weight)


class TEGroupedMLP(nn.Module):
    """By its name and attributes, Megatron's."""

    def __init__(self, interleaved: int | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(gated_linear_unit=True, moe_mlp_glu_interleave_size=interleaved)
        self.linear_fc1, self.linear_fc2 = GroupedLinear(2, 12, 32, 0), GroupedLinear(2, 16, 12, 1)


@pytest.mark.parametrize("interleaved", [None, 4])
@pytest.mark.parametrize("gate_up", [False, True])
def test_grouped_linear_layers(gate_up: bool, interleaved: int | None) -> None:
    """Each weight is a matrix, or two; replicas are those of experts."""
    with parallel(expert_model_parallel_size=2):
        groups = ProcessGroupCollection.use_mpu_process_groups()
    model = TEGroupedMLP(interleaved)
    tag_patterns([model])
    params = [*model.parameters()]

    def parts_of(w: torch.Tensor) -> list[torch.Tensor]:
        if not gate_up or w.size(0) != 32:
            return [w]
        return (
            [*w.chunk(2)] if interleaved is None else [half.flatten(0, 1) for half in w.view(-1, 2, 4, 12).unbind(1)]
        )

    parts = [[nn.Parameter(part.clone()) for part in parts_of(p.detach())] for p in params]
    assert [len(each) for each in parts] == [2, 2, 1, 1] if gate_up else [1] * 4
    config = SimpleNamespace(optimizer="adaptive_muon")
    chunk = SimpleNamespace(ddp_config=SimpleNamespace(), parameters=model.parameters)
    optimizer = TensorParallelAdaptiveMuon(
        params,
        pg_collection=groups,
        split_gate_up=gate_up,
        nesterov=False,
        replica_group=replica_group_of(config, [chunk], groups),
        **OPTIONS,
    )
    separate = AdaptiveMuon([part for each in parts for part in each], **OPTIONS)
    for step in range(2):
        for index, (p, each) in enumerate(zip(params, parts, strict=True)):
            p.grad = normal(tuple(p.shape), 7 * step + index)
            for part, of_part in zip(each, parts_of(p.grad), strict=True):
                part.grad = of_part.clone()
        optimizer.step()
        separate.step()
    sharding = optimizer.state_format.sharding
    assert all(sharding.replicas_of(p) == 2 for p in params)
    for p, each in zip(params, parts, strict=True):
        for part, of_part in zip(each, parts_of(p.detach()), strict=True):
            assert (of_part - part).norm() <= 1e-6 * part.norm()
