# SPDX-License-Identifier: Apache-2.0
"""Which parameters are the weights of linear maps: the only matrices that AdaptiveMuon is for."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


__all__ = [
    "Adapted",
    "LinearMap",
    "adapted",
    "features_of",
    "is_factor",
    "is_linear",
    "is_weight_by_name",
    "linear_map",
    "parametrized",
]

# A weight, one of several (GroupedLinear's weight0), one of a fused layer (in_proj_weight, fc1_weight), or what torch's
# pruning, spectral_norm and weight_norm of old make of a weight.
_WEIGHT = re.compile(r"^(weight\d*|\w+_weight\d*|weight_orig|weight_v)$")
# A word in the name of a weight that is none of a hidden linear map: rel_pos_weight, codebook_weight, lm_head_weight.
_TABLE = re.compile(
    r"(^|_)(heads?|logits?|class|cls|embed|embeddings?|emb|pos|positions?|tokens?|codebooks?|bias|norm)(_|$)"
)
_LORA = re.compile(r"(^|_)lora(_|$)", re.IGNORECASE)
# What adapters call the module that they wrap: peft (adapters, and modules_to_save), NeMo and Megatron Bridge.
_WRAPPED = ("base_layer", "original_module", "to_wrap")
_MERGED_LORA = re.compile(r"^lora_(A|B|a|b|down|up)$")


@dataclass(frozen=True)
class LinearMap:
    """The shape of a linear map, as far as this process has it."""

    outputs: int
    inputs: int
    transposed: bool = False  # stored as (in, out), as Hugging Face's Conv1D does


@dataclass(frozen=True)
class Adapted:
    """What an adapter's parameter adapts: the module, and the path of the module that has the adapter."""

    path: Sequence[str]
    base: nn.Module
    is_wrapped: bool  # the adapter contains the module, as peft's do, which leaves no doubt


def linear_map(module: nn.Module, leaf: str, p: torch.Tensor) -> LinearMap | None:
    """Return the linear map whose weight a parameter is, or None where it is not the weight of one.

    Other packages' modules are recognized by their attributes; none of these packages is imported.

    Args:
        module: The module that has the parameter; of a parametrized weight, the module that was parametrized.
        leaf: The parameter's name in the module.
        p: The parameter, or this process's shard of it.
    """
    if p.ndim != 2:
        return None
    rows, columns = p.shape
    if _is_conv1d(module):
        stored_transposed = _is_weight(leaf) and [rows, columns] == [module.nx, module.nf]
        return LinearMap(columns, rows, transposed=True) if stored_transposed else None
    fits = (
        (leaf == "weight" and isinstance(module, nn.Linear))
        or any(_fits(module, leaf, p, outputs, inputs) for outputs, inputs in features_of(module))
        or _has_its_bias(module, leaf, rows)
        or (isinstance(module, nn.MultiheadAttention) and leaf.endswith("_proj_weight"))
    )
    return LinearMap(rows, columns) if fits else None


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear map, also where its weight is packed and has no rows and columns."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.modules.conv._ConvNd):
        return False
    return isinstance(module, nn.Linear) or _is_conv1d(module) or any(features_of(module))


def is_weight_by_name(name: str) -> bool:
    """Return whether a parameter's name alone lets it pass for the weight of a linear map."""
    *path, leaf = name.split(".")
    if path[-2:-1] == ["parametrizations"]:  # parametrizations.weight.original1
        leaf = path[-1]
    return _is_weight(leaf) or is_factor(leaf) or (leaf != "bias" and is_factor(path[-1] if path else ""))


def is_factor(leaf: str) -> bool:
    """Return whether a name is that of one of LoRA's two factors."""
    return bool(_MERGED_LORA.search(leaf))


def adapted(path: Sequence[str], modules: Mapping[str, nn.Module]) -> Adapted | None:
    """Return what the parameter with this path adapts, or None where it is not an adapter's."""
    for at, part in enumerate(path):
        outer = base = modules[parametrized(".".join(path[:at]))[0]]
        wrapped = _wrapped(base)
        if (wrapped and part != wrapped) or _LORA.search(part):
            while wrapped:  # wrappers may be nested
                base = getattr(base, wrapped)
                wrapped = _wrapped(base)
            return Adapted(path[:at], base, is_wrapped=base is not outer)
    return None


def parametrized(name: str) -> tuple[str, str]:
    """Split the name of a module into that of the module it parametrizes, and the rest; the rest is else empty."""
    outer, found, rest = f".{name}".rpartition(".parametrizations.")
    return (outer.removeprefix("."), rest) if found else (name, "")


def _wrapped(module: nn.Module) -> str | None:
    """Return under which name a module holds the one that it wraps, if it wraps one."""
    return next((name for name in _WRAPPED if isinstance(getattr(module, name, None), nn.Module)), None)


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is Hugging Face's ``Conv1D``, also where ``fully_shard`` has made a subclass of it."""
    by_name = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return by_name and all(isinstance(getattr(module, name, None), int) for name in ("nf", "nx"))


def features_of(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the numbers (outputs, inputs) that a module has as attributes.

    These are two attributes whose names differ in "in" and "out" only: ``in_features`` and ``out_features`` (torch,
    Transformer Engine), ``input_size`` and ``output_size`` (Megatron), ``in_dim`` and ``out_dim``, ``d_in`` and
    ``d_out``, and so on.
    """
    sizes = {name: size for name, size in vars(module).items() if type(size) is int}
    for name, inputs in sizes.items():
        for found in re.finditer("in", name):
            output_name = f"{name[: found.start()]}out{name[found.end() :]}"
            if output_name in sizes:
                yield sizes[output_name], inputs


def _is_weight(leaf: str) -> bool:
    """Return whether a parameter is called as the weight of a linear map is."""
    return bool(_WEIGHT.search(leaf)) and not _TABLE.search(leaf)


def _fits(module: nn.Module, leaf: str, p: torch.Tensor, outputs: int, inputs: int) -> bool:
    """Return whether a parameter of a module with so many outputs and inputs has the name and shape of its weight."""
    rows, columns = p.shape
    if is_factor(leaf):
        return columns == inputs or rows == outputs
    if not _is_weight(leaf) or rows > outputs or columns > inputs:
        return False
    if (rows, columns) == (outputs, inputs):
        return True
    if getattr(p, "partition_dim", -1) >= 0 or getattr(p, "tensor_model_parallel", False):
        return rows == outputs or columns == inputs
    # One of the parts of a fused layer, which make it up together: query_weight, key_weight and value_weight.
    parts = [q for name, q in module.named_parameters(recurse=False) if q.ndim == 2 and _is_weight(name)]
    return all(q.size(1) == inputs for q in parts) and sum(q.size(0) for q in parts) == outputs


def _has_its_bias(module: nn.Module, leaf: str, rows: int) -> bool:
    """Return whether ``fc1_weight`` or the like has its ``fc1_bias`` beside it; of a projection it may be None."""
    if not leaf.endswith("_weight") or not _is_weight(leaf):
        return False
    bias = getattr(module, leaf.removesuffix("weight") + "bias", module)
    if bias is None:
        return leaf.endswith("proj_weight")
    # Transformer Engine has an empty tensor in place of None.
    return isinstance(bias, torch.Tensor) and bias.ndim == 1 and bias.numel() in (0, rows)
