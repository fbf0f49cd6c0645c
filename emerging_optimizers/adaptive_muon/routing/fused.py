# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values that are rows of one weight.

A name such as ``qkv`` does not show in which order the rows stand. So a table has the classes whose ``forward`` was read,
and the tests try each of them: they change the rows of one head and look which heads of the output change.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.routing.parts import (
    Parts,
    Weight,
    kinds_of,
    merged_rows,
    rows,
    weight_of,
)
from emerging_optimizers.adaptive_muon.routing.projections import Heads, HeadsIn, heads_of, of_positions, output_after


__all__ = ["FUSED_CLASSES", "fused_heads", "has_fused", "in_fused"]


@dataclass(frozen=True)
class _Order:
    """An order of the rows of a fused weight."""

    heads: HeadsIn  # how many heads there are in the weight, of so many heads of queries and groups
    sizes: Callable[[Heads], Sequence[tuple[str, int, int]]]  # as parts.rows takes them, for once
    each: str = ""  # what has these sizes once
    times: Callable[[Heads], int] = lambda heads: 1  # how often they repeat


def _all_together(heads: Heads) -> Sequence[tuple[str, int, int]]:
    queries = ("query head", heads.number, heads.size)
    return [queries, ("key head", heads.groups, heads.size), ("value head", heads.groups, heads.size)]


# All queries, all keys, all values.
_CONTIGUOUS = _Order(lambda number, groups: number + 2 * groups, _all_together)
_ONE_KEY = _Order(  # multi-query attention
    lambda number, groups: number + 2,
    lambda heads: [
        ("query head", heads.number, heads.size),
        ("key head", 1, heads.size),
        ("value head", 1, heads.size),
    ],
)
# All keys, all values: of cross-attention.
_KEYS_AND_VALUES = _Order(
    lambda number, groups: 2 * groups,
    lambda heads: [("key head", heads.groups, heads.size), ("value head", heads.groups, heads.size)],
)
# Head by head, its query, its key and its value.
_BY_HEAD = _Order(
    lambda number, groups: 3 * number,
    lambda heads: [("query", 1, heads.size), ("key", 1, heads.size), ("value", 1, heads.size)],
    "head",
    lambda heads: heads.number,
)
# Group by group, the queries that share a key and a value, the key, the value.
_BY_GROUP = _Order(
    lambda number, groups: number + 2 * groups,
    lambda heads: [
        ("query head", heads.queries_per_group, heads.size),
        *(("key head", 1, heads.size), ("value head", 1, heads.size)),
    ],
    "query group",
    lambda heads: heads.groups,
)
# CodeGen's: four parts, as it was trained on so many devices, each with its queries, its values and its keys.
_IN_QUARTERS = _Order(
    lambda number, groups: 3 * number,
    lambda heads: [(f"{name} head", heads.number // 4, heads.size) for name in ("query", "value", "key")],
    "quarter",
    lambda heads: 4,
)


def _of_gpt2(module: nn.Module) -> _Order:
    return _KEYS_AND_VALUES if getattr(module, "is_cross_attention", False) else _CONTIGUOUS


def _of_bigcode(module: nn.Module) -> _Order:
    if getattr(module, "is_cross_attention", False):
        return _KEYS_AND_VALUES
    return _ONE_KEY if getattr(module, "multi_query", False) else _BY_HEAD


def _of_falcon(module: nn.Module) -> _Order:
    if getattr(module, "new_decoder_architecture", False):
        return _BY_GROUP
    return _ONE_KEY if getattr(module, "multi_query", False) else _BY_HEAD


_QKV = (
    *("BlipAttention", "Blip2Attention", "CohereCompassVisionAttention", "DeepseekOcr2SamVisionAttention"),
    *("Ernie4_5_VLMoeVisionAttention", "Exaone4_5_VisionAttention", "Florence2VisionWindowAttention"),
    *("Glm4vVisionAttention", "Glm4vMoeVisionAttention", "Glm5NextVisionAttention", "GlmImageVisionAttention"),
    *("GlmOcrVisionAttention", "GotOcr2VisionAttention", "HieraMaskUnitAttention", "InstructBlipAttention"),
    *("InstructBlipVideoAttention", "MgpstrAttention", "PPFormulaNetVisionAttention", "PPOCRV5MobileRecAttention"),
    *("PPOCRV5ServerRecAttention", "PPOCRV6SmallRecAttention", "Qwen2_5_VLVisionAttention", "VisionAttention"),
    *("Qwen3_5VisionAttention", "Qwen3_5MoeVisionAttention", "Qwen3OmniMoeVisionAttention", "Qwen3VLVisionAttention"),
    *("Qwen3VLMoeVisionAttention", "Qwen4ExpVisionAttention", "SamVisionAttention", "Sam2MultiScaleAttention"),
    *("SamHQVisionAttention", "SegGptAttention", "SLANeXtVisionAttention", "TimesformerSelfAttention"),
    "VitDetAttention",
)
# The child that is fused and the order of its rows, by the package and the class.
_TABLE: dict[str, tuple[str, _Order | Callable[[nn.Module], _Order]]] = {
    **{f"transformers.{name}": ("qkv", _CONTIGUOUS) for name in _QKV},
    **{
        f"transformers.{name}": ("Wqkv", _CONTIGUOUS)
        for name in ("DbrxAttention", "MptAttention", "ModernBertAttention")
    },
    **{f"transformers.{name}": ("qkv_proj", _CONTIGUOUS) for name in ("Phi3Attention", "Phi4MultimodalAttention")},
    **{
        f"transformers.{name}": ("c_attn", _of_gpt2)
        for name in ("GPT2Attention", "ImageGPTAttention", "DecisionTransformerGPT2Attention")
    },
    **{
        f"transformers.{name}": ("query_key_value", _BY_HEAD)
        for name in ("BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention")
    },
    **{
        f"transformers.{name}": ("to_kv", _KEYS_AND_VALUES)
        for name in (
            *("GraniteSpeechConformerAttention", "GraniteSpeechPlusConformerAttention"),
            "EvollaSequenceCompressorAttention",
        )
    },
    "transformers.Attention": ("c_attn", _CONTIGUOUS),  # openai-gpt's
    "transformers.BarkSelfAttention": ("att_proj", _CONTIGUOUS),
    "transformers.CodeGenAttention": ("qkv_proj", _IN_QUARTERS),
    "transformers.DisentangledSelfAttention": ("in_proj", _BY_HEAD),  # DeBERTa's; that of version 2 has no in_proj
    "transformers.FalconAttention": ("query_key_value", _of_falcon),
    "transformers.GPTBigCodeAttention": ("c_attn", _of_bigcode),
    "transformers.LayoutLMv2SelfAttention": ("qkv_linear", _CONTIGUOUS),
    "transformers.MiniMaxLightningAttention": ("qkv_proj", _BY_HEAD),
    "nemo.MultiHeadAttention": ("w_qkv", _CONTIGUOUS),
    "nemo.MultiHeadAttn": ("qkv_net", _CONTIGUOUS),
    "nemo.SelfAttention": ("qkv_net", _CONTIGUOUS),
    "nemo.CrossAttention": ("kv_net", _KEYS_AND_VALUES),
    "nemo_automodel.CausalSelfAttention": ("qkv_proj", _CONTIGUOUS),  # its GPT-2's
}
FUSED_CLASSES = tuple(_TABLE)
# Names of fused weights, also of classes that are not in the table, and parts of such names.
_NAMES = {child for child, _ in _TABLE.values()} - {"in_proj"} | {"queries_keys_values"}
_IN_NAMES = re.compile("qkv|kqv", re.IGNORECASE)


def has_fused(module: nn.Module) -> bool:
    """Return whether a module has a child that is called as a fused weight is."""
    return any(name in _NAMES or _IN_NAMES.search(name) for name, _ in module.named_children())


def fused_heads(module: nn.Module) -> Heads | None:
    """Return the heads of a module with a fused weight, or None where it has none or they are not known."""
    found = _find(module)
    return found and found[2]


def in_fused(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the weights of an attention module with a fused weight, if it is one."""
    found = _find(module)
    if found is None:
        return
    weight, order, heads = found
    if switches.split_heads:
        yield weight.p, rows(order.sizes(heads), each=order.each, times=order.times(heads))
        yield from of_positions(module, heads)
        yield from output_after(module, heads)
    elif switches.split_qkv:
        yield weight.p, merged_rows(order.sizes(heads), times=order.times(heads))


def _find(module: nn.Module) -> tuple[Weight, _Order, Heads] | None:
    """Return the fused weight of a module, the order of its rows and the heads, if the table has its class."""
    for kind in kinds_of(module):
        if kind not in _TABLE:
            continue
        child, order = _TABLE[kind]
        weight, order = weight_of(module, child), order if isinstance(order, _Order) else order(module)
        heads = None if weight is None else heads_of(module, weight.rows, order.heads)
        if weight is not None and heads is not None:
            return weight, order, heads
    return None
