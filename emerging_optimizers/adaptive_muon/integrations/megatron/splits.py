# SPDX-License-Identifier: Apache-2.0
"""The log of which weights of Megatron's models are split, and which are not though a switch is on."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from megatron.core.utils import log_single_rank
from torch import nn

from emerging_optimizers.adaptive_muon.integrations.megatron.layouts import MegatronLayouts
from emerging_optimizers.adaptive_muon.integrations.megatron.routing import is_scalar
from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.routing.linear_maps import adapted
from emerging_optimizers.adaptive_muon.routing.recognizers import is_attention
from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks


__all__ = ["log_once", "log_splits"]


_SWITCHES = ("split_qkv", "split_heads", "split_gate_up")


class _Place(NamedTuple):
    """A matrix of the model, and where it is."""

    p: torch.Tensor
    path: list[str]  # components of its name
    around: list[nn.Module]  # the modules that hold it, the model first


def log_splits(model_chunks: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    """Log how many weights each switch splits by which pattern, and those for which a switch that is on has none.

    Frozen weights, and those of adapters and of the scalar optimizer, are passed over.

    Args:
        model_chunks: The model. Its weights must have their tags.
        arguments: Those of the optimizer.
    """
    layouts = MegatronLayouts(
        arguments["pg_collection"],
        tensor_parallel=arguments.get("tp_mode") != "blockwise",
        is_qkv=None,
        qkv_split_shapes=arguments["qkv_split_shapes"],
        switches=SplitOptions(**{name: arguments[name] for name in _SWITCHES if name in arguments}),
    )
    split: Counter[tuple[str, str, str]] = Counter()
    unrecognized: Counter[tuple[str, str]] = Counter()
    for place in (place for chunk in model_chunks for place in _matrices(chunk)):
        found, name = layouts.split(place.p), ".".join(place.path).removeprefix("module.").removeprefix("module.")
        if found is None:
            like = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            unrecognized.update((switch, like) for switch in _without_pattern(place, layouts.switches))
        elif len(found.blocks.sizes if isinstance(found.blocks, ColumnBlocks) else found.blocks) > 1:
            layer = next((part for part in place.path if part.startswith("linear_")), name)
            split[found.switch, layer, found.text] += 1
    for switch in _SWITCHES:
        of_switch = [f"{number} {layer} ({text})" for (by, layer, text), number in split.items() if by == switch]
        if of_switch:
            log_once(logging.INFO, f"adaptive_muon: {switch} splits {', '.join(of_switch)}")
        left = [f"{number} {name}" for (by, name), number in unrecognized.items() if by == switch]
        if left:
            text = f"adaptive_muon: {switch} does not split {', '.join(left)}; their modules are not recognized"
            log_once(logging.WARNING, text)


@cache
def log_once(level: int, text: str) -> None:
    """Log on one rank, each text once: Megatron makes several optimizers of a model."""
    log_single_rank(logging.getLogger(__name__), level, text)


def _matrices(chunk: nn.Module) -> Iterator[_Place]:
    """Yield the matrices of a model that AdaptiveMuon updates, except those of adapters."""
    modules = dict(chunk.named_modules(remove_duplicate=False))
    for name, p in chunk.named_parameters():
        path, is_embedding = name.split("."), getattr(p, "is_embedding_or_output_parameter", False)
        if p.ndim != 2 or not p.requires_grad or is_embedding or is_scalar(p, name) or adapted(path, modules):
            continue
        yield _Place(p, path, [modules[".".join(path[:at])] for at in range(len(path))])


def _without_pattern(place: _Place, switches: SplitOptions) -> Iterator[str]:
    """Yield the switches that are on, and that are for a weight by where it is, but have no pattern for it."""
    pattern = getattr(place.p, "muon_pattern", None)
    if pattern is not None:  # of a weight that was recognized, and does not fit
        return
    if switches.split_heads:
        if any(map(_is_mixer, place.around)):
            yield "split_heads"
    elif switches.split_qkv and "linear_qkv" in place.path and not getattr(place.p, "is_qkv", False):
        yield "split_qkv"
    gated = any(getattr(getattr(each, "config", None), "gated_linear_unit", False) for each in place.around)
    if switches.split_gate_up and gated and "linear_fc1" in place.path:
        yield "split_gate_up"


def _is_mixer(module: nn.Module) -> bool:
    """Return whether a module is attention, or what stands in its place, such as ``MambaMixer`` or ``GatedDeltaNet``."""
    return hasattr(module, "query_projection_size") or type(module).__name__.endswith("Mixer") or is_attention(module)
