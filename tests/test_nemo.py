# SPDX-License-Identifier: Apache-2.0
"""NeMo's own flow, from the YAML to a trained model: a small Conformer-CTC on generated wavs, on the CPU."""

import copy
import csv
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from torch.utils.data import DistributedSampler


pytest.importorskip("nemo.collections.asr", reason="needs pip install '.[nemo]'")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from nemo.collections.asr.models import EncDecCTCModel
from nemo.collections.asr.modules import (
    ConvASRDecoder,
    ConvASRDecoderClassification,
    HATJoint,
    LSTMDecoder,
    RNNTDecoder,
    RNNTJoint,
    SampledRNNTJoint,
    SpeakerDecoder,
)
from nemo.collections.asr.modules.sortformer_modules import SortformerModules
from nemo.collections.asr.modules.transformer import transformer_modules
from nemo.collections.asr.parts.submodules.multi_head_attention import RelPositionMultiHeadAttention
from nemo.collections.asr.parts.submodules.token_classifier import TokenClassifier
from nemo.collections.common.parts import MultiLayerPerceptron
from nemo.collections.common.parts.adapter_modules import LinearAdapterConfig
from nemo.collections.tts.modules import transformer as fastpitch
from nemo.collections.tts.modules import transformer_2501
from nemo.core.classes import ModelPT, NeuralModule, common
from nemo.core.config.optimizers import AVAILABLE_OPTIMIZER_PARAMS
from nemo.core.neural_types import LogitsType, NeuralType
from nemo.core.optim import lr_scheduler, optimizers
from nemo.utils import logging as nemo_logging
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import DictConfig, OmegaConf

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.integrations import nemo
from emerging_optimizers.adaptive_muon.integrations.nemo import AdaptiveMuonParams, register
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.options import SplitOptions


EXAMPLE = Path(__file__).parent.parent / "examples" / "nemo"
PAGE = (Path(__file__).parent.parent / "docs" / "apidocs" / "nemo.md").read_text()
STOCK = {"name": "adamw", "lr": 2e-3, "betas": [0.9, 0.98], "weight_decay": 1e-3}
# Rates at which 24 steps take the loss well down.
RATES = {"adamuon": 4e-3, "normuon": 2e-2, "namo": 2e-2, "namo_d": 2e-2}


def optim(method: str = "namo_d", **options: Any) -> dict[str, Any]:
    """A YAML's ``optim`` block: a stock one, with the name changed and what adaptive_muon adds."""
    ours = {"name": "adaptive_muon", "lr": RATES.get(method, 4e-3), "moment2_method": method, "scalar_lr": 2e-3}
    return {**STOCK, **ours, "nesterov": True, "extra_scale_factor": 0.2, "fp32_matmul_prec": "highest", **options}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of utterances of equal length, of which a batch's mean does not depend on how it is put together."""
    folder = tmp_path_factory.mktemp("wavs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        from wavs import write_manifests
    write_manifests(folder, train=32, validation=4, letters=(3, 3))
    return folder


@pytest.fixture
def config(data: Path) -> DictConfig:
    """The example's configuration, with these manifests."""
    config = OmegaConf.load(EXAMPLE / "conformer_ctc.yaml")
    assert isinstance(config, DictConfig)
    config.model.train_ds.update({"manifest_filepath": str(data / "train.json"), "batch_size": 8, "shuffle": False})
    config.model.validation_ds.manifest_filepath = str(data / "validation.json")
    config.model.optim = optim()
    config.trainer.update({"enable_progress_bar": False, "limit_val_batches": 0, "enable_model_summary": False})
    return config


class LossInFloat32(pl.Callback):
    """Torch's CTC loss knows no bfloat16 on the CPU."""

    def on_fit_start(self, trainer, model):
        model.loss.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "log_probs": kwargs["log_probs"].float()}), with_kwargs=True
        )


class Watch(pl.Callback):
    """Losses, learning rates and gradient norms of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[list[float]] = []
        self.norms: list[float] = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_before_zero_grad(self, trainer, model, optimizer):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if grads:
            self.norms.append(float(nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, trainer, model, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def trainer_of(config: DictConfig, **options: Any) -> pl.Trainer:
    return pl.Trainer(**{**resolve_trainer_cfg(config.trainer), **options})


def model_of(config: DictConfig, trainer: pl.Trainer | None) -> EncDecCTCModel:
    torch.manual_seed(0)
    return EncDecCTCModel(cfg=config.model, trainer=trainer)


def fit(
    config: DictConfig, steps: int, *callbacks: pl.Callback, resume: Path | None = None, **options: Any
) -> tuple[EncDecCTCModel, Watch]:
    """Trains as NeMo's scripts do."""
    watch = Watch()
    trainer = trainer_of(config, max_steps=steps, callbacks=[watch, *callbacks], **options)
    model = model_of(config, trainer)
    trainer.fit(model, ckpt_path=resume)
    return model, watch


def optimizer_of(config: DictConfig, prepare: Any = None) -> HybridAdaptiveMuon:
    """The optimizer NeMo makes of a configuration, of a model of which ``prepare`` may freeze something."""
    model = model_of(config, None)
    if prepare is not None:
        prepare(model)
    register()
    optimizer, _ = model.setup_optimization(config.model.optim)
    optimizer.model = model  # the caller keeps both
    return optimizer


# ---- discovery ----


def test_discovery_registers_once_however_many_trainers(config):
    trainer_of(config)
    wrapped = ModelPT.setup_optimization
    trainer_of(config)
    register()
    assert ModelPT.setup_optimization is wrapped
    assert optimizers.AVAILABLE_OPTIMIZERS["adaptive_muon"] is nemo.adaptive_muon
    assert AVAILABLE_OPTIMIZER_PARAMS["adaptive_muon_params"] is AdaptiveMuonParams


def unregister(patch: pytest.MonkeyPatch) -> None:
    """As where no Trainer was made yet."""
    patch.delitem(optimizers.AVAILABLE_OPTIMIZERS, "adaptive_muon", raising=False)
    patch.delitem(AVAILABLE_OPTIMIZER_PARAMS, "adaptive_muon_params", raising=False)


def test_a_trainer_registers_what_was_not(config, monkeypatch):
    unregister(monkeypatch)
    trainer_of(config)
    assert optimizers.AVAILABLE_OPTIMIZERS["adaptive_muon"] is nemo.adaptive_muon
    assert AVAILABLE_OPTIMIZER_PARAMS["adaptive_muon_params"] is AdaptiveMuonParams


def test_another_optimizer_of_that_name_stays_and_trainers_go_on(config, monkeypatch, caplog):
    monkeypatch.setitem(optimizers.AVAILABLE_OPTIMIZERS, "adaptive_muon", torch.optim.SGD)
    with pytest.raises(ValueError, match="adaptive_muon"):
        register()
    with caplog.at_level(logging.WARNING):
        trainer_of(config)
    assert "adaptive_muon is not available" in caplog.text
    assert optimizers.AVAILABLE_OPTIMIZERS["adaptive_muon"] is torch.optim.SGD


# ---- where an optimizer is made ----


def test_set_up_before_fit_as_nemos_scripts_for_fine_tuning_do(config, tmp_path, monkeypatch):
    """speech_to_text_finetune.py: Trainer, restored model, set_trainer, its data, its optimizer, fit."""
    OmegaConf.resolve(config)
    model_of(config, None).save_to(str(tmp_path / "pretrained.nemo"))
    unregister(monkeypatch)
    watch = Watch()
    trainer = trainer_of(config, max_steps=4, callbacks=[watch])
    model = EncDecCTCModel.restore_from(str(tmp_path / "pretrained.nemo"))
    model.set_trainer(trainer)
    model.setup_training_data(config.model.train_ds)
    before = weights(model)
    config.model.optim.lr = 1e-2
    optimizer, _ = model.setup_optimization(config.model.optim)
    assert isinstance(optimizer, HybridAdaptiveMuon)
    trainer.fit(model)
    assert isinstance(trainer.optimizers[0], HybridAdaptiveMuon) and watch.rates[0] == [1e-2, 2e-3]
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_model_set_up_before_the_first_trainer_needs_register(config, monkeypatch):
    unregister(monkeypatch)
    model = model_of(config, None)
    with pytest.raises(ValueError, match="Cannot resolve optimizer 'adaptive_muon'"):
        model.setup_optimization(config.model.optim)
    register()
    assert isinstance(model.setup_optimization(config.model.optim)[0], HybridAdaptiveMuon)


def test_the_model_being_set_up_is_the_one_that_counts(config):
    """A part of a model, trained by itself: patterns are matched against its own names, not the larger model's."""
    register()
    part = model_of(config, None)
    whole = WithHead(part=part)
    for model, prefix in ((part, ""), (whole, "part."), (part, "")):
        optim_config = {**config.model.optim, "routes": {f"{prefix}encoder.layers.0.*": "adamw"}}
        optimizer, _ = model.setup_optimization(optim_config)
        assert f"{prefix}encoder.layers.1.self_attn.linear_q.weight" in routes_of(optimizer)


def test_a_call_without_a_model_is_refused_with_the_remedy(config):
    model = model_of(config, None)
    with pytest.raises(ValueError, match=r"must get the model.*from_model\(model\)"):
        nemo.adaptive_muon([{"params": list(model.parameters())}], lr=1e-3)
    with pytest.raises(ValueError, match="known keys"):  # which leaves no model behind
        optimizer_of(OmegaConf.merge(config, {"model": {"optim": {"wrong": 1}}}))
    with pytest.raises(ValueError, match="must get the model"):
        nemo.adaptive_muon([{"params": list(model.parameters())}], lr=1e-3)


@pytest.mark.parametrize("version", ["2.6.2", "4.0.0rc1"])
def test_an_unsupported_nemo_is_refused_by_its_number(config, monkeypatch, version):
    """When it makes the optimizer; other users of NeMo are left alone."""
    monkeypatch.setattr(sys.modules["nemo"], "__version__", version)
    should = f'nemo-toolkit must be >= 2.7 and < 4.0, got {version}. Install "nemo-toolkit>=2.7,<4.0".'
    nemo.register()
    with pytest.raises(RuntimeError, match=re.escape(should)):
        optimizer_of(config)


# ---- what the YAML says ----


def test_stock_keys_keep_their_meaning(config):
    config.model.optim.update({"eps": 1e-6, "moment2_eps": 1e-7, "beta2": 0.97, "momentum": 0.9})
    matrices, rest = optimizer_of(config).param_groups
    wanted = {"lr": 2e-2, "weight_decay": 1e-3, "eps": 1e-7, "beta2": 0.97, "momentum": 0.9, "use_muon": True}
    assert {key: matrices[key] for key in wanted} == wanted
    wanted = {"lr": 2e-3, "weight_decay": 1e-3, "eps": 1e-6, "betas": (0.9, 0.98), "use_muon": False}
    assert {key: tuple(rest[key]) if key == "betas" else rest[key] for key in wanted} == wanted


def test_only_the_name_changed(config):
    config.model.optim = {**STOCK, "name": "adaptive_muon"}
    optimizer = optimizer_of(config)
    assert isinstance(optimizer, HybridAdaptiveMuon)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 2e-3]
    assert optimizer.param_groups[0]["moment2_method"] == "adamuon"


def test_args_auto_is_the_same_as_keys(config):
    flat = {key: value for key, value in optim("namo", bias_correction=True).items() if key not in ("name", "lr")}
    by_keys = optimizer_of(OmegaConf.merge(config, {"model": {"optim": {**flat, "lr": 1e-2}}}))
    config.model.optim = {"name": "adaptive_muon", "lr": 1e-2, "args": {"name": "auto", "params": flat}}
    by_args = optimizer_of(config)
    strip = ("params",)
    of = [[{k: v for k, v in g.items() if k not in strip} for g in o.param_groups] for o in (by_keys, by_args)]
    assert of[0] == of[1]
    assert by_args._muon.bias_correction and by_args._muon.nesterov


def test_params_have_the_constructors_options_and_defaults():
    hybrid, muon = (signature(cls).parameters for cls in (HybridAdaptiveMuon, AdaptiveMuon))
    arguments = {**muon, **hybrid}
    for not_for_yaml in (
        "self",
        "params",
        "options",
        "lr",
        "tp_group",
        "replica_group",
        "layout_fn",
        "blocks_fn",
        "weight_update_hook",
        "capturable",
    ):
        arguments.pop(not_for_yaml, None)
    names = {"eps": "moment2_eps", "scalar_eps": "eps"}
    wanted = {names.get(name, name): argument.default for name, argument in arguments.items()} | {"routes": None}
    of_model = signature(HybridAdaptiveMuon.from_model).parameters
    wanted |= {field.name: of_model[field.name].default for field in fields(SplitOptions)}
    ours = {field.name: field.default for field in fields(AdaptiveMuonParams) if field.name != "lr"}
    assert ours == wanted and MISSING not in ours.values()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"beta_2": 0.9}, r"known keys, got 'beta_2'. Choose from lr, .*moment2_method.*, routes"),
        ({"lr": None}, r"lr must be >= 0, got"),
        ({"lr": "fast"}, r"lr must be >= 0, got 'fast'"),
        ({"moment2_method": "muon"}, r"moment2_method must be .*adamuon, normuon, namo, namo_d"),
        ({"betas": [0.9]}, r"betas must be two numbers"),
        ({"eps": -1.0}, r"^eps must be >= 0, got -1.0"),
        ({"moment2_eps": 0.0}, r"^moment2_eps must be > 0 in float32, got 0.0"),
        ({"scalar_lr": "1e-3"}, r"scalar_lr must be >= 0, got '1e-3' as text"),
        ({"routes": ["encoder.*"]}, r"routes must be a mapping of patterns .*, got \['encoder.\*'\]\. Use"),
        ({"routes": {"encoder.*": "muon"}}, r"routes\['encoder.\*'\] must be .*adaptive_muon, adamw"),
        ({"routes": {"nothing.*": "adamw"}}, r"a pattern of routes must match a parameter, got 'nothing.\*'"),
    ],
)
def test_wrong_keys_and_values_are_refused(config, wrong, text):
    config.model.optim.update(wrong)
    with pytest.raises(ValueError, match=text):
        optimizer_of(config)


# ---- what goes where ----


def routes_of(optimizer: HybridAdaptiveMuon) -> dict[str, str]:
    return {
        name: "adaptive_muon" if group["use_muon"] else "adamw"
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_conformer_is_routed_as_documented(config):
    optimizer = optimizer_of(config)
    routes = routes_of(optimizer)
    shapes = {name: p.shape for name, p in optimizer.model.named_parameters()}
    assert routes.keys() == shapes.keys()
    for name, algorithm in routes.items():
        linear = any(word in name for word in (".linear", "pre_encode.out")) and name.endswith("weight")
        assert algorithm == ("adaptive_muon" if linear else "adamw"), name
    for special in ("pos_bias_u", "decoder_layers.0.weight", "pre_encode.conv.0.weight", "norm_out.weight"):
        assert {a for name, a in routes.items() if special in name} == {"adamw"}, special
    assert len(shapes["encoder.layers.0.self_attn.pos_bias_u"]) == 2
    assert Counter(routes.values())["adaptive_muon"] == 19


def test_heads_of_the_conformer(config):
    config.model.optim.split_heads = True
    routes = [(name, route) for name, _, route in optimizer_of(config).routes if "layers.0.self_attn" in name]
    parts = {name: route.parts.text for name, route in routes if route.algorithm == "adaptive_muon"}
    heads, size = config.model.encoder.n_heads, config.model.encoder.d_model // config.model.encoder.n_heads
    prefix = "encoder.layers.0.self_attn.linear_"
    assert parts == {
        f"{prefix}q.weight": f"{heads} query heads of {size} rows",
        f"{prefix}k.weight": f"{heads} key heads of {size} rows",
        f"{prefix}v.weight": f"{heads} value heads of {size} rows",
        f"{prefix}out.weight": f"{heads} heads of {size} columns",
        f"{prefix}pos.weight": f"{heads} heads of {size} rows",
    }


def test_convolutions_of_the_conformer(config):
    """Three steps of them as of matrices; depthwise ones and the head stay with AdamW."""
    config.model.optim = optim("namo_d", flatten_conv=True, scalar_lr=0.0)
    optimizer = optimizer_of(config)
    said = {name: (route.algorithm, route.text) for name, _, route in optimizer.routes}
    layer = "encoder.layers.0.conv."
    assert said[f"{layer}pointwise_conv1.weight"] == ("adaptive_muon", "convolution, a matrix of 128 x 64")
    assert said["encoder.pre_encode.conv.2.weight"] == ("adaptive_muon", "convolution, a matrix of 16 x 144")
    assert said[f"{layer}depthwise_conv.weight"] == ("adamw", "3-D, not a matrix; depthwise convolution")
    assert said["decoder.decoder_layers.0.weight"][0] == "adamw"
    pairs = [
        (p, nn.Parameter(p.detach().flatten(1).clone()))
        for _, p, route in optimizer.routes
        if route.algorithm == "adaptive_muon"
    ]
    assert sum(p.ndim > 2 for p, _ in pairs) == 2 + 2 * 2
    group = optimizer.param_groups[0]
    separate = AdaptiveMuon(
        [twin for _, twin in pairs],
        **{name: group[name] for name in ("lr", "momentum", "weight_decay", "beta2", "eps", "moment2_method")},
        **{"nesterov": True, "extra_scale_factor": 0.2, "fp32_matmul_prec": "highest"},
    )
    for step in range(3):
        for seed, (p, twin) in enumerate(pairs):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + seed))
            twin.grad = p.grad.flatten(1).clone()
        optimizer.step()
        separate.step()
    for p, twin in pairs:
        assert (p.detach().flatten(1) - twin).norm() <= 1e-6 * twin.norm()


def test_the_conformer_learns_with_its_convolutions_flattened(config):
    config.model.optim = optim("adamuon", flatten_conv=True)
    _, watch = fit(config, 24)
    assert sum(watch.losses[-4:]) < 0.5 * sum(watch.losses[:4])


class OneAttention(nn.Module):
    """One of NeMo's attention modules, and what it is run on."""

    def __init__(self, attention: nn.Module, run: Any) -> None:
        super().__init__()
        self.layer, self.run = nn.ModuleDict({"attention": attention}), run
        torch.manual_seed(0)
        for p in self.double().eval().parameters():
            p.data = torch.randn_like(p) * 0.3

    def forward(self) -> None:
        """Run it."""
        x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.run(self.layer["attention"], x)


# NeMo's attention modules, a run of each, and the heads that each block of their weights reaches.
SEPARATE, TOGETHER = ("0 1 2 3", "0 1 2 3", "0* 1* 2* 3*"), "0 1 2 3 0 1 2 3 0* 1* 2* 3*"
MODULES: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "conformer": (
        lambda: RelPositionMultiHeadAttention(4, 32, 0.0, None, None),
        lambda attention, x: attention(x, x, x, None, torch.cat([x, x[:, :6]], 1)),
        dict(zip(("linear_q", "linear_k", "linear_v", "linear_pos"), (*SEPARATE, "0 1 2 3"), strict=True)),
    ),
    "transformer": (
        lambda: transformer_modules.MultiHeadAttention(32, 4),
        lambda attention, x: attention(x, x, x, None),
        dict(zip(("query_net", "key_net", "value_net"), SEPARATE, strict=True)),
    ),
    "speech synthesis": (
        lambda: fastpitch.MultiHeadAttn(4, 32, 8, 0.0),
        lambda attention, x: attention(x, None),
        {"qkv_net": TOGETHER},
    ),
    "self-attention": (
        lambda: transformer_2501.SelfAttention(4, 32, 0.0, is_causal=False),
        lambda attention, x: attention(x, torch.ones(1, 7).bool()),
        {"qkv_net": TOGETHER},
    ),
    "cross-attention": (
        lambda: transformer_2501.CrossAttention(4, 32, 32, 0.0),
        lambda attention, x: attention(x, torch.ones(1, 7).bool(), x, torch.ones(1, 7).bool()),
        {"q_net": "0 1 2 3", "kv_net": "0 1 2 3 0* 1* 2* 3*"},
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_each_block_reaches_its_heads(name):
    """NeMo's own forward decides, as Hugging Face's in tests/test_parts.py."""
    make, run, expected = MODULES[name]
    [weights] = tiny_models.reach(OneAttention(make(), run)).values()
    assert weights == expected


class ManyOutputs(NeuralModule):
    """A module of NeMo's whose outputs are lists."""

    output_types = {"many": [NeuralType(("B", "D"), LogitsType())]}


class WithHead(ModelPT):
    """A model of NeMo's with one of its modules."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__(OmegaConf.create({}))
        self.body, self.untyped, self.many = nn.Linear(12, 12, bias=False), NeuralModule(), ManyOutputs()
        for name, module in modules.items():
            self.add_module(name, module)

    def setup_training_data(self, train_data_config):
        pass

    def setup_validation_data(self, val_data_config):
        pass

    @classmethod
    def list_available_models(cls):
        return []


def with_adapter(module: nn.Module, width: int) -> nn.Module:
    """One of NeMo's modules with NeMo's adapter in it."""
    module.add_adapter("mine", OmegaConf.structured(LinearAdapterConfig(in_features=width, dim=4)))
    return module


def transducer(kind: type[RNNTJoint] = RNNTJoint, *, adapter: bool = False, **options: Any) -> WithHead:
    """The embedding's width, 10, is not the head's, 8, so that the head is not known by its shape."""
    prediction = RNNTDecoder(prednet={"pred_hidden": 10, "pred_rnn_layers": 1}, vocab_size=6)
    network = {"encoder_hidden": 12, "pred_hidden": 10, "joint_hidden": 8, "activation": "relu"}
    joint = kind(jointnet=network, num_classes=6, vocabulary=list("abcdef"), **options)
    return WithHead(decoder=prediction, joint=with_adapter(joint, 8) if adapter else joint)


FUSED = {"fuse_loss_wer": True, "fused_batch_size": 4}
OF_JOINT = {"body.weight", "joint.pred.weight", "joint.enc.weight"}
OF_ADAPTER = {"joint.adapter_layer.mine.module.1.weight", "joint.adapter_layer.mine.module.3.weight"}
HEAD_OF_JOINT = {"joint.joint_net.1.weight", "decoder.prediction.embed.weight"}
HEADS = {
    "joint": (transducer, OF_JOINT, HEAD_OF_JOINT),
    "fused joint": (lambda: transducer(**FUSED), OF_JOINT, HEAD_OF_JOINT),
    "fused TDT joint": (lambda: transducer(num_extra_outputs=5, **FUSED), OF_JOINT, HEAD_OF_JOINT),
    "joint with adapter": (lambda: transducer(adapter=True), OF_JOINT | OF_ADAPTER, HEAD_OF_JOINT),
    "fused joint with adapter": (lambda: transducer(adapter=True, **FUSED), OF_JOINT | OF_ADAPTER, HEAD_OF_JOINT),
    "HAT joint": (lambda: transducer(HATJoint), OF_JOINT, HEAD_OF_JOINT | {"joint.blank_pred.2.weight"}),
    "fused HAT joint": (lambda: transducer(HATJoint, **FUSED), OF_JOINT, HEAD_OF_JOINT),
    "sampled joint": (lambda: transducer(SampledRNNTJoint, n_samples=4, **FUSED), OF_JOINT, HEAD_OF_JOINT),
    "CTC with adapter": (
        lambda: WithHead(top=with_adapter(ConvASRDecoder(12, 6, vocabulary=list("abcdef")), 12)),
        {"body.weight", "top.adapter_layer.mine.module.1.weight", "top.adapter_layer.mine.module.3.weight"},
        {"top.decoder_layers.0.weight"},
    ),
    "speaker": (
        lambda: WithHead(top=SpeakerDecoder(12, 20, emb_sizes=[16, 14], pool_mode="xvector")),
        {"body.weight"},
        {"top.final.weight"},
    ),
    "classification": (
        lambda: WithHead(top=ConvASRDecoderClassification(12, 20)),
        {"body.weight"},
        {"top.decoder_layers.0.weight"},
    ),
    "lstm": (
        lambda: WithHead(top=LSTMDecoder(12, 5, 12, vocabulary=list("abcde"), bidirectional=False)),
        {"body.weight"},
        {"top.linear_layer.weight", "top.lstm_layer.weight_ih_l0"},
    ),
    "token classifier": (
        lambda: WithHead(top=TokenClassifier(12, 20, num_layers=2)),
        {"body.weight", "top.mlp.layer0.weight"},
        {"top.mlp.layer2.weight"},
    ),
}


@pytest.mark.parametrize("flatten_conv", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_heads_of_nemos_modules_go_to_adamw(head, flatten_conv):
    make, matrices, rest = HEADS[head]
    register()
    optimizer, _ = make().setup_optimization({"name": "adaptive_muon", "lr": 1e-3, "flatten_conv": flatten_conv})
    routes = routes_of(optimizer)
    assert matrices <= {name for name, algorithm in routes.items() if algorithm == "adaptive_muon"}
    assert rest <= {name for name, algorithm in routes.items() if algorithm == "adamw"}


def sortformer() -> WithHead:
    return WithHead(sortformer_modules=SortformerModules(fc_d_model=12, tf_d_model=12))


def frame_vad() -> WithHead:
    return WithHead(decoder=MultiLayerPerceptron(hidden_size=12, num_classes=2, num_layers=1))


@pytest.mark.parametrize(
    ("make", "kind", "heads"),
    [
        (sortformer, "Sortformer", {f"sortformer_modules.{w}hidden_to_spks.weight" for w in ("", "single_")}),
        (frame_vad, "frame-VAD", {"decoder.layer0.weight"}),
    ],
)
def test_documented_routes_are_for_the_heads_that_nothing_shows(make, kind, heads):
    register()
    block = {"name": "adaptive_muon", "lr": 1e-3}
    before, _ = make().setup_optimization(block)
    (line,) = re.findall(rf"^(routes: .*)    # {kind}$", PAGE, re.MULTILINE)
    after, _ = make().setup_optimization({**block, **OmegaConf.create(line)})
    routes = routes_of(before)
    assert {routes[name] for name in heads} == {"adaptive_muon"}, "say so on the page no more"
    assert routes_of(after) == {**routes, **{name: "adamw" for name in heads}}


def test_yaml_overrides_routes(config):
    config.model.optim.routes = {"encoder.layers.1.*": "adamw", "*.pos_bias_u": "adaptive_muon"}
    routes = routes_of(optimizer_of(config))
    assert {a for name, a in routes.items() if "layers.1." in name} == {"adamw"}
    assert routes["encoder.layers.0.self_attn.pos_bias_u"] == "adaptive_muon"
    assert routes["encoder.layers.0.self_attn.linear_q.weight"] == "adaptive_muon"


def test_modules_have_their_own_rates(config):
    config.model.optim_param_groups = {
        "decoder": {"lr": 5e-4},
        "encoder": {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-5, "scalar_weight_decay": 0.0},
    }
    optimizer = optimizer_of(config)
    by_name = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert by_name["decoder.decoder_layers.0.weight"]["lr"] == 5e-4
    matrix, norm = by_name["encoder.layers.0.self_attn.linear_q.weight"], by_name["encoder.layers.0.norm_out.weight"]
    assert (matrix["lr"], norm["lr"], matrix["eps"], norm["eps"]) == (1e-3, 1e-3, 1e-8, 1e-5)
    assert (matrix["weight_decay"], norm["weight_decay"]) == (1e-3, 0.0)
    assert norm["betas"] == [0.8, 0.9] and type(norm["betas"]) is list
    config.model.optim_param_groups.encoder.rate = 1
    with pytest.raises(
        ValueError, match=r"optim_param_groups of adaptive_muon must have known keys, got 'rate'.*lr, "
    ):
        optimizer_of(config)


def freeze_first(model: EncDecCTCModel) -> None:
    """Freezes the encoder's first layer."""
    for p in model.encoder.layers[0].parameters():
        p.requires_grad_(False)


def test_the_log_counts_what_is_trained_and_what_is_frozen(config, monkeypatch):
    said = []
    monkeypatch.setattr(nemo_logging, "info", lambda text, *rest: said.append(text % rest if rest else text))
    optimizer = optimizer_of(config, freeze_first)
    (line,) = (text for text in said if text.startswith("adaptive_muon:"))
    routes = routes_of(optimizer)
    kinds: dict[str, list[nn.Parameter]] = {"AdaptiveMuon (namo_d)": [], "AdamW": [], "frozen": []}
    for name, p in optimizer.model.named_parameters():
        title = "AdaptiveMuon (namo_d)" if routes[name] == "adaptive_muon" else "AdamW"
        kinds["frozen" if "layers.0." in name and "encoder" in name else title].append(p)
    assert len(kinds["frozen"]) > 20
    for title, held in kinds.items():
        assert f"{title}: {len(held)} parameters, {sum(p.numel() for p in held):,} elements" in line


class Unfreeze(pl.Callback):
    """Trains the encoder from the second epoch on, as ``encoder.unfreeze()`` does with any optimizer of NeMo's."""

    def on_train_epoch_start(self, trainer, model):
        if trainer.current_epoch == 0:
            self.start = weights(model.encoder)
        else:
            torch.testing.assert_close(weights(model.encoder), self.start, rtol=0, atol=0)
            assert not trainer.optimizers[0].state.keys() & set(model.encoder.parameters())
            model.encoder.unfreeze()


def test_what_is_frozen_stays_as_it_is_and_learns_once_it_is_unfrozen(config):
    config.model.optim.weight_decay = 0.5
    unfreeze = Unfreeze()
    trainer = trainer_of(config, max_steps=8, callbacks=[unfreeze])
    model = model_of(config, trainer)
    model.encoder.freeze()
    trainer.fit(model)
    for name, p in model.encoder.named_parameters():
        assert trainer.optimizers[0].state[p] and not torch.equal(p, unfreeze.start[name]), name


class Finetuning(BaseFinetuning):
    """Lightning's own way to train a part later on."""

    def freeze_before_training(self, model):
        self.freeze(model.encoder.layers[0])

    def finetune_function(self, model, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(model.encoder.layers[0], optimizer, lr=1e-3)


def test_lightnings_finetuning_trains_what_it_unfreezes(config):
    config.model.optim.pop("sched", None)
    start = weights(model_of(config, None))
    model, watch = fit(config, 6, Finetuning())
    optimizer = model.trainer.optimizers[0]
    assert watch.rates[-1] == [2e-2, 2e-3]  # it finds the layer in the optimizer and adds no group
    for name, p in model.encoder.layers[0].named_parameters():
        assert optimizer.state[p] and not torch.equal(p, start[f"encoder.layers.0.{name}"]), name


# ---- training ----


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn(config, method):
    config.model.optim = optim(method, sched={"name": "CosineAnnealing", "warmup_steps": 4, "min_lr": 1e-6})
    config.trainer.gradient_clip_val = 1.0
    model, watch = fit(config, 24)
    assert isinstance(model.trainer.optimizers[0], HybridAdaptiveMuon)
    assert sum(watch.losses[-4:]) < 0.5 * sum(watch.losses[:4])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def checkpoint_of(config: DictConfig, folder: Path, steps: int) -> Path:
    """The checkpoint that Lightning wrote after the first epoch, of four steps, of a run of ``steps``."""
    # Where there is no validation, Lightning 2.4 trains on a batch once more after it has loaded such a checkpoint.
    config.trainer.update({"limit_val_batches": 1, "check_val_every_n_epoch": 1})
    saver = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)
    fit(config, steps, saver, enable_checkpointing=True)
    return folder / "epoch=0.ckpt"


@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_the_uninterrupted_run(config, tmp_path, method):
    config.model.optim = optim(method, sched={"name": "CosineAnnealing", "warmup_steps": 2, "min_lr": 1e-6})
    saved = checkpoint_of(config, tmp_path, steps=8)
    whole, _ = fit(config, 8)
    resumed, watch = fit(config, 8, resume=saved)
    assert len(watch.losses) == 4
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    states = [model.trainer.optimizers[0].state_dict()["state"] for model in (resumed, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_resume_as_another_method_is_refused(config, tmp_path):
    config.model.optim = optim("normuon")
    saved = checkpoint_of(config, tmp_path, steps=4)
    config.model.optim = optim("namo")
    with pytest.raises(ValueError, match=r'moment2_method .* must be "namo" for parameter .encoder.*, got .normuon'):
        fit(config, 8, resume=saved)


def test_nemo_file_round_trip(config, tmp_path):
    model, _ = fit(config, 3)
    model.save_to(str(tmp_path / "model.nemo"))
    trainer = trainer_of(config, max_steps=2)
    restored = EncDecCTCModel.restore_from(str(tmp_path / "model.nemo"), trainer=trainer)
    torch.testing.assert_close(weights(restored), weights(model), rtol=0, atol=0)
    assert restored.cfg.optim.moment2_method == "namo_d"
    restored.setup_training_data(restored.cfg.train_ds)
    trainer.fit(restored)
    assert isinstance(trainer.optimizers[0], HybridAdaptiveMuon)
    assert not torch.equal(restored.decoder.decoder_layers[0].weight, model.decoder.decoder_layers[0].weight)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(config, precision):
    config.trainer.precision = precision
    model, watch = fit(config, 16, LossInFloat32())
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    optimizer = model.trainer.optimizers[0]
    buffers = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    assert {state[key].dtype for state in buffers for key in ("momentum_buffer", "moment2_buffer")} == {torch.float32}
    assert sum(watch.losses[-4:]) < 0.7 * sum(watch.losses[:4])


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_gradient_clipping_counts_both_parts(config, clip):
    _, watch = fit(config, 4, gradient_clip_val=clip)
    assert len(watch.norms) == 3
    assert all(abs(norm - 0.1) < 1e-4 for norm in watch.norms) if clip else min(watch.norms) > 1


SCHEDULES = {
    "CosineAnnealing": {"warmup_steps": 2, "min_lr": 1e-5},
    "NoamAnnealing": {"warmup_steps": 2, "min_lr": 1e-7, "d_model": 64},
    "InverseSquareRootAnnealing": {"warmup_steps": 2},
    "PolynomialDecayAnnealing": {"warmup_steps": 2, "power": 2.0},
    "SquareAnnealing": {"warmup_steps": 2},
    "NoamHoldAnnealing": {"warmup_steps": 2, "hold_steps": 4},
}
# One rate for all groups, says NeMo's code: of the first group, or none of the groups'.
ONE_RATE = {
    "CosineAnnealing with constant_steps": {"warmup_steps": 2, "constant_steps": 2, "min_lr": 1e-5},
    "WarmupAnnealing": {"warmup_steps": 2},
    "T5InverseSquareRootAnnealing": {"constant_steps": 2},
}


@pytest.mark.parametrize("name", [*SCHEDULES, *ONE_RATE])
def test_schedulers_see_both_parts(config, name):
    arguments = {**SCHEDULES, **ONE_RATE}[name]
    config.model.optim.sched = {"name": name.split()[0], **arguments}
    _, watch = fit(config, 8)
    # NeMo's scheduler on torch's AdamW with the same two rates.
    plain = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (2e-2, 2e-3)])
    scheduler = lr_scheduler.get_scheduler(name.split()[0], **arguments, max_steps=8)(plain)
    expected = []
    for _ in range(8):
        expected.append([group["lr"] for group in plain.param_groups])
        plain.step()
        scheduler.step()
    torch.testing.assert_close(torch.tensor(watch.rates), torch.tensor(expected))
    shared = {a == b for a, b in watch.rates[4:]}
    assert shared == {name in ONE_RATE}, "the documentation says which schedulers give both parts one rate"


@pytest.mark.parametrize("name", ["CosineAnnealing", "NoamAnnealing"])
def test_min_lr_above_a_rate_is_refused_by_nemo(config, name):
    sched = {"name": name, "warmup_steps": 0, "min_lr": 5e-3, **({"d_model": 64} if name == "NoamAnnealing" else {})}
    config.model.optim.sched = sched  # below the matrices' 2e-2, above the AdamW part's 2e-3
    with pytest.raises(ValueError, match="lower than the minimum learning rate"):
        fit(config, 2)


def run_script(config: DictConfig, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs the example's script, which does not know of adaptive_muon, as users do."""
    OmegaConf.save(config, folder / "config.yaml")
    command = [sys.executable, str(EXAMPLE / "speech_to_text_ctc.py"), "--config-path", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, "--config-name", "config", f"exp_manager.exp_dir={folder}", *overrides],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_script_with_hydra_overrides_in_two_processes(config, tmp_path):
    """A stock YAML, adaptive_muon from the command line, ddp: two halves of a batch do what the whole batch does."""
    whole = copy.deepcopy(config)
    lines = Path(config.model.train_ds.manifest_filepath).read_text().splitlines()
    shuffled = DistributedSampler(lines, num_replicas=1, rank=0)  # as Lightning does under ddp, whatever the YAML says
    (tmp_path / "shuffled.json").write_text("\n".join(lines[index] for index in shuffled))
    whole.model.train_ds.manifest_filepath = str(tmp_path / "shuffled.json")
    whole.model.optim = {**STOCK, "name": "adaptive_muon", "lr": 1e-3, "moment2_method": "namo_d", "scalar_lr": 2e-3}
    whole.model.optim.fp32_matmul_prec = "highest"
    expected, _ = fit(whole, 4)

    config.model.optim = STOCK
    config.model.train_ds.batch_size //= 2
    torch.manual_seed(0)
    EncDecCTCModel(cfg=config.model).save_to(str(tmp_path / "start.nemo"))
    saver = {
        "create_checkpoint_callback": True,
        "checkpoint_callback_params": {"monitor": "train_loss", "save_last": True},
    }
    config.exp_manager.update(saver)
    done = run_script(
        config,
        tmp_path,
        "model.optim.name=adaptive_muon",
        "model.optim.lr=1e-3",
        "++model.optim.moment2_method=namo_d",
        "++model.optim.scalar_lr=2e-3",
        "++model.optim.fp32_matmul_prec=highest",
        "trainer.devices=2",
        "+trainer.strategy=ddp",
        "trainer.use_distributed_sampler=true",
        "trainer.max_steps=4",
        f"+init_from_nemo_model={tmp_path / 'start.nemo'}",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "AdaptiveMuon (namo_d): 19 parameters" in done.stdout + done.stderr
    assert "; 19 shared by 2 replicas" in done.stdout + done.stderr
    assert "distributed_backend=gloo" in done.stdout + done.stderr
    (saved,) = tmp_path.rglob("*last.ckpt")
    loaded = torch.load(saved, weights_only=False)
    start = weights(model_of(config, None))
    for name, p in weights(expected).items():
        if not name.endswith("linear_k.bias"):  # the same for all keys, it cancels: its gradient is rounding
            assert (loaded["state_dict"][name] - p).norm() <= 1e-4 * (p - start[name]).norm(), name


def test_target_in_place_of_the_name(config):
    """As the documentation says; should NeMo's list open again, or names come with the parameters, it can say otherwise."""
    config.model.optim = {"_target_": "emerging_optimizers.adaptive_muon.HybridAdaptiveMuon", "lr": 1e-3}
    if hasattr(common, "UnsafeTargetError"):
        with pytest.raises(common.UnsafeTargetError):
            optimizer_of(config)
        return
    optimizer = optimizer_of(config)  # before 3.0: by shape alone
    names = {p: name for name, p in optimizer.model.named_parameters()}
    matrices = {names[p].rpartition(".")[2] for p in optimizer.param_groups[0]["params"]}
    assert matrices == {"weight", "pos_bias_u", "pos_bias_v"}


def test_documented_block_works(config):
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "name: adaptive_muon" in b)
    config.model.optim = OmegaConf.create(block).model.optim
    config.model.optim.fp32_matmul_prec = "highest"
    matrices, rest = optimizer_of(config).param_groups
    assert (matrices["moment2_method"], matrices["lr"], rest["lr"]) == ("namo_d", 4e-2, 4e-3)


def test_demo(tmp_path):
    command = [sys.executable, str(EXAMPLE / "compare.py"), "--steps", "2", "--seeds", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(method in done.stdout for method in ("adamw", *METHODS)) and "WER" in done.stdout
    runs = json.loads((tmp_path / "compare.json").read_text())
    assert {len(run["losses"]) for of_method in runs.values() for run in of_method} == {2}
    assert len({of_method[0]["losses"][0] for of_method in runs.values()}) == 1  # the same weights, the same batch
    assert len({of_method[0]["losses"][1] for of_method in runs.values()}) == len(runs)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


# ---- diagnostics ----


def test_diagnostics_are_in_the_loggers_of_a_stock_run(config, tmp_path):
    """One key of the YAML is all: every Trainer has the callback where NeMo is in use."""
    config.model.optim = optim("namo_d", diagnostics_every=2)
    logger = pl.loggers.CSVLogger(tmp_path)
    model, _ = fit(config, 4, logger=logger, log_every_n_steps=2)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("adaptive_muon/matrices")]
    assert [int(row["step"]) for row in rows] == [1, 3]
    optimizer = model.trainer.optimizers[0]
    for name, value in optimizer.diagnostics_summary().items():
        assert float(rows[-1][name]) == pytest.approx(value)
    assert any(name.startswith("encoder.layers.0.") for name in optimizer.diagnostics())
    assert "matrices measured:" in optimizer.report()
