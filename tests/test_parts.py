# SPDX-License-Identifier: Apache-2.0
"""Which rows or columns of a weight are one matrix, found from the modules; each against what the model does with it."""

import copy
import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from fused_attention import alone
from separate import Apart, Language, check_separate
from side_by_side import difference, normal
from test_experts import EXPERTS
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import utils
from torch.nn.utils import parametrizations, prune
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, models
from tree import tool

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.routing.fused import FUSED_CLASSES


def fields(**values: Any) -> Callable[[Any], None]:
    """An edit of a config: these values in these fields."""
    return lambda config: vars(config).update(values)


FULL = fields(layer_types=["full_attention"] * 2)
SEPARATE, GROUPED = ("0 1 2 3", "0 1 2 3", "0* 1* 2* 3*"), ("0 1 2 3", "01 23", "01* 23*")
TOGETHER, BY_HEAD = "0 1 2 3 0 1 2 3 0* 1* 2* 3*", "0 0 0* 1 1 1* 2 2 2* 3 3 3*"
QKV = ("q_proj", "k_proj", "v_proj")
# The type of model, an edit of its config, the class of its attention, and which heads each block of its weights reaches.
ATTENTION: list[tuple[str, Any, str, dict[str, str]]] = [
    ("llama", None, "LlamaAttention", dict(zip(QKV, GROUPED, strict=True))),
    ("mistral", None, "MistralAttention", dict(zip(QKV, GROUPED, strict=True))),
    ("qwen2", None, "Qwen2Attention", dict(zip(QKV, GROUPED, strict=True))),
    ("qwen3", None, "Qwen3Attention", dict(zip(QKV, GROUPED, strict=True))),
    ("gemma2", None, "Gemma2Attention", dict(zip(QKV, GROUPED, strict=True))),
    ("afmoe", None, "AfmoeAttention", dict(zip((*QKV, "gate_proj"), (*GROUPED, "0 1 2 3"), strict=True))),
    ("qwen3_next", FULL, "Qwen3NextAttention", {"q_proj": "0 0 1 1 2 2 3 3", "k_proj": "01 23", "v_proj": "01* 23*"}),
    ("gpt2", None, "GPT2Attention", {"c_attn": TOGETHER}),
    ("gpt_bigcode", None, "GPTBigCodeAttention", {"c_attn": "0 1 2 3 0123 0123*"}),
    ("gpt_bigcode", fields(multi_query=False), "GPTBigCodeAttention", {"c_attn": BY_HEAD}),
    ("gpt_neox", None, "GPTNeoXAttention", {"query_key_value": BY_HEAD}),
    ("bloom", None, "BloomAttention", {"query_key_value": BY_HEAD}),
    ("persimmon", None, "PersimmonAttention", {"query_key_value": BY_HEAD}),
    ("falcon", None, "FalconAttention", {"query_key_value": "0 1 2 3 0123 0123*"}),
    ("falcon", fields(multi_query=False, num_kv_heads=4), "FalconAttention", {"query_key_value": BY_HEAD}),
    (
        *("falcon", fields(new_decoder_architecture=True, num_kv_heads=2), "FalconAttention"),
        {"query_key_value": "0 1 01 01* 2 3 23 23*"},
    ),
    ("phi3", None, "Phi3Attention", {"qkv_proj": "0 1 2 3 01 23 01* 23*"}),
    ("mpt", None, "MptAttention", {"Wqkv": TOGETHER}),
    ("modernbert", None, "ModernBertAttention", {"Wqkv": TOGETHER}),
    ("codegen", None, "CodeGenAttention", {"qkv_proj": "0 0* 0 1 1* 1 2 2* 2 3 3* 3"}),
    ("imagegpt", None, "ImageGPTAttention", {"c_attn": TOGETHER}),
    ("bert", None, "BertAttention", dict(zip(("query", "key", "value"), SEPARATE, strict=True))),
    ("distilbert", None, "DistilBertSelfAttention", dict(zip(("q_lin", "k_lin", "v_lin"), SEPARATE, strict=True))),
    ("deberta", None, "DebertaAttention", {"in_proj": BY_HEAD}),
    ("t5", None, "T5Attention", dict(zip("qkv", SEPARATE, strict=True))),
    ("bart", None, "BartAttention", dict(zip(QKV, SEPARATE, strict=True))),
    ("vit", None, "ViTAttention", dict(zip(QKV, SEPARATE, strict=True))),
    (
        *("deepseek_v3", None, "DeepseekV3Attention"),
        {"q_b_proj": "0 1 2 3", "kv_a_proj_with_mqa": "0123 0123", "kv_b_proj": "0 0* 1 1* 2 2* 3 3*"},
    ),
]


@pytest.mark.parametrize(
    ("kind", "change", "attention", "expected"),
    ATTENTION,
    ids=[f"{kind}-{i}" for i, (kind, *_) in enumerate(ATTENTION)],
)
def test_each_block_reaches_its_heads(kind: str, change: Any, attention: str, expected: dict[str, str]) -> None:
    """Hugging Face's own forward decides: the rows of a head change that head of the output projection's columns."""
    assert tiny_models.reach(tiny_models.tiny(kind, change))[attention] == expected


def folders() -> dict[str, str]:
    """Where Hugging Face has the classes with fused weights: the folder of each."""
    found = {}
    names = {kind.removeprefix("transformers.") for kind in FUSED_CLASSES if kind.startswith("transformers.")}
    for path in Path(models.__path__[0]).glob("*/modeling_*.py"):
        if path.stem == f"modeling_{path.parent.name}":
            for name in names.intersection(re.findall(r"^class (\w+)\(nn.Module", path.read_text(), re.MULTILINE)):
                found[name] = path.parent.name
    return found | {"Attention": "openai", "DisentangledSelfAttention": "deberta"}  # others have these names too


# Those of which the above has whole models, and what else does not run by itself: DBRX's config lacks a field, and three
# are without their output projections. MiniMax's normalizes all heads together, behind which none can be told.
NOT_ALONE = {
    *(attention for _, _, attention, _ in ATTENTION if attention != "DebertaAttention"),
    *("DisentangledSelfAttention", "GPTNeoXJapaneseAttention", "Phi4MultimodalAttention"),
    *("DbrxAttention", "LayoutLMv2SelfAttention", "TimesformerSelfAttention", "EvollaSequenceCompressorAttention"),
    *("GraniteSpeechConformerAttention", "GraniteSpeechPlusConformerAttention", "MiniMaxLightningAttention"),
    "DecisionTransformerGPT2Attention",  # its config has one head
}
ALONE = {name: folder for name, folder in sorted(folders().items()) if name not in NOT_ALONE}


@pytest.mark.parametrize("name", ALONE)
def test_each_block_of_a_fused_weight_reaches_its_heads(name: str) -> None:
    """The table of classes, against their own forward."""
    [weights] = tiny_models.reach(alone(ALONE[name], name)).values()
    assert [*weights.values()] == ["0 1 2 3 01 23 01* 23*" if name == "Exaone4_5_VisionAttention" else TOGETHER]


FUSED = [row for row in ATTENTION if f"transformers.{row[2]}" in FUSED_CLASSES]


@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(lambda name=name: alone(ALONE[name], name), id=name) for name in ALONE),
        *(
            pytest.param(lambda row=row: tiny_models.tiny(*row[:2]), id=f"{row[0]}-{i}")
            for i, row in enumerate([*FUSED, ("deberta", None)])
        ),
    ],
)
def test_fused_queries_keys_and_values_are_told_apart(make: Callable[[], nn.Module]) -> None:
    """All rows of the values reach all heads in proportion, and those of queries and of keys do not."""
    found = tiny_models.reach(make(), by_head=False)
    [blocks] = [list(weights.values()) for weights in found.values() if weights]
    # CodeGen has its values before its keys.
    assert blocks in (["0123 0123 0123*"], ["0123 0123* 0123"] if "CodeGenAttention" in found else [])


def test_the_table_of_fused_weights_has_what_is_installed() -> None:
    assert len(ALONE) >= 37
    assert {f"transformers.{name}" for name in folders()} == {c for c in FUSED_CLASSES if c.startswith("transformers")}


def halves(weight: torch.Tensor, times: int) -> list[torch.Tensor]:
    """The first and the second half of each of so many parts of a weight."""
    parts = weight.view(times, 2, -1, weight.size(-1))
    return [parts[:, 0].flatten(0, 1), parts[:, 1].flatten(0, 1)]


def row_heads(size: int) -> Apart:
    """The heads of a weight, below each other, by a view."""
    return lambda weight: [*weight.view(-1, size, weight.size(-1))]


def column_heads(size: int) -> Apart:
    """The heads of a weight, beside each other, by a view."""
    return lambda weight: [*weight.view(len(weight), -1, size).transpose(0, 1)]


class Multihead(nn.Module):
    """Torch's attention, with keys of the same width or of another."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.attention, self.kdim = nn.MultiheadAttention(24, 4, kdim=kdim), kdim or 24

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns a loss."""
        x = normal((*tokens.shape, 24), 3)
        keys = normal((*tokens.shape, self.kdim), 4)
        return self.attention(x, keys, normal((*tokens.shape, 24), 5))[0].square().mean()


def thirds(weight: torch.Tensor) -> list[torch.Tensor]:
    return [*weight.chunk(3)]


SPLIT, GATED = {"split_heads": True}, {"split_gate_up": True}
# A model, the switches, and how each weight with such an end to its name is made of matrices: (out, in) ones.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, bool], dict[str, Apart]]] = {
    "multihead": (Multihead, SPLIT, {"in_proj_weight": row_heads(6), "out_proj.weight": column_heads(6)}),
    "multihead, not by head": (Multihead, {}, {"in_proj_weight": thirds}),
    "multihead, apart": (
        lambda: Multihead(16),
        SPLIT,
        {"_proj_weight": row_heads(6), "out_proj.weight": column_heads(6)},
    ),
    "llama": (
        lambda: Language("llama"),
        SPLIT,
        {**{name: row_heads(8) for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")}}
        | {"o_proj.weight": column_heads(8)},
    ),
    "gpt2": (lambda: Language("gpt2"), SPLIT, {"c_attn.weight": row_heads(8), "attn.c_proj.weight": column_heads(8)}),
    "gpt2, not by head": (lambda: Language("gpt2"), {}, {"c_attn.weight": thirds}),
    "gpt_neox, not by head": (
        lambda: Language("gpt_neox"),
        {},
        {"query_key_value.weight": lambda w: [w.view(4, 3, 8, -1)[:, i].flatten(0, 1) for i in range(3)]},
    ),
    "qwen3_next, not by head": (lambda: Language("qwen3_next", FULL), {}, {"q_proj.weight": lambda w: halves(w, 4)}),
    "deepseek_v3": (
        lambda: Language("deepseek_v3"),
        SPLIT,
        {
            "q_b_proj.weight": row_heads(12),
            "kv_a_proj_with_mqa.weight": lambda w: [w[:16], w[16:]],
            "kv_b_proj.weight": lambda w: [part for head in w.view(4, 16, -1) for part in (head[:8], head[8:])],
            "o_proj.weight": column_heads(8),
        },
    ),
    "phi3": (lambda: Language("phi3"), GATED | {"split_qkv": False}, {"gate_up_proj.weight": lambda w: [*w.chunk(2)]}),
    "modernbert": (
        lambda: Language("modernbert"),
        SPLIT | GATED,
        {"Wqkv.weight": row_heads(8), "Wo.weight": column_heads(8), "Wi.weight": lambda w: [*w.chunk(2)]}
        | {"mlp.Wo.weight": lambda w: [w]},
    ),
}


@pytest.mark.parametrize("method", ["namo_d", "normuon", "adamuon"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_separate_weights(name: str, method: str) -> None:
    check_separate(*MODELS[name], method)


# ---- what is said, and what decides


class MyAttention(nn.Module):
    """Attention that no recognizer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.qkv = nn.Linear(12, 12), nn.Linear(12, 36)


class Mine(nn.Module):
    """Known attention, unknown attention, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.unknown, self.mlp = nn.MultiheadAttention(12, 3), MyAttention(), nn.Linear(12, 10)
        self.mlp.gate_up_proj = nn.Linear(12, 20)


def lines(optimizer: HybridAdaptiveMuon) -> dict[str, str]:
    """What describe() says of each parameter, by its name."""
    return {
        found[1]: found[2]
        for found in re.finditer(r"^ +[\dx ]+  (\S+)  \((.*)\)$", optimizer.describe(), re.MULTILINE)
    }


def test_describe_says_the_parts_and_what_is_not_recognized(caplog: pytest.LogCaptureFixture) -> None:
    made = HybridAdaptiveMuon.from_model(Mine())
    assert lines(made)["known.in_proj_weight"] == "hidden matrix; queries of 12, keys of 12 and values of 12 rows"
    assert lines(made)["unknown.qkv.weight"] == "hidden matrix" and not caplog.records
    made = HybridAdaptiveMuon.from_model(Mine(), split_heads=True, split_gate_up=True)
    assert lines(made)["known.in_proj_weight"] == (
        "hidden matrix; 3 query heads of 4, 3 key heads of 4 and 3 value heads of 4 rows"
    )
    assert lines(made)["known.out_proj.weight"] == "hidden matrix; 3 heads of 4 columns"
    unknown = ("unknown.mixed.weight", "unknown.qkv.weight", "mlp.gate_up_proj.weight")
    for name in unknown:
        assert lines(made)[name].startswith(
            "hidden matrix; not split, the module is not recognized; set its muon_blocks"
        )
    assert lines(made)["mlp.weight"] == "hidden matrix"
    [record] = caplog.records
    assert "3 weights are not split" in record.getMessage() and all(name in record.getMessage() for name in unknown)


def layer(cls: str, **shapes: tuple[int, int]) -> nn.Module:
    """A module whose class has this name, with linear layers of so many outputs and inputs."""
    made = type(cls, (nn.Module,), {})()
    for name, (outputs, inputs) in shapes.items():
        setattr(made, name, nn.Linear(inputs, outputs))
    return made


WIDE, HEADS = (12, 12), {"split_heads": True}
SAID: list[tuple[dict[str, bool], nn.Module, set[str]]] = [
    *(
        (HEADS, layer(cls, in_proj=(36, 12), proj=WIDE), {"in_proj", "proj"})
        for cls in ("SelfAttentionLayer", "FlashAttention2", "MultiHeadAttentionBlock", "AttnModule", "MHA", "emha2")
    ),
    *(
        (HEADS, layer("Mixer", **{name: (36, 12)}, proj=WIDE), {name, "proj"})
        for name in ("kqv", "fused_qkv", "QKV", "attn_qkv_linear", "queries_keys_values")
    ),
    (HEADS, layer("MemoryAttentionMLP", up=(36, 12), down=(12, 36)), set()),
    (HEADS, layer("Mamba", in_proj=(36, 12), out_proj=WIDE), set()),
    *(
        (GATED, layer(cls, fc1=(24, 12), fc2=WIDE), {"fc1"})
        for cls in ("SwiGLU", "GEGLU", "GeGLUBlock", "ReGLU", "XSwiGluFFN", "GatedMLP", "GatedFeedForwardLinear")
    ),
    (GATED, layer("GEGLU", proj=(24, 12)), {"proj"}),
    (GATED, layer("MLP", gate_up_linear=(24, 12), down=WIDE), {"gate_up_linear"}),
    (
        GATED,
        layer("MLP", fusedGateUp=(24, 12), upGate=(24, 12), up_and_gate=(24, 12)),
        {"fusedGateUp", "upGate", "up_and_gate"},
    ),
    # Gates and up projections of their own, and what only reads like them.
    (GATED, layer("SwiGLU", gate=(24, 12), up=(24, 12), down=(12, 24)), set()),
    (GATED, layer("GatedMLP", fc1=(24, 12), fc2=(12, 24)), set()),
    (GATED, layer("GlueModel", fc1=(24, 12), fc2=WIDE), set()),
    (GATED, layer("Cell", gate_update=(24, 12), gate_group=(24, 12), gate_proj=(24, 12)), set()),
    (GATED, layer("GatedNet", fc1=(24, 12), fc2=WIDE), set()),
]


@pytest.mark.parametrize(("switch", "module", "expected"), SAID, ids=lambda each: type(each).__name__)
def test_what_may_hold_several_matrices_is_said(
    switch: dict[str, bool], module: nn.Module, expected: set[str]
) -> None:
    """By the name of its class or of its layers; and none of it is split."""
    made = HybridAdaptiveMuon.from_model(nn.ModuleDict({"a": module, "head": nn.Linear(12, 5)}), **switch)
    assert {name.split(".")[1] for name, text in lines(made).items() if "; not split" in text} == expected
    assert not any(route.parts for *_, route in made.routes)


def test_a_layer_around_attention_is_not_attention() -> None:
    model = layer("MaskedAttentionLayer", fc1=(24, 12), fc2=(12, 24))
    model.attention = nn.MultiheadAttention(12, 3)
    model.linear = layer("LinearAttentionLayer", fc1=(24, 12))
    model.linear.inner = layer("GatedDeltaNet", mixed=(24, 12))
    said = lines(HybridAdaptiveMuon.from_model(nn.ModuleList([model]), split_heads=True))
    assert [name for name, text in said.items() if "; not split" in text] == ["0.linear.inner.mixed.weight"]
    assert "; 3 heads" in said["0.attention.out_proj.weight"]


def test_lxmerts_output_projections_are_said() -> None:
    model = tiny_models.tiny("lxmert")
    said = lines(HybridAdaptiveMuon.from_model(model, split_heads=True, split_gate_up=True))
    unsplit = {re.sub(r"^.*\.\d+\.", "", name) for name, text in said.items() if "; not split" in text}
    assert unsplit == {
        f"{name}.output.dense.weight" for name in ("attention", "visual_attention", "visn_self_att", "lang_self_att")
    }


@pytest.mark.parametrize(
    "name", ["ClvpGatedLinearUnit", "Cohere2VisionMultiModalProjector", "AyaVisionMultiModalProjector"]
)
@torch.no_grad()
def test_gate_and_up_projection_by_the_modules_own_forward(name: str) -> None:
    """A row, and the one that is half of the rows below it, change the same hidden unit."""
    folder = next(
        path for path in Path(models.__path__[0]).glob("*/modeling_*.py") if f"class {name}(" in path.read_text()
    )
    kind = getattr(importlib.import_module(f"transformers.models.{folder.parent.name}.{folder.stem}"), name)
    inner = SimpleNamespace(hidden_size=4)
    config = SimpleNamespace(
        **{"hidden_act": "silu", "hidden_size": 16, "intermediate_size": 6, "downsample_factor": 2},
        **{
            "alignment_intermediate_size": 12,
            "adapter_layer_norm_eps": 1e-6,
            "vision_config": inner,
            "text_config": inner,
        },
    )
    module, seen = kind(config), []
    if hasattr(module, "linear_2"):
        module.linear_2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        module.register_forward_hook(lambda *args: seen.append(args[2]))
    made = HybridAdaptiveMuon.from_model(nn.ModuleList([module]), split_gate_up=True)
    [(p, parts)] = [(p, route.parts) for _, p, route in made.routes if route.parts]
    assert parts.blocks == (6, 6) and len(p) == 12
    x = normal((1, 4, 16 if name.startswith("Clvp") else 4))
    module(x)
    for row in range(12):
        kept = p[row].clone()
        p[row, 0] += 1
        module(x)
        p[row] = kept
        assert (seen[-1] - seen[0]).abs().flatten(0, -2).amax(0).nonzero().flatten().tolist() == [row % 6]


def test_muon_blocks_and_blocks_fn_decide_before() -> None:
    model = Mine()
    model.known.in_proj_weight.muon_blocks = (18, 18)
    model.unknown.qkv.weight.muon_blocks = (12, 12, 12)
    made = HybridAdaptiveMuon.from_model(
        model,
        split_heads=True,
        moment2_method="namo",
        blocks_fn=lambda p: (6, 6) if p is model.known.out_proj.weight else None,
    )
    assert lines(made)["known.in_proj_weight"] == "hidden matrix, blocks of 2 x 18 rows"
    assert lines(made)["known.out_proj.weight"] == "hidden matrix, blocks of 2 x 6 rows"
    assert lines(made)["unknown.qkv.weight"] == "hidden matrix, blocks of 3 x 12 rows"
    assert [number_of_parts(made, p) for p in (model.known.in_proj_weight, model.known.out_proj.weight)] == [2, 2]


def number_of_parts(optimizer: HybridAdaptiveMuon, p: torch.Tensor) -> int:
    """The number of matrices that a step makes of a parameter."""
    p.grad = torch.ones_like(p)
    optimizer.step()
    return sum(key.startswith("moment2") for key in optimizer.state[p])


def test_another_optimizer_of_the_model_makes_its_own_choice() -> None:
    """What one has tagged is not another's."""
    model = nn.MultiheadAttention(12, 3)
    p, options = model.in_proj_weight, {"moment2_method": "namo"}
    first = HybridAdaptiveMuon.from_model(model, split_heads=True, **options)
    second = HybridAdaptiveMuon.from_model(model, split_qkv=False, **options)
    third = HybridAdaptiveMuon(model.named_parameters(), **options)
    assert [number_of_parts(each, p) for each in (second, first, third)] == [1, 9, 1]
    copied = copy.deepcopy(HybridAdaptiveMuon.from_model(model, **options))
    assert number_of_parts(copied, copied.param_groups[0]["params"][0]) == 3


def wrapped(model: nn.Module, way: str) -> Any:
    """A model in a wrapper of torch's, or with wrapped projections."""
    if way == "compiled":
        return torch.compile(model)
    for layer in model.model.layers:
        if way == "checkpointed attention":
            layer.self_attn = checkpoint_wrapper(layer.self_attn)
        else:
            layer.self_attn.q_proj = checkpoint_wrapper(layer.self_attn.q_proj)
    return model


# The sizes of a small model with grouped queries.
SMALL: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("way", ["compiled", "checkpointed attention", "checkpointed projection"])
def test_wrappers_change_nothing(way: str) -> None:
    config = LlamaConfig(**SMALL, vocab_size=9)
    plain = HybridAdaptiveMuon.from_model(LlamaForCausalLM(config), split_heads=True)
    other = HybridAdaptiveMuon.from_model(wrapped(LlamaForCausalLM(config), way), split_heads=True)
    assert [line[1:] for line in plain.routes if line[2].parts] and lines(plain) == lines(other)


def test_a_shared_weight_with_other_parts_elsewhere_is_one_matrix() -> None:
    one, other = nn.MultiheadAttention(12, 3), nn.MultiheadAttention(12, 2)
    other.in_proj_weight = one.in_proj_weight
    made = HybridAdaptiveMuon.from_model(nn.ModuleList([one, other]), split_heads=True)
    assert "not split" in lines(made)["0.in_proj_weight"]


class Sized(nn.Module):
    """Attention that has the number of its heads as an attribute, and not their size."""

    def __init__(self, queries: int, keys: int, inputs: int, groups: int = 2) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, groups
        self.q_proj, self.o_proj = nn.Linear(32, queries), nn.Linear(inputs, 32)
        if keys:
            self.k_proj, self.v_proj = nn.Linear(32, keys), nn.Linear(32, keys)


class SizedAttention(Sized):
    """The same under a name that shows what it is."""


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ((32, 16, 32), 8),
        ((64, 32, 64), 16),
        ((32, 32, 32), 8),  # keys of all heads
        ((32, 0, 32), 8),
        ((64, 16, 32), 0),  # queries and gates, however they stand: keys and the output projection have heads of 8
        ((64, 32, 32, 4), 0),
        ((64, 16, 64), 0),  # keys alone
        ((64, 32, 32), 0),  # the output projection alone
        ((64, 0, 32), 0),
    ],
    ids=str,
)
def test_the_size_of_heads_must_fit_all_projections(shapes: Any, size: int) -> None:
    said = lines(HybridAdaptiveMuon.from_model(nn.ModuleDict({"a": SizedAttention(*shapes)}), split_heads=True))
    if size:
        assert said["a.q_proj.weight"].endswith(f"; 4 query heads of {size} rows")
        assert said["a.o_proj.weight"].endswith(f"; 4 heads of {size} columns")
    else:
        assert all("; not split" in text for name, text in said.items() if name.endswith("weight"))


TIES: dict[str, tuple[Callable[[Any], None], str]] = {
    "two uses in a module": (
        lambda m: setattr(m.a.o_proj, "weight", m.a.q_proj.weight),
        "not split, layers that share",
    ),
    "a plain layer": (lambda m: setattr(m.plain, "weight", m.a.q_proj.weight), "not split, layers that share"),
    "the same layer elsewhere": (lambda m: setattr(m, "plain", m.a.q_proj), "not split, layers that share"),
    "keys elsewhere": (lambda m: setattr(m.b.k_proj, "weight", m.a.q_proj.weight), "4 query heads of 8 rows"),
    "one attention under two names": (lambda m: setattr(m, "b", m.a), "4 query heads of 8 rows"),
    "a head": (lambda m: (setattr(m.a, "num_heads", 1), setattr(m, "plain", m.a.q_proj)), "one head"),
}


@pytest.mark.parametrize("way", TIES)
def test_a_shared_weight_is_split_where_all_uses_have_the_same_matrices(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = nn.Module()
    model.a, model.b, model.plain = Sized(32, 32, 32, 4), Sized(32, 32, 32, 4), nn.Linear(32, 32)
    model.last = nn.Linear(32, 3)
    tie, expected = TIES[way]
    tie(model)
    made = HybridAdaptiveMuon.from_model(model, split_heads=True)
    assert lines(made)["a.q_proj.weight"].startswith(f"hidden matrix; {expected}")
    assert [record.getMessage().count("a.q_proj") for record in caplog.records] == [1] * expected.startswith("not")


def test_the_direction_of_a_parametrized_weight_is_split() -> None:
    """And none is computed: spectral_norm would take that for an iteration."""
    attention = Sized(32, 16, 32)
    for name, change in {
        "q_proj": parametrizations.weight_norm,
        "k_proj": utils.weight_norm,
        "v_proj": lambda layer: prune.l1_unstructured(layer, "weight", 0.2),
        "o_proj": parametrizations.spectral_norm,
    }.items():
        change(getattr(attention, name))
    made_by = attention.o_proj.parametrizations.weight[0]
    before = made_by._u.clone()
    said = lines(HybridAdaptiveMuon.from_model(nn.ModuleDict({"a": attention}), split_heads=True))
    assert said["a.q_proj.parametrizations.weight.original1"].endswith("; 4 query heads of 8 rows")
    assert said["a.k_proj.weight_v"].endswith("; 2 key heads of 8 rows")
    assert said["a.v_proj.weight_orig"].endswith("; 2 value heads of 8 rows")
    assert said["a.o_proj.parametrizations.weight.original"].endswith("; 4 heads of 8 columns")
    assert torch.equal(before, made_by._u)


@pytest.mark.parametrize("bias", [False, True])
def test_the_direction_of_torchs_attention_is_split(bias: bool) -> None:
    model = nn.MultiheadAttention(12, 3, bias=bias)
    parametrizations.weight_norm(model, "in_proj_weight")
    made = HybridAdaptiveMuon.from_model(model)
    name = "parametrizations.in_proj_weight.original1"
    assert lines(made)[name].endswith("; queries of 12, keys of 12 and values of 12 rows")


def test_another_parametrization_is_said_and_not_split() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(12, 3)})
    parametrizations.orthogonal(model["a"].out_proj)
    said = lines(HybridAdaptiveMuon.from_model(model, split_heads=True))
    assert "; not split" in said["a.out_proj.parametrizations.weight.original"]


def test_a_shard_that_an_attribute_shows_is_not_taken_for_the_matrix() -> None:
    model = nn.MultiheadAttention(12, 3)
    model.out_proj.weight.partition_dim = 0
    made = HybridAdaptiveMuon.from_model(model, split_heads=True)
    assert "not split" in lines(made)["out_proj.weight"] and "heads of 4" in lines(made)["in_proj_weight"]


@pytest.mark.parametrize("switch", ["split_qkv", "split_heads", "split_gate_up"])
def test_a_switch_is_true_or_false(switch: str) -> None:
    with pytest.raises(ValueError, match=rf"{switch} must be True or False, got 'yes'"):
        HybridAdaptiveMuon.from_model(Mine(), **{switch: "yes"})


@pytest.mark.parametrize("method", ["namo_d", "normuon", "namo"])
def test_a_checkpoint_with_other_parts_is_refused_with_the_remedy(method: str) -> None:
    """One from before the switches, of a fused weight as one matrix, among them."""
    model = nn.MultiheadAttention(12, 3)
    saved = HybridAdaptiveMuon.from_model(model, moment2_method=method, split_qkv=False)
    number_of_parts(saved, model.in_proj_weight)
    with pytest.raises(ValueError, match=r"split_qkv=False"):
        HybridAdaptiveMuon.from_model(model, moment2_method=method).load_state_dict(saved.state_dict())
    same = HybridAdaptiveMuon.from_model(model, moment2_method=method, split_qkv=False)
    same.load_state_dict(saved.state_dict())


def experts(**layout: bool) -> nn.Module:
    """Experts in one tensor, as Hugging Face's decorator marks them."""
    module = nn.Module()
    shapes = [(3, 8, 12), (3, 6, 8)] if layout["is_transposed"] else [(3, 12, 8), (3, 8, 6)]
    module.gate_up_proj, module.down_proj = (nn.Parameter(normal(shape)) for shape in shapes)
    module.gate_up_proj.muon_stacked = True
    vars(module).update(layout)
    return module


@pytest.mark.parametrize("tag", [False, True])
@pytest.mark.parametrize("is_concatenated", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_gate_and_up_of_experts(is_transposed: bool, is_concatenated: bool, tag: bool) -> None:
    """Stacks in both orders of their dimensions, with gate and up one after the other or in turn."""
    module = experts(has_gate=True, is_transposed=is_transposed, is_concatenated=is_concatenated)
    p = module.gate_up_proj
    p.muon_transposed = tag
    options = {"moment2_method": "namo_d", "weight_decay": 0.0, "fp32_matmul_prec": "highest"}
    outputs = p.detach().mT if is_transposed else p.detach()  # (experts, out, in)

    def halves_of(t: torch.Tensor) -> Iterable[torch.Tensor]:
        return t.chunk(2, 1) if is_concatenated else (t[:, ::2], t[:, 1::2])

    # A stack that is stored (in, out) and not tagged so is worked on as it is stored.
    as_worked = (lambda t: t.mT) if is_transposed and not tag else (lambda t: t)
    if tag and not is_transposed:
        as_worked = lambda t: t.mT  # noqa: E731
    parts = [nn.Parameter(as_worked(half).clone()) for half in halves_of(outputs)]
    for part in parts:
        part.muon_stacked = True
    made = HybridAdaptiveMuon.from_model(module, 1e-2, split_gate_up=True, **options)
    assert lines(made)["gate_up_proj"].startswith("stack of hidden matrices; gate and up projection of 6 ")
    separate = AdaptiveMuon(parts, 1e-2, **options)
    p.grad = normal(tuple(p.shape), 7)
    grad = p.grad.mT if is_transposed else p.grad
    for part, half in zip(parts, halves_of(grad), strict=True):
        part.grad = as_worked(half).clone()
    made.step()
    separate.step()
    after = p.detach().mT if is_transposed else p.detach()
    for part, half in zip(parts, halves_of(after), strict=True):
        assert difference(as_worked(half), part.detach()) <= 1e-6


def test_columns_are_of_a_public_value() -> None:
    model = nn.MultiheadAttention(12, 3)
    HybridAdaptiveMuon.from_model(model, split_heads=True)
    assert model.out_proj.weight.muon_parts == ColumnBlocks((4, 4, 4)) and model.in_proj_weight.muon_parts == (4,) * 9


def test_the_documented_tables_are_those_of_the_tests() -> None:
    """``make option-tables`` writes them."""
    made = tool("parts_table")
    page = made.PAGE.read_text(encoding="utf-8")
    tables = {
        "attention": made.attention_table(ATTENTION, tiny_models.tiny),
        "experts": made.experts_table(EXPERTS, tiny_models.tiny),
        "classes": made.class_list(),
    }
    assert made.with_tables(page, tables) == page


def test_phi3_with_both_switches() -> None:
    config = Phi3Config(**SMALL, pad_token_id=0)
    made = HybridAdaptiveMuon.from_model(Phi3ForCausalLM(config), split_heads=True, split_gate_up=True)
    name = "model.layers.0."
    assert lines(made)[name + "mlp.gate_up_proj.weight"].endswith("; gate and up projection of 48 rows each")
    assert lines(made)[name + "self_attn.qkv_proj.weight"].endswith(
        "; 4 query heads of 8, 2 key heads of 8 and 2 value heads of 8 rows"
    )
