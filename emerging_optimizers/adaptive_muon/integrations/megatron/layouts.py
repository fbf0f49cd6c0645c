# SPDX-License-Identifier: Apache-2.0
"""Which matrices Megatron's parameters have, and how they are split, by the attributes that Megatron sets.

The float32 main parameters of bfloat16 training keep few of their model parameter's attributes; only those are relied
upon, and the model parameter's reference to its main parameter.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from absl import logging
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

from emerging_optimizers.adaptive_muon.integrations.megatron.patterns import Pattern, in_words, weights_of
from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.sharding.agreement import union
from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks
from emerging_optimizers.adaptive_muon.sharding.layout import Layout, Piece, Split


__all__ = ["BlocksBy", "MegatronLayouts", "qkv_split_shapes", "replica_group_of", "tag_qkv"]


@dataclass(frozen=True)
class BlocksBy:
    """The blocks of a weight, and why."""

    switch: str  # the name of the option
    blocks: tuple[int, ...] | ColumnBlocks
    text: str  # the pattern, for a person


@dataclass(eq=False)
class MegatronLayouts:
    """``layout_fn`` and ``blocks_fn`` for Megatron's parameters."""

    # Megatron's, with tp, expt_tp, gtp_remat and expt_gtp_remat. Those that it lacks are taken for groups of one rank.
    pg_collection: Any
    tensor_parallel: bool  # whether tensor-parallel strips make up one matrix; if not, each is a matrix of its own
    is_qkv: Callable[[torch.Tensor], bool] | None  # None for the attribute is_qkv of a fused attention weight
    qkv_split_shapes: Sequence[int] | None  # rows of each block within one query group, where a parameter has none
    switches: SplitOptions

    def __post_init__(self) -> None:
        """Begin without attributes that main parameters lack; they are found as parameters come."""
        self._known: dict[str, MutableMapping[torch.Tensor, Any]] = {}

    def layout(self, p: torch.Tensor) -> Layout | Split | Piece | None:
        """Return how a parameter is split; None where it is a shard and there is no group for it.

        Tensor parallelism splits it along ``partition_dim``; -1 or no such attribute is a whole matrix. Generalized
        tensor parallelism (``is_gtp_weight_remat``) splits what a tensor-parallel rank holds, padded at its end, into
        equal strips of rows.
        """
        for name in ("muon_pattern", "qkv_split_shapes"):
            self._attribute(p, name)  # main parameters come later
        tp, gtp = self._group(p, "tp"), self._group(p, "gtp_remat")
        dim = getattr(p, "partition_dim", None) if self.tensor_parallel else None
        if dim == -1 or (tp is not None and tp.size() == 1):
            dim = None
        if dim is not None and tp is None:
            return None
        if gtp is None or gtp.size() == 1 or not getattr(p, "is_gtp_weight_remat", False):
            return Layout() if dim is None else Split(tp, dim)

        rows, columns = p.shape
        strip = rows * gtp.size() - int(self._attribute(p, "pad_length") or 0)
        top, bottom = (min(row, strip) for row in (rows * gtp.rank(), rows * (gtp.rank() + 1)))
        padding = rows - (bottom - top)
        if dim is None:
            return Piece(gtp, (strip, columns), (top, bottom, 0, columns), padding)
        group = union(gtp, tp)
        if dim == 0:
            above = strip * tp.rank()
            return Piece(group, (strip * tp.size(), columns), (above + top, above + bottom, 0, columns), padding)
        left = columns * tp.rank()
        return Piece(group, (strip, columns * tp.size()), (top, bottom, left, left + columns), padding)

    def blocks(self, p: torch.Tensor) -> Sequence[int] | ColumnBlocks | None:
        """Return the blocks of a weight, or None for one matrix."""
        split = self.split(p)
        return None if split is None else split.blocks

    def split(self, p: torch.Tensor) -> BlocksBy | None:
        """Return the blocks of a weight: of its pattern where a switch is on, else of a fused attention weight.

        A weight whose rows or columns are no whole number of patterns is one matrix, as it is for Megatron.
        """
        pattern: Pattern | None = self._attribute(p, "muon_pattern")
        rows, columns = self._whole(p)
        if pattern is not None and getattr(self.switches, pattern.switch):
            group = self._group(p, "tp") if self.tensor_parallel else None
            blocks = pattern.blocks(rows, columns, 1 if group is None else group.size())
            if blocks is None:
                _warn_of_misfit(rows, columns, pattern.text)
            else:
                return BlocksBy(pattern.switch, blocks, pattern.text)
        of_qkv = self._qkv_blocks(p, rows, columns) if self.switches.split_qkv else None
        return None if of_qkv is None else BlocksBy("split_qkv", of_qkv, f"{in_words(of_qkv)} rows")

    def _qkv_blocks(self, p: torch.Tensor, rows: int, columns: int) -> tuple[int, ...] | None:
        """Return the rows of the blocks within one query group of a fused attention weight; None for other weights."""
        if not (getattr(p, "is_qkv", False) if self.is_qkv is None else self.is_qkv(p)):
            return None
        shapes = self._attribute(p, "qkv_split_shapes") or self.qkv_split_shapes
        if not shapes:
            raise ValueError(
                f"the fused attention weight of shape {tuple(p.shape)} must have the rows of its blocks to be split, got "
                "none. Pass qkv_split_shapes, or split_qkv=False."
            )
        if rows % sum(shapes):
            _warn_of_misfit(rows, columns, f"{in_words(shapes)} rows")
            return None
        return tuple(shapes)

    def _whole(self, p: torch.Tensor) -> tuple[int, int]:
        """Return the rows and columns of the whole weight."""
        spec, (rows, columns) = self.layout(p), p.shape[-2:]
        if isinstance(spec, Piece):
            return spec.whole
        if isinstance(spec, Split):
            ranks = spec.group.size()
            return (rows * ranks, columns) if spec.dim == 0 else (rows, columns * ranks)
        return rows, columns

    def _attribute(self, p: torch.Tensor, name: str) -> Any:
        """Return an attribute of a parameter, or of the model parameter whose main parameter it is; else None."""
        known = self._known.setdefault(name, WeakTensorKeyDictionary())
        if getattr(p, name, None) is not None:
            known[p] = getattr(p, name)
        return _known_of(p, known)

    def _group(self, p: torch.Tensor, name: str) -> Any:
        """Return the process group of this name whose ranks have shards of a parameter, or None."""
        return getattr(self.pg_collection, ("expt_" if getattr(p, "expert_tp", False) else "") + name, None)


def _known_of[Value](p: torch.Tensor, known: Mapping[torch.Tensor, Value]) -> Value | None:
    """Return what is known of a parameter, or of the model parameter whose main parameter it is; else None."""
    if p in known:
        return known[p]
    return next((value for q, value in known.items() if p is getattr(q, "main_param", None)), None)


@cache
def _warn_of_misfit(rows: int, columns: int, sizes: str) -> None:
    """Warn, once for a shape."""
    logging.warning("A weight of %d x %d is no whole number of patterns of %s and is not split.", rows, columns, sizes)


def replica_group_of(
    config: Any, model_chunks: Sequence[Any], pg_collection: Any
) -> Callable[[torch.Tensor], ProcessGroup | None] | None:
    """Return the function for the option ``replica_group``: the data-parallel ranks of a parameter, or of an expert's.

    Return None where ranks are no replicas: Megatron's layer-wise and distributed optimizers share the work in their own
    ways, and without its DistributedDataParallel nothing keeps gradients the same.
    """
    ddp = getattr(model_chunks[0], "ddp_config", None)
    of_megatron = ("use_layer_wise_distributed_optimizer", "use_distributed_optimizer")
    if ddp is None or any(getattr(each, name, False) for each in (config, ddp) for name in of_megatron):
        return None
    if str(config.optimizer).startswith("dist_"):  # Megatron's older name of the layer-wise one
        return None
    experts: MutableMapping[torch.Tensor, bool] = WeakTensorKeyDictionary()  # main parameters of 0.18 are not tagged
    experts.update(
        (p, True) for chunk in model_chunks for p in chunk.parameters() if not getattr(p, "allreduce", True)
    )
    return lambda p: getattr(pg_collection, "expt_dp" if _known_of(p, experts) else "dp_cp", None)


def qkv_split_shapes(model_config: Any) -> list[int]:
    """Return the rows of the queries, of their output gates if there are any, keys and values of one query group."""
    queries = model_config.num_attention_heads // model_config.num_query_groups * model_config.kv_channels
    gates = [queries] if getattr(model_config, "attention_output_gate", False) else []
    return [queries, *gates, model_config.kv_channels, model_config.kv_channels]


def tag_qkv(model_chunks: Sequence[Any]) -> None:
    """Tag all fused attention weights with their blocks.

    Megatron tags only those of which a rank has whole query groups. More tensor-parallel ranks than query groups, or
    GTP, cut within a group. The whole weight has the same blocks then.
    """
    for chunk in model_chunks:
        for module in chunk.modules():
            for p in weights_of(module, "linear_qkv"):
                config = getattr(module, "config", chunk.config)  # a vision encoder's, or one layer's
                p.is_qkv, p.qkv_split_shapes = True, qkv_split_shapes(config)  # type: ignore[attr-defined]
