# SPDX-License-Identifier: Apache-2.0
"""The gate and the up projection of a gated MLP, such as SwiGLU, that are rows of one weight.

As in :mod:`~emerging_optimizers.adaptive_muon.routing.fused`, a table has the classes whose ``forward`` was read.
"""

from collections.abc import Iterator

import torch
from torch import nn

from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.routing.parts import Parts, kinds_of, weight_of
from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks


__all__ = ["GATED_CLASSES", "in_gated", "is_called_gate_up"]

# The child whose rows are two halves, by the package and the class.
_TABLE = {
    **{
        f"transformers.{name}": "gate_up_proj"
        for name in (
            *("DiaMLP", "EsmFold2SwiGLU", "Glm4MLP", "Glm4vTextMLP", "GlmImageTextMLP", "GlmMLP", "GlmOcrTextMLP"),
            *("MiniMaxM3VLDenseMLP", "Phi3MLP", "Phi4MultimodalAudioMLP", "Phi4MultimodalMLP"),
            "Zamba2MLP",
        )
    },
    **{f"transformers.{name}": "Wi" for name in ("ModernBertDecoderMLP", "ModernBertMLP")},
    **{
        f"transformers.{name}": "input_linear"
        for name in ("GraniteMoeHybridMLP", "GraniteMoeSWAMLP", "GraniteMoeSharedMLP")
    },
    **{f"transformers.{name}": "fc1" for name in ("MoonshineDecoderMLP", "MoonshineStreamingDecoderMLP")},
}
GATED_CLASSES = tuple(_TABLE)
_NAMES = {"gate_up_proj", "gate_up", "up_gate_proj", "gate_and_up_projs", "gate_and_up_proj", "w12", "w13", "Wi"}


def is_called_gate_up(path: list[str]) -> bool:
    """Return whether the name of a parameter, or of its module, is one of a fused gate and up projection."""
    return not _NAMES.isdisjoint(path[-2:])


def in_gated(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the weights of a gated MLP, or of experts that are one, if a module is one."""
    if not switches.split_gate_up:
        return
    for kind in kinds_of(module):
        weight = weight_of(module, _TABLE[kind]) if kind in _TABLE else None
        if weight is not None and weight.rows % 2 == 0:
            yield weight.p, _parts((weight.rows // 2,) * 2, weight.rows)
    experts = getattr(module, "gate_up_proj", None)
    # What Hugging Face's use_experts_implementation sets, of experts in one tensor.
    layout = [getattr(module, name, None) for name in ("has_gate", "is_concatenated", "is_transposed")]
    if isinstance(experts, nn.Parameter) and experts.ndim == 3 and layout[0] is True and None not in layout:
        _, is_concatenated, is_transposed = layout
        outputs = experts.size(-1 if is_transposed else -2)
        if outputs % 2 == 0:
            sizes = (outputs // 2,) * 2 if is_concatenated else (1, 1)
            # Of a stack that is stored (in, out) and not tagged so, the outputs are columns.
            yield experts, _parts(sizes, outputs, of_rows=is_transposed is _is_tagged(experts))


def _is_tagged(p: torch.Tensor) -> bool:
    return bool(getattr(p, "muon_transposed", False))


def _parts(sizes: tuple[int, int], outputs: int, *, of_rows: bool = True) -> Parts:
    """Return the parts of a weight with so many outputs: gate and up projection."""
    half, turns = outputs // 2, ", in turn" if sizes == (1, 1) and outputs > 2 else ""
    text = f"gate and up projection of {half} {'rows' if of_rows else 'columns'} each{turns}"
    return Parts(sizes if of_rows else ColumnBlocks(sizes), text)
