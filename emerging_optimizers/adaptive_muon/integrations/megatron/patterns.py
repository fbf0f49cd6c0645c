# SPDX-License-Identifier: Apache-2.0
"""Which rows or columns of Megatron's weights are one matrix, by the modules that have them.

Patterns are those of whole matrices. Tensor parallelism cuts them where it does, also within a query group or a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import nn

from emerging_optimizers.adaptive_muon.routing.parts import child_of
from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks


__all__ = ["Pattern", "in_words", "tag_patterns", "weights_of"]


@dataclass(frozen=True)
class Pattern:
    """The sizes of matrices that follow each other in a weight, and that repeat along it."""

    switch: Literal["split_heads", "split_gate_up"]
    sizes: tuple[int, ...] = ()  # empty for the two halves of what each tensor-parallel rank has
    of_columns: bool = False
    is_merged: bool = False  # whether all repetitions of a size are one matrix

    def blocks(self, rows: int, columns: int, ranks: int) -> tuple[int, ...] | ColumnBlocks | None:
        """Return the blocks of a whole weight that so many tensor-parallel ranks have; None where it does not fit."""
        length = columns if self.of_columns else rows
        sizes = self.sizes or (length // (2 * ranks),) * 2
        times, rest = divmod(length, sum(sizes)) if sum(sizes) else (0, 1)
        if rest or not times:
            return None
        blocks = sizes if self.is_merged or not self.sizes else sizes * times
        return ColumnBlocks(blocks) if self.of_columns else blocks

    @property
    def text(self) -> str:
        """The sizes of one repetition, for a person."""
        if not self.sizes:
            return "two halves of each rank's rows"
        return f"{in_words(self.sizes)} {'columns' if self.of_columns else 'rows'}"


def in_words(sizes: Sequence[int]) -> str:
    """Return sizes for a person, as in "32 + 2 x 8"."""
    runs = ((size, len([*run])) for size, run in groupby(sizes))
    return " + ".join(f"{times} x {size}" if times > 1 else f"{size}" for size, times in runs)


def weights_of(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """Yield the matrices of a child, also of one that is wrapped: one, or weight0, weight1, ... of grouped layers."""
    child = child_of(module, name)
    if child is not None:
        named = child.named_parameters(recurse=False)
        yield from (p for leaf, p in named if leaf.startswith("weight") and p.ndim == 2)


def tag_patterns(model_chunks: Sequence[Any]) -> None:
    """Tag the weights of attention and of gated MLPs with their patterns, as ``muon_pattern``."""
    for chunk in model_chunks:
        for module in chunk.modules():
            config = getattr(module, "config", None)
            for name, pattern in (*_in_attention(module, config), *_in_mlp(module, config)):
                for p in weights_of(module, name):
                    p.muon_pattern = pattern  # type: ignore[attr-defined]


def _in_attention(module: nn.Module, config: Any) -> Iterator[tuple[str, Pattern]]:
    """Yield the names of an attention module's children, and the patterns of their weights."""
    if hasattr(config, "kv_lora_rank") and hasattr(module, "linear_kv_down_proj"):
        yield from _as_patterns(_of_latent(config))
    elif hasattr(module, "query_projection_size") and hasattr(module, "linear_proj"):
        yield from _as_patterns(_of_heads(module, config))


def _of_heads(module: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the patterns of multi-head attention and of grouped queries."""
    size = module.hidden_size_per_attention_head
    queries = module.query_projection_size // module.kv_projection_size
    gates = queries if getattr(config, "attention_output_gate", False) else 0
    return {
        "linear_qkv": (size,) * (queries + gates + 2),
        "linear_q": (size,),
        "linear_kv": (size, size),
        "linear_proj": (size,),
    }


def _of_latent(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the patterns of multi-head latent attention.

    The projection down has the rows of the latent vector and those of the key with positions, which all heads share.
    """
    query = (config.qk_head_dim + config.qk_pos_emb_head_dim,)
    down = (config.kv_lora_rank, config.qk_pos_emb_head_dim)
    return {
        "linear_q_proj": query,
        "linear_q_down_proj": (config.q_lora_rank or 0,),
        "linear_q_up_proj": query,
        "linear_kv_down_proj": down,
        "linear_qkv_down_proj": (config.q_lora_rank or 0, *down),
        "linear_kv_up_proj": (config.qk_head_dim, config.v_head_dim),
        "linear_k_up_proj": (config.qk_head_dim,),
        "linear_v_up_proj": (config.v_head_dim,),
        "linear_proj": (config.v_head_dim,),
    }


def _as_patterns(sizes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Pattern]]:
    """Yield the patterns of these sizes; the columns of the output projection are split, and the rows of others."""
    for name, of_one in sizes.items():
        yield name, Pattern("split_heads", of_one, of_columns=name == "linear_proj")


def _in_mlp(module: nn.Module, config: Any) -> Iterator[tuple[str, Pattern]]:
    """Yield the name of a gated MLP's first layer, and its pattern: the gate and the up projection of each rank."""
    if not getattr(config, "gated_linear_unit", False):
        return
    kind, size = type(module).__name__, None
    if "Grouped" in kind:
        size = getattr(config, "moe_mlp_glu_interleave_size", None)
    elif "Shared" in kind and getattr(config, "use_grouped_gemm_for_shared_expert", False):
        size = getattr(config, "moe_shared_expert_glu_interleave_size", None)
    sizes = (size, size) if size else ()  # blocks of gate and up in turn, for fused kernels
    yield "linear_fc1", Pattern("split_gate_up", sizes, is_merged=True)
