# SPDX-License-Identifier: Apache-2.0
"""Which rows or columns of Megatron's weights are one matrix, by the modules that have them.

Patterns are those of whole matrices. Tensor parallelism cuts them where it does, also within a query group or a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks


__all__ = ["Pattern", "tag_patterns"]


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


def tag_patterns(model_chunks: Sequence[Any]) -> None:
    """Tag the weights of attention and of gated MLPs with their patterns, as ``muon_pattern``."""
    for chunk in model_chunks:
        for module in chunk.modules():
            config = getattr(module, "config", None)
            for name, pattern in (*_in_attention(module, config), *_in_mlp(module, config)):
                for leaf, p in getattr(module, name).named_parameters(recurse=False):
                    if leaf.startswith("weight") and p.ndim == 2:  # weight0, weight1, ... of grouped linear layers
                        p.muon_pattern = pattern


def _in_attention(module: nn.Module, config: Any) -> Iterator[tuple[str, Pattern]]:
    """Yield the names of an attention module's children, and the patterns of their weights."""
    if hasattr(config, "kv_lora_rank") and hasattr(module, "linear_kv_down_proj"):
        yield from _present(module, _of_latent(config))
    elif hasattr(module, "query_projection_size") and hasattr(module, "linear_proj"):
        yield from _present(module, _of_heads(module, config))


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
        "linear_q_up_proj": query,
        "linear_kv_down_proj": down,
        "linear_qkv_down_proj": (config.q_lora_rank or 0, *down),
        "linear_kv_up_proj": (config.qk_head_dim, config.v_head_dim),
        "linear_k_up_proj": (config.qk_head_dim,),
        "linear_v_up_proj": (config.v_head_dim,),
        "linear_proj": (config.v_head_dim,),
    }


def _present(module: nn.Module, sizes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Pattern]]:
    """Yield the patterns of those weights that a module has."""
    for name, of_one in sizes.items():
        if isinstance(getattr(module, name, None), nn.Module):
            yield name, Pattern("split_heads", of_one, of_columns=name == "linear_proj")


def _in_mlp(module: nn.Module, config: Any) -> Iterator[tuple[str, Pattern]]:
    """Yield the name of a gated MLP's first layer, and its pattern: the gate and the up projection of each rank."""
    if not getattr(config, "gated_linear_unit", False) or not isinstance(
        getattr(module, "linear_fc1", None), nn.Module
    ):
        return
    kind, size = type(module).__name__, None
    if "Grouped" in kind:
        size = getattr(config, "moe_mlp_glu_interleave_size", None)
    elif "Shared" in kind and getattr(config, "use_grouped_gemm_for_shared_expert", False):
        size = getattr(config, "moe_shared_expert_glu_interleave_size", None)
    sizes = (size, size) if size else ()  # blocks of gate and up in turn, for fused kernels
    yield "linear_fc1", Pattern("split_gate_up", sizes, is_merged=True)
