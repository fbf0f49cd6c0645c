# SPDX-License-Identifier: Apache-2.0
"""NeMo Automodel: its YAML, its configs and its scheduler, with a Hugging Face model under FSDP2."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_automodel
import pytest
import torch
from nemo_automodel.components.config.loader import ConfigNode, translate_value
from nemo_automodel.components.optim.optimizer import LRSchedulerConfig, build_optimizer
from nemo_automodel.recipes._typed_config import RecipeConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.integrations.automodel import AdaptiveMuonConfig
from emerging_optimizers.adaptive_muon.moment2 import METHODS


TARGET = "emerging_optimizers.adaptive_muon.integrations.automodel.AdaptiveMuonConfig"
RATES = {"adamuon": 1e-3, "normuon": 2e-2, "namo": 2e-2, "namo_d": 2e-2}


def llama() -> LlamaForCausalLM:
    """A small Llama; the rows of its vocabulary and of its feed-forward layers are odd, uneven over two ranks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 40, "intermediate_size": 51, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="eager"))


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def yaml(**options: Any) -> AdaptiveMuonConfig:
    """What a recipe makes of the ``optimizer`` block of its YAML."""
    block = {"_target_": TARGET, "lr": 2e-2, "fp32_matmul_prec": "highest", **options}
    config = RecipeConfig(ConfigNode({"optimizer": block})).optimizer
    assert isinstance(config, AdaptiveMuonConfig)
    return config


def train(model: nn.Module, config: AdaptiveMuonConfig, steps: int = 3) -> list[float]:
    """Trains as a recipe does: build(), backward, step(); every rank has its own half of each batch."""
    (optimizer,) = config.build(model)
    assert isinstance(optimizer, HybridAdaptiveMuon)
    losses = []
    for step in range(steps):
        tokens = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(step))
        if isinstance(next(model.parameters()), DTensor):
            tokens = tokens.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def full(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_equals_the_whole_model(method):
    config = yaml(moment2_method=method, lr=RATES.get(method, 4e-3), nesterov=True, betas=[0.9, 0.95], scalar_lr=1e-3)
    start, whole, cut = llama(), llama(), sharded(llama())
    train(whole, config)
    train(cut, config)
    for (name, p), q, r in zip(whole.named_parameters(), cut.parameters(), start.parameters(), strict=True):
        moved, off = (p - r).norm(), (full(q) - p).norm()
        assert moved > 0 and off <= (2e-3 if method == "adamuon" else 1e-4) * moved, name


@pytest.mark.parametrize("method", METHODS)
def test_hsdps_replicas_share_the_work(method, caplog):
    """Two replicas of one shard: on by itself, as the log says, and off by a key."""
    caplog.set_level("INFO")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
    made = []
    for options in ({}, {"share_replicas": False}):
        caplog.clear()
        model = fully_shard(llama(), mesh=mesh)
        train(model, yaml(moment2_method=method, lr=RATES.get(method, 4e-3), scalar_lr=1e-3, **options))
        lines = [record.getMessage() for record in caplog.records if "adaptive_muon" in record.name]
        assert len(lines) == 1 and ("; 14 shared by 2 replicas" in lines[0]) is not bool(options)
        made.append(model)
    for (name, p), q in zip(made[0].named_parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(full(p), full(q), atol=1e-4 if method == "adamuon" else 1e-6, rtol=1e-4, msg=name)


def test_yaml_names_it_and_routes_it():
    config = yaml(moment2_method="namo_d", betas=[0.8, 0.9], eps=1e-6, weight_decay=0.1, scalar_lr=1e-3)
    (optimizer,) = config.build(sharded(llama()))
    matrices, rest = optimizer.param_groups
    assert len(matrices["params"]) == 2 * 7 and all(".layers." in name for name in matrices["param_names"])
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(rest["param_names"])
    assert (matrices["lr"], matrices["weight_decay"], matrices["moment2_method"]) == (2e-2, 0.1, "namo_d")
    assert (rest["lr"], rest["weight_decay"], rest["eps"], list(rest["betas"])) == (1e-3, 0.1, 1e-6, [0.8, 0.9])


def test_build_optimizer_takes_its_path_and_a_mesh():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    (optimizer,) = build_optimizer(llama(), (TARGET, {"lr": 1e-3}), device_mesh=mesh)
    assert isinstance(optimizer, HybridAdaptiveMuon)
    assert not AdaptiveMuonConfig.supports_megatron_fsdp_sharding


def test_wrong_options_are_refused():
    with pytest.raises(TypeError, match="beta_2"):
        yaml(beta_2=0.9)
    with pytest.raises(ValueError, match="moment2_method"):
        yaml(moment2_method="muon").build(llama())
    with pytest.raises(ValueError, match="no trainable parameters"):
        yaml().build(llama().requires_grad_(False))


@pytest.mark.parametrize("version", ["0.6.1", "0.8.0+4d21246", "1.0"])
def test_an_unsupported_automodel_is_refused_by_its_number(version, monkeypatch):
    monkeypatch.setattr(nemo_automodel, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"must be >= 0.7 and < 0.8, got {re.escape(version)}. Install"):
        yaml().build(llama())


def test_frozen_parameters_are_left_out_and_routes_come_first():
    model = llama()
    model.model.layers[0].requires_grad_(False)
    (optimizer,) = yaml(routes={"*.q_proj.weight": "adamw"}).build(model)
    matrices, rest = ([*group["param_names"]] for group in optimizer.param_groups)
    assert len(matrices) == 6 and not any("layers.0." in name for name in matrices + rest)
    assert "model.layers.1.self_attn.q_proj.weight" in rest


def test_one_optimizer_a_part():
    parts = [llama(), llama()]
    optimizers = yaml().build(SimpleNamespace(parts=parts))
    for optimizer, part in zip(optimizers, parts, strict=True):
        held = {p for group in optimizer.param_groups for p in group["params"]}
        assert held == set(part.parameters())


def test_scheduler_keeps_the_ratios():
    """Automodel's scheduler knows one base rate, the first group's, and a multiplier of it for each group."""
    overrides = [{"pattern": r"layers\.1\.", "lr_mult": 0.5, "wd_mult": 0.25}]
    config = yaml(weight_decay=0.1, scalar_lr=1e-3, scalar_weight_decay=0.2, param_group_overrides=overrides)
    (optimizer,) = config.build(llama())
    schedule = SimpleNamespace(epoch_len=10, num_epochs=1, max_steps=None)
    (scheduler,) = LRSchedulerConfig(lr_warmup_steps=2, min_lr=0.0).build(optimizer, schedule)
    seen = []
    for _ in range(6):
        scheduler.step(1)
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
    of = {name: index for index, group in enumerate(optimizer.param_groups) for name in group["param_names"]}
    names = [f"model.layers.{i}.{leaf}.weight" for i in (0, 1) for leaf in ("self_attn.q_proj", "input_layernorm")]
    assert of[names[0]] == 0 and len({of[name] for name in names}) == 4
    for step in seen:
        rates, decays = zip(*(step[of[name]] for name in names), strict=True)
        assert rates == pytest.approx([rates[0] * factor for factor in (1, 1e-3 / 2e-2, 0.5, 0.5 * 1e-3 / 2e-2)])
        assert decays == pytest.approx([0.1, 0.2, 0.025, 0.05])
    assert len({step[0][0] for step in seen}) == 6


def test_multipliers_where_no_matrix_is_trained():
    """The first group is then of the AdamW part, whose own rate and decay the multipliers are beside."""
    model = llama()
    model.model.layers.requires_grad_(False)
    options = {"weight_decay": 0.1, "scalar_lr": 1e-3, "scalar_weight_decay": 0.2}
    (optimizer,) = yaml(**options, param_group_overrides=[{"pattern": "norm", "lr_mult": 0.5}]).build(model)
    rest, norm = optimizer.param_groups
    assert not rest["use_muon"] and norm["param_names"] == ["model.norm.weight"]
    schedule = SimpleNamespace(epoch_len=10, num_epochs=1, max_steps=None)
    (scheduler,) = LRSchedulerConfig(lr_warmup_steps=2, min_lr=0.0).build(optimizer, schedule)
    scheduler.step(1)
    assert rest["lr"] > 0 and norm["lr"] == pytest.approx(0.5 * rest["lr"])
    assert (rest["weight_decay"], norm["weight_decay"]) == pytest.approx((0.2, 0.2))


def test_multipliers_without_weight_decay():
    config = yaml(weight_decay=0.0, param_group_overrides=[{"pattern": "norm", "wd_mult": 2.0}])
    (optimizer,) = config.build(llama())
    assert [group.get("wd_mult") for group in optimizer.param_groups] == [None, None, 2.0]


def test_documented_block_works():
    page = (Path(__file__).parents[2] / "docs" / "apidocs" / "nemo.md").read_text()
    (block,) = re.findall(r"```yaml\noptimizer:\n(.*?)```", page, re.DOTALL)
    assert TARGET in block
    options = dict(re.findall(r"^  (\w+): (.*)$", block, re.MULTILINE))
    options = {key: translate_value(value) for key, value in options.items()}
    config = RecipeConfig(ConfigNode({"optimizer": options})).optimizer
    (optimizer,) = config.build(llama())
    assert [group["lr"] for group in optimizer.param_groups] == [9e-3, 1e-3]
