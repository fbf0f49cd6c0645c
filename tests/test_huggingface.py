# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer with optimizer_cls_and_kwargs of the integration: tiny models from a config, on the CPU."""

import pytest
import torch
from torch import nn


pytest.importorskip("accelerate", reason="needs pip install '.[huggingface]'")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.integrations.huggingface import TrainerAdaptiveMuon, optimizer_cls_and_kwargs
from emerging_optimizers.adaptive_muon.moment2 import METHODS


ROWS = [
    {"input_ids": row, "labels": row} for row in torch.randint(40, (24, 8), generator=torch.Generator().manual_seed(1))
]


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def arguments(folder, **changes):
    options = {"max_steps": 4, "learning_rate": 2e-2, "weight_decay": 0.1, "warmup_steps": 1, "save_strategy": "no"}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(folder, per_device_train_batch_size=4, **{**options, **quiet, **changes})


def trained(model, args, *, resume=None, **options):
    """The Trainer of a model, after training with the integration."""
    made = optimizer_cls_and_kwargs(model, args, **options)
    trainer = Trainer(model, args, train_dataset=ROWS, optimizer_cls_and_kwargs=made)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def optimizer_of(trainer):
    """What accelerate has wrapped."""
    return trainer.optimizer.optimizer


def assert_same(trainer, other):
    """Same weights and same state, bit for bit, in the same groups."""
    weights, expected = trainer.model.state_dict(), other.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    state, expected = trainer.optimizer.state_dict(), other.optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for index, buffers in state["state"].items():
        assert buffers.keys() == expected["state"][index].keys()
        assert all(
            torch.equal(torch.as_tensor(buffers[k]), torch.as_tensor(expected["state"][index][k])) for k in buffers
        )


@pytest.mark.parametrize("make", [gpt2, llama])
def test_it_equals_an_optimizer_made_by_hand(tmp_path, make):
    """Made before training, of the model, with Trainer's two groups: norms and biases have no weight decay."""
    options = {"scalar_lr": 2e-3, "moment2_method": "namo_d", "nesterov": True}
    trainer = trained(make(), arguments(tmp_path, adam_beta2=0.98, adam_epsilon=1e-7), **options)
    model = make()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    by_hand = HybridAdaptiveMuon.from_model(model, 2e-2, params=groups, betas=(0.9, 0.98), scalar_eps=1e-7, **options)
    other = Trainer(model, arguments(tmp_path), train_dataset=ROWS, optimizers=(by_hand, None))
    other.train()
    assert type(optimizer_of(trainer)) is HybridAdaptiveMuon
    assert_same(trainer, other)
    assert optimizer_of(trainer).describe() == by_hand.describe()
    before = make().state_dict()
    assert not any(torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(tmp_path, method):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    options = {"scalar_lr": 2e-3, "moment2_method": method}
    whole = trained(gpt2(), args, **options)
    model = gpt2()
    with torch.no_grad():
        for p in model.parameters():  # which the checkpoint replaces
            p.zero_()
    assert_same(trained(model, args, resume=f"{tmp_path}/checkpoint-2", **options), whole)


def test_another_methods_checkpoint_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trained(gpt2(), args, moment2_method="namo")
    with pytest.raises(ValueError, match="namo"):
        trained(gpt2(), args, resume=f"{tmp_path}/checkpoint-2", moment2_method="normuon")


def test_groups_have_the_options_of_trainer_and_of_ours(tmp_path):
    args = arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.97, adam_epsilon=1e-6)
    trainer = trained(gpt2(), args, scalar_lr=3e-3, scalar_weight_decay=0.05)
    groups = optimizer_of(trainer).param_groups
    # all of GPT-2's hidden matrices decay, so three groups are left of twice two
    assert [group["use_muon"] for group in groups] == [True, False, False]
    assert [group["initial_lr"] for group in groups] == [2e-2, 3e-3, 3e-3]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.05, 0.0]
    assert [group["param_names"] for group in groups[1:2]] == [["transformer.wte.weight", "transformer.wpe.weight"]]
    assert all(group["betas"] == (0.8, 0.97) and group["eps"] == 1e-6 for group in groups[1:])
    # what Trainer logs is the rate of the matrices
    assert max(entry.get("learning_rate", 0) for entry in trainer.state.log_history) == 2e-2


def test_options_come_before_arguments(tmp_path):
    _, kwargs = optimizer_cls_and_kwargs(gpt2(), arguments(tmp_path), lr=0.5, betas=(0.7, 0.8), scalar_eps=1e-5)
    assert (kwargs["lr"], kwargs["betas"], kwargs["scalar_eps"]) == (0.5, (0.7, 0.8), 1e-5)


def test_routes_are_those_of_the_model(tmp_path):
    routes = {"*.mlp.*": "adamw"}
    trainer = trained(llama(), arguments(tmp_path, max_steps=1), routes=routes)
    to_muon = {name for name, _, route in optimizer_of(trainer).routes if route.algorithm == "adaptive_muon"}
    assert to_muon == {
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in ("q", "k", "v", "o")
    }


def test_frozen_parameters_are_left_out(tmp_path):
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trained(model, arguments(tmp_path))
    held = {name for name, *_ in optimizer_of(trainer).routes}
    frozen = {name for name in before if "embed" in name or "layers.0." in name}
    assert frozen and held == before.keys() - frozen
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == held


class Lora(nn.Module):
    """A linear layer and its low-rank adapter, with the names of PEFT."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_go_where_what_they_adapt_goes(tmp_path):
    def adapted():
        model = llama().requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
        model.lm_head = Lora(model.lm_head)
        return model

    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer = trained(adapted(), args, moment2_method="namo_d")
    to = {name: route.algorithm for name, _, route in optimizer_of(trainer).routes}
    factors = [f"lora_{factor}.default.weight" for factor in "AB"]
    hidden = [f"model.layers.{layer}.self_attn.q_proj.{factor}" for layer in (0, 1) for factor in factors]
    expected = dict.fromkeys(hidden, "adaptive_muon") | {f"lm_head.{factor}": "adamw" for factor in factors}
    assert to == expected
    assert_same(trained(adapted(), args, resume=f"{tmp_path}/checkpoint-2", moment2_method="namo_d"), trainer)


@pytest.mark.parametrize("name", ["params", "weight_decay"])
def test_what_trainer_decides_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        optimizer_cls_and_kwargs(gpt2(), arguments(tmp_path), **{name: 0.1})


def test_another_model_is_refused(tmp_path):
    """As with model_init, of which Trainer makes its own."""
    args = arguments(tmp_path)
    made = optimizer_cls_and_kwargs(gpt2(), args)
    with pytest.raises(ValueError, match="params must be parameters of the model"):
        Trainer(model_init=gpt2, args=args, train_dataset=ROWS, optimizer_cls_and_kwargs=made).train()


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match="nesterow"):
        trained(gpt2(), arguments(tmp_path), nesterow=True)


def test_trainer_calls_a_class():
    """It takes anything else for a factory, to which it gives no groups."""
    assert issubclass(TrainerAdaptiveMuon, torch.optim.Optimizer)
