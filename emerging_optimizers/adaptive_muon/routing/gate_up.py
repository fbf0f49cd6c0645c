# SPDX-License-Identifier: Apache-2.0
"""The gate and the up projection of a gated MLP, such as SwiGLU, that are rows of one weight.

As in :mod:`~emerging_optimizers.adaptive_muon.routing.fused`, a table has the classes whose ``forward`` was read.
"""

import re
from collections.abc import Iterator

import torch
from torch import nn

from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.routing.experts import in_experts
from emerging_optimizers.adaptive_muon.routing.parts import Parts, child_of, kinds_of, weight_of
from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks


__all__ = ["GATED_CLASSES", "in_gated", "is_called_gate_up", "may_be_gate_up"]

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
    "transformers.ClvpGatedLinearUnit": "proj",
    **{
        f"transformers.{name}": "linear_1"
        for name in ("AyaVisionMultiModalProjector", "Cohere2VisionMultiModalProjector")
    },
    **{f"transformers.{name}": "fc1" for name in ("MoonshineDecoderMLP", "MoonshineStreamingDecoderMLP")},
}
# Experts in one tensor, with all gates before all up projections.
_CONCATENATED = {
    *("transformers.JetMoeMoE", "transformers.Llama4TextExperts", "transformers.LongcatFlashExperts"),
    "transformers.Step3p7Experts",
}
_OF_AUTOMODEL = {"nemo_automodel.GroupedExperts", "nemo_automodel.GroupedExpertsDeepEP"}
_ACTIVATIONS = {"swiglu": True, "swigluoai": True, "geglu": True, "quick_geglu": False}
GATED_CLASSES = tuple(_TABLE)
# Names that mean a fused gate and up projection, and classes that may have one under another name.
_NAME = re.compile(r"[gG]ate_?(and_?)?[uU]p(?![a-z])|[uU]p_?(and_?)?[gG]ate|^(w12|w13|Wi)$")
_CLASS = re.compile(r"GLU|Glu(?!e)|Gated\w*(MLP|Linear)")


def is_called_gate_up(path: list[str]) -> bool:
    """Return whether the name of a parameter, or of its module, is one of a fused gate and up projection."""
    return any(_NAME.search(part) for part in path[-2:])


def may_be_gate_up(module: nn.Module, p: nn.Parameter) -> bool:
    """Return whether a gated MLP by its class has a weight with twice the rows that the only other one has columns."""
    if not any(_CLASS.search(cls.__name__) for cls in type(module).__mro__):
        return False
    maps = [weight for name, _ in module.named_children() if (weight := weight_of(module, name)) is not None]
    own, others = ([weight for weight in maps if (weight.p is p) is mine] for mine in (True, False))
    return len(own) == 1 and own[0].rows % 2 == 0 and [2 * other.columns for other in others] in ([], [own[0].rows])


def in_gated(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the weights of a gated MLP, or of experts that are one, if a module is one."""
    if not switches.split_gate_up:
        return
    for kind in kinds_of(module):
        weight = weight_of(module, _TABLE[kind]) if kind in _TABLE else None
        if weight is not None and weight.rows % 2 == 0:
            yield weight.p, _parts((weight.rows // 2,) * 2, weight.rows)
    yield from _in_experts(module, switches)


def _in_experts(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the fused gate and up projections of experts in one tensor, if a module has some."""
    is_concatenated = _is_concatenated(module)
    if is_concatenated is None:
        return
    projection = child_of(module, "input_linear")
    for p, (outputs, _), transposed in in_experts(module if projection is None else projection):
        if outputs % 2 == 0:
            # Of a stack that is stored (in, out), and not worked on as its transpose, the outputs are columns.
            as_transposed = _is_tagged(p) or (transposed and switches.stacked_experts)
            sizes = (outputs // 2,) * 2 if is_concatenated else (1, 1)
            yield p, _parts(sizes, outputs, of_rows=transposed is as_transposed)
        return  # the others are projections down


def _is_concatenated(module: nn.Module) -> bool | None:
    """Return whether gates of experts in one tensor precede their up projections, or alternate; None if not known."""
    # What Hugging Face's use_experts_implementation sets.
    said = getattr(module, "is_concatenated", None) if getattr(module, "has_gate", None) is True else None
    if isinstance(said, bool):
        return said
    kinds = {*kinds_of(module)}
    if not kinds.isdisjoint(_OF_AUTOMODEL):
        return _ACTIVATIONS.get(getattr(getattr(module, "config", None), "expert_activation", ""))
    return True if not kinds.isdisjoint(_CONCATENATED) else None


def _is_tagged(p: torch.Tensor) -> bool:
    return bool(getattr(p, "muon_transposed", False))


def _parts(sizes: tuple[int, int], outputs: int, *, of_rows: bool = True) -> Parts:
    """Return the parts of a weight with so many outputs: gate and up projection."""
    half, turns = outputs // 2, ", in turn" if sizes == (1, 1) and outputs > 2 else ""
    text = f"gate and up projection of {half} {'rows' if of_rows else 'columns'} each{turns}"
    return Parts(sizes if of_rows else ColumnBlocks(sizes), text)
