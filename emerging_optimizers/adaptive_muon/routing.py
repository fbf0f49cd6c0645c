# SPDX-License-Identifier: Apache-2.0
"""Which parameter goes to AdaptiveMuon, which to AdamW, and why."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from emerging_optimizers.adaptive_muon.checks import require, require_one_of
from emerging_optimizers.adaptive_muon.parameters import is_matrix


__all__ = ["AlgorithmT", "Route", "route_model", "route_parameter"]

AlgorithmT = Literal["adaptive_muon", "adamw"]

# Components of a parameter's name that usually mean an output head.
_HEADS = {
    "qa_outputs",
    "lm_head",
    "head",
    "output_layer",
    "output_projection",
    "classifier",
    "embed_out",
    "unembed",
    "logits",
    "score",
}
# What wrappers put into names: torch.compile, FSDP and activation checkpointing.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Parts of a parameter's own name that mean a two-dimensional bias (pos_bias_u) or a table (pos_embed).
_TABLES = ("bias", "embed", "token")


@dataclass(frozen=True)
class Route:
    """Where a parameter goes and why.

    Args:
        algorithm: "adaptive_muon" or "adamw".
        reason: The rule that decided, in words.
    """

    algorithm: AlgorithmT
    reason: str


def route_parameter(p: torch.Tensor, name: str = "") -> Route:
    """Routes a parameter by itself: by its tag, its shape and, where there is one, its name.

    Args:
        p: The parameter. ``p.is_embedding_or_output_parameter``, Megatron's tag, sends it to AdamW.
        name: Its dotted name in the model.

    Raises:
        ValueError: If the parameter has no shape yet (a lazy module before its first forward), or none any more (FSDP1).
    """
    require(
        not is_lazy(p),
        "a parameter must have a shape to be routed",
        name or "an uninitialized parameter",
        "run the model once before making the optimizer",
    )
    require(
        not getattr(p, "_fsdp_flattened", False),
        "a parameter must keep its rows and columns to be routed",
        f"{name or 'a parameter'} flattened by FullyShardedDataParallel",
        "use FSDP2, torch.distributed.fsdp.fully_shard",
    )
    *path, leaf = name.split(".")
    if getattr(p, "is_embedding_or_output_parameter", False):
        return Route("adamw", "tagged as embedding or output")
    if not is_matrix(p):
        return Route("adamw", f"{p.ndim}-D, not a matrix")
    if not (p.is_floating_point() or p.is_complex()):
        return Route("adamw", f"{p.dtype}, without gradients")
    # Of a dimension that is split, the size at hand says nothing.
    if any(p.size(dim) == 1 for dim in (p.ndim - 2, p.ndim - 1) if dim != getattr(p, "partition_dim", -1)):
        return Route("adamw", "a single row or column")
    if head := next((part for part in path if part in _HEADS), None):
        return Route("adamw", f"output head by its name, {head!r}")
    if any(word in leaf for word in _TABLES):
        return Route("adamw", f"bias or table by its name, {leaf!r}")
    return Route("adaptive_muon", "hidden matrix" if p.ndim == 2 else "stack of hidden matrices")


def route_model(
    model: nn.Module, routes: Mapping[str, AlgorithmT] | None = None
) -> list[tuple[str, nn.Parameter, Route]]:
    """Routes all parameters of a model by the modules that own them, then each by itself.

    Args:
        model: The model.
        routes: Name pattern (as in ``fnmatch``, matched against the parameter's dotted name) to algorithm, before all
            other rules; the first pattern that matches wins.

    Returns:
        Name, parameter and route of each parameter, once each, in the model's order.

    Raises:
        ValueError: If a pattern matches no parameter or names no algorithm.
    """
    routes = dict(routes or {})
    owners = _owners(model)
    heads = _heads(model)
    names = {name for of_parameter in owners.values() for name, _ in of_parameter}
    for pattern, algorithm in routes.items():
        require_one_of(f"routes[{pattern!r}]", algorithm, ("adaptive_muon", "adamw"))
        require(
            any(fnmatchcase(name, pattern) for name in names),
            "a pattern of routes must match a parameter",
            pattern,
            "print the names with [name for name, _ in model.named_parameters()]",
        )
    routed = []
    for p, of_parameter in owners.items():
        chosen = next((key for key in routes if any(fnmatchcase(name, key) for name, _ in of_parameter)), None)
        if chosen is not None:
            route = Route(routes[chosen], f"pattern {chosen!r}")
        else:
            route = _route_by_modules([module for _, module in of_parameter], heads) or route_parameter(
                p, of_parameter[0][0]
            )
        routed.append((of_parameter[0][0], p, route))
    return routed


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module]]]:
    """Every parameter with all its names and the modules that hold it: several where it, or its module, is shared."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    owners: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        owner = module
        if isinstance(module, ParametrizationList):  # holds what its owner computes the weight from
            owner = model.get_submodule(prefix.rpartition("parametrizations.")[0].removesuffix("."))
        path = [part for part in prefix.split(".") if part and part not in _WRAPPERS]
        for leaf, p in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(p, []).append((".".join([*path, leaf]), owner))
    return owners


def _route_by_modules(modules: list[nn.Module], heads: dict[nn.Module, str]) -> Route | None:
    """The route that the modules holding a parameter decide, if they do."""
    for module in modules:
        kind = type(module).__name__
        if module in heads:
            return Route("adamw", heads[module])
        if isinstance(module, nn.Linear):  # also a LayerNormLinear or an EmbeddingProjection
            continue
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or kind.endswith("Embedding"):
            return Route("adamw", "embedding" if len(modules) == 1 else "embedding, tied")
        if re.search(r"Norm(\dd)?$", kind):
            return Route("adamw", f"norm, {kind}")
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return Route("adamw", f"recurrent, {kind}")
    return None


def _heads(model: nn.Module) -> dict[nn.Module, str]:
    """Output heads that the model itself shows, with the reason."""
    heads: dict[nn.Module, str] = {}
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)  # Hugging Face's
        with suppress(NotImplementedError):
            head = ask() if callable(ask) else None
            if isinstance(head, nn.Module):
                heads[head] = "output head by get_output_embeddings()"
    # An untied head stands last and has the shape of an embedding; where that is square, any layer may have it.
    tables = {m.weight.shape for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shape = linears[-1].weight.shape if linears else torch.Size()
    if shape in tables and len(set(shape)) == 2:
        for module in takewhile(lambda module: module.weight.shape == shape, reversed(linears)):
            heads.setdefault(module, f"output head by its shape, {shape[0]} x {shape[1]} as an embedding")
    return heads
