# SPDX-License-Identifier: Apache-2.0
"""Which parameter goes to AdaptiveMuon, which to AdamW, and why."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from emerging_optimizers.adaptive_muon.checks import require, require_one_of
from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.parameters import (
    FormT,
    check_rows_and_columns,
    is_matrix,
    unusable_form,
    use_muon_of,
)
from emerging_optimizers.adaptive_muon.routing.experts import find_routers, is_called_expert, is_called_router
from emerging_optimizers.adaptive_muon.routing.forms import EXPERTS, Form, find_forms
from emerging_optimizers.adaptive_muon.routing.gate_up import is_called_gate_up, may_be_gate_up
from emerging_optimizers.adaptive_muon.routing.heads import (
    find_heads,
    head_by_name,
    is_embedding,
    networks_in,
    table_by_name,
)
from emerging_optimizers.adaptive_muon.routing.linear_maps import (
    Adapted,
    LinearMap,
    adapted,
    is_factor,
    is_linear,
    is_weight_by_name,
    linear_map,
    parametrized,
)
from emerging_optimizers.adaptive_muon.routing.parts import Parts
from emerging_optimizers.adaptive_muon.routing.recognizers import Found, find_parts, is_attention


__all__ = [
    "NOT_A_MAP",
    "SHARED",
    "STACK",
    "UNSPLIT",
    "UNSTACKED",
    "AlgorithmT",
    "Route",
    "plain_names",
    "route_model",
    "route_parameter",
    "unwrapped",
]

AlgorithmT = Literal["adaptive_muon", "adamw"]

# Beginnings of the reasons that HybridAdaptiveMuon.describe() counts.
NOT_A_MAP = "two-dimensional, but not the weight of a linear map"
STACK = "3-D, not a matrix; if it is a stack of matrices (experts)"
UNSPLIT = "not split, the module is not recognized; set its muon_blocks if it holds several matrices"
SHARED = "not split, layers that share it use it as other matrices; set its muon_blocks to decide"
UNSTACKED = "not taken for experts, stacked_experts does not recognize the module"

# What wrappers put into names: torch.compile, FSDP, activation checkpointing and Lightning Fabric.
_WRAPPERS = {
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_original_module"),
}
# Wrappers that call what they wrap "module" or "_module", by their class or a base of it.
_HOLDERS = {
    *("DataParallel", "DistributedDataParallel", "AveragedModel", "QuantWrapper"),  # torch's
    *("DeepSpeedEngine", "Float16Module", "MegatronFSDP"),
    *("GradSampleModule", "DifferentiallyPrivateDistributedDataParallel"),  # Opacus's
}


@dataclass(frozen=True)
class Route:
    """Where a parameter goes and why.

    Args:
        algorithm: "adaptive_muon" or "adamw".
        reason: The rule that decided, in words.
        transposed: Whether the matrix is stored as (in, out) instead of (out, in).
        parts: The matrices that it holds, if it is more than one or was looked at.
        unsplit: Why a switch that is on does not split it, though it may be for it.
        form: What it is taken for, if it has more than two dimensions.
    """

    algorithm: AlgorithmT
    reason: str
    transposed: bool = False
    parts: Parts | None = None
    unsplit: str = ""
    form: FormT | None = None

    @property
    def text(self) -> str:
        """The reason, and what is known of the matrices that the parameter holds."""
        return "; ".join(filter(None, [self.reason, self.parts.text if self.parts else "", self.unsplit]))


@dataclass(frozen=True)
class _Findings:
    """What a model's modules show of its parameters."""

    heads: Mapping[nn.Module, str]  # the output heads, with the reason
    routers: Collection[nn.Module]  # what chooses among experts
    tables: Collection[torch.Tensor]  # the weights of embeddings
    networks: Collection[tuple[str, ...]]  # paths of modules that are no heads
    forms: Mapping[nn.Parameter, Form]  # what switches take for a matrix, or for several
    reasons: Mapping[nn.Parameter, str]  # why others of more than two dimensions are no matrices


@dataclass(frozen=True)
class _Use:
    """One place of a model where a parameter is."""

    path: list[str]  # components of its name, without those of wrappers
    wrapped_path: list[str]  # all components of its name
    module: nn.Module  # which has it; of a parametrized weight, the module that was parametrized
    around: list[nn.Module]  # the modules around it, the above included
    modules: list[nn.Module]  # the model, then the module of each component of the path
    map: LinearMap | None  # whose weight it is there, if it is one
    adapts: Adapted | None  # what it adapts there, if it is an adapter's

    @property
    def down_to_owner(self) -> list[nn.Module]:
        """The modules without what a parametrization adds below the module that was parametrized."""
        end = self.modules.index(self.module) + 1 if self.module in self.modules else len(self.modules)
        return self.modules[:end]

    @property
    def name(self) -> str:
        """The dotted name without the components of wrappers."""
        return ".".join(self.path)

    @property
    def names(self) -> set[str]:
        """The dotted names with and without the components of wrappers."""
        return {self.name, ".".join(self.wrapped_path)}


def route_parameter(p: torch.Tensor, name: str = "") -> Route:
    """Route a parameter by itself: by its tag, its shape and dtype and, where there is one, its name.

    Args:
        p: The parameter. ``p.use_muon`` decides before all else, where AdaptiveMuon can take the parameter.
            ``p.is_embedding_or_output_parameter`` sends it to AdamW. Both are Megatron's tags.
        name: Its dotted name in the model. A matrix that has a name goes to AdaptiveMuon only if it is called as the
            weight of a linear map is: ``weight``, ``weight0``, ``in_proj_weight``, ``lora_A``.

    Raises:
        ValueError: If the parameter has no shape yet (a lazy module before its first forward), or no rows and columns
            any more (FSDP1, ZeRO stage 3).
    """
    route = _route_by_choice(p, name) or _route_by_itself(p, [name])
    if route is not None:
        return route
    path = name.split(".")[:-1]
    table = "router" if is_called_router(path) else table_by_name(path)
    if _is_tagged(p) or not name or (not table and is_weight_by_name(name)):
        return _to_muon(p)
    reason = f"{table} by its name" if table else NOT_A_MAP
    return Route("adamw", f"{reason}; to override, set 'use_muon': True in its group")


def route_model(
    model: nn.Module,
    routes: Mapping[str, AlgorithmT] | None = None,
    switches: SplitOptions | None = None,
    *,
    partly: bool = False,
) -> list[tuple[str, nn.Parameter, Route]]:
    """Route all parameters of a model by the modules that own them, then each by itself.

    Args:
        model: The model.
        routes: Name pattern to algorithm, see :meth:`~emerging_optimizers.adaptive_muon.HybridAdaptiveMuon.from_model`.
        switches: Which weights are to be split into the matrices that they hold. Default: as SplitOptions has it.
        partly: Whether patterns may match no parameter.

    Returns:
        Name, parameter and route of each parameter, once each, in the model's order. Names are those of the model
        without its wrappers.

    Raises:
        ValueError: If a pattern matches no parameter or names no algorithm, or a parameter has no rows and columns.
    """
    uses = _uses(model)
    for p, places in uses.items():
        if not is_lazy(p):
            check_rows_and_columns(p, places[0].name)
    all_names = {name for places in uses.values() for use in places for name in use.names}
    patterns = _resolved(routes or {}, all_names, partly=partly)
    switches = switches or SplitOptions()
    findings, parts = _findings(model, uses, switches), find_parts(model, switches)
    routed = []
    for p, places in uses.items():
        names = {name for use in places for name in use.names}
        for pattern, matching, algorithm in patterns:
            if any(fnmatchcase(name, matching) for name in names):
                reason = findings.reasons.get(p, "")
                require(
                    algorithm == "adamw" or not reason or is_matrix(p),
                    f'what routes[{pattern!r}] gives to "adaptive_muon" must be a matrix, or several',
                    f"{places[0].name} ({reason})",
                    'Give it to "adamw" by a pattern before this one.',
                )
                route = Route(algorithm, f"pattern {pattern!r}")
                break
        else:
            route = _route_in_model(p, places, findings)
        to_muon, form = route.algorithm == "adaptive_muon", findings.forms.get(p)
        if any(use.map and use.map.transposed for use in places) or (to_muon and form and form.transposed):
            route = replace(route, reason=route.reason + (", stored (in, out)" if to_muon else ""), transposed=True)
        if to_muon:
            route = replace(route, form=None if form is None else form.kind)
            route = _with_parts(route, p, places, parts, switches)
        elif switches.stacked_experts and route.reason.startswith(STACK) and _is_called_expert(places):
            route = replace(route, unsplit=UNSTACKED)
        routed.append((places[0].name, p, route))
    return routed


def _findings(model: nn.Module, uses: Mapping[nn.Parameter, Sequence[_Use]], switches: SplitOptions) -> _Findings:
    """Return what a model's modules show of its parameters, which have these places."""
    forms, reasons = find_forms(model, switches)
    networks = networks_in((use.path[:-1], use.modules) for use in chain(*uses.values()))

    def maps() -> Iterator[tuple[list[str], nn.Module, LinearMap]]:
        for p, places in uses.items():
            flat = LinearMap(*forms[p].shape) if p in forms and forms[p].kind == "flattened" else None
            for use in places:
                map_ = use.map or flat
                if map_ and not use.adapts:
                    yield use.path[:-1], use.module, map_

    heads = find_heads(model, maps(), networks)
    tables = {p for p, places in uses.items() if any(is_embedding(use.module) for use in places)}
    return _Findings(heads, find_routers(model), tables, networks, forms, reasons)


def plain_names(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return name and parameter of each parameter of a model, once each, as :func:`route_model` does."""
    return [(places[0].name, p) for p, places in _uses(model).items()]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without the wrappers around all of it, such as ``torch.compile`` and DistributedDataParallel."""
    while part := next((name for name, _ in model.named_children() if _is_wrapper(model, name)), None):
        model = getattr(model, part)
    return model


def _resolved(
    routes: Mapping[str, AlgorithmT], names: Collection[str], *, partly: bool
) -> list[tuple[str, str, AlgorithmT]]:
    """Return each pattern, the form of it that matches, and its algorithm.

    A pattern that names wrappers matches a model with the same wrappers or, failing that, with others or none.
    """
    require(
        isinstance(routes, Mapping),
        'routes must be a mapping of patterns to "adaptive_muon" or "adamw"',
        routes,
        'Use {"decoder.*": "adamw"}.',
    )
    resolved = []
    for pattern, algorithm in routes.items():
        require_one_of(f"routes[{pattern!r}]", algorithm, ("adaptive_muon", "adamw"))
        forms = [pattern, *_without_wrappers(pattern)]
        form = next((form for form in forms if any(fnmatchcase(name, form) for name in names)), None)
        require(
            form is not None or partly,
            "a pattern of routes must match a parameter",
            pattern,
            "Print the names with [name for name, _ in model.named_parameters()].",
        )
        if form is not None:
            resolved.append((pattern, form, algorithm))
    return resolved


def _without_wrappers(pattern: str) -> Iterator[str]:
    """Yield a pattern without the components of wrappers, then also without each leading "module"."""
    parts = [part for part in pattern.split(".") if part not in _WRAPPERS]
    yield ".".join(parts)
    while parts[0] in ("module", "_module") and len(parts) > 1:
        parts = parts[1:]
        yield ".".join(parts)


def _uses(model: nn.Module) -> dict[nn.Parameter, list[_Use]]:
    """Return every parameter with all its places: several where it, or its module, is shared."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[nn.Parameter, list[_Use]] = {}
    for prefix, module in modules.items():
        parts = prefix.split(".") if prefix else []
        around = [modules[".".join(parts[:at])] for at in range(len(parts) + 1)]
        plain = [
            (part, inner)
            for part, outer, inner in zip(parts, around, around[1:], strict=False)
            if not _is_wrapper(outer, part)
        ]
        path = [part for part, _ in plain]
        for leaf, p in module.named_parameters(recurse=False, remove_duplicate=False):
            owner, leaf_there = _owner(prefix, leaf, modules)
            use = _Use(
                path=[*path, leaf],
                wrapped_path=[*parts, leaf],
                module=owner,
                around=[*around, owner],
                modules=[around[0], *(inner for _, inner in plain)],
                map=None if is_lazy(p) else linear_map(owner, leaf_there, p),
                adapts=adapted([*parts, leaf], modules),
            )
            uses.setdefault(p, []).append(use)
    return uses


def _is_wrapper(outer: nn.Module, part: str) -> bool:
    """Return whether a component of a name comes from a wrapper. A user's own ``module`` does not."""
    if part in ("module", "_module"):
        return any(cls.__name__ in _HOLDERS for cls in type(outer).__mro__)
    return part in _WRAPPERS


def _owner(prefix: str, leaf: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module, str]:
    """Return the module that has a parameter, and its name there; of a parametrized weight, those of the weight."""
    outer, rest = parametrized(prefix)
    weight, _, index = rest.partition(".")
    if isinstance(modules[prefix], ParametrizationList):
        return modules[outer], weight
    around, _, part = prefix.rpartition(".")
    if isinstance(modules[prefix], nn.ParameterDict) and is_factor(part):  # AdaLoRA's lora_A.default
        return modules[around], part
    if index.isdigit():  # a parametrization with parameters of its own, such as LoRA's factors
        return modules[outer], leaf
    return modules[prefix], leaf


def _route_in_model(p: nn.Parameter, places: list[_Use], findings: _Findings) -> Route:
    """Return the route that its ``use_muon``, the modules around a parameter or else its other tags and shape decide."""
    form, no_matrix = findings.forms.get(p), findings.reasons.get(p, "")
    chosen = _route_by_choice(p, places[0].name, form)
    if chosen is not None:
        return chosen
    for use in places:
        reason = _reason_of_place(use, findings)
        if reason:
            tied = reason == "embedding" and len({use.name for use in places}) > 1
            return Route("adamw", reason + (", tied" if tied else ""))
    name = places[0].name
    route = _route_by_itself(p, [use.name for use in places], findings.networks, form, no_matrix)
    if route is not None:
        return route
    if any(use.map for use in places) or form or _is_tagged(p):
        return _to_muon(p, form)
    return Route("adamw", f"{NOT_A_MAP}; to override, pass routes={{{name!r}: 'adaptive_muon'}}")


def _is_called_expert(places: list[_Use]) -> bool:
    return any(is_called_expert(use.path, use.module) for use in places)


def _with_parts(
    route: Route, p: nn.Parameter, places: list[_Use], parts: Mapping[nn.Parameter, Found], switches: SplitOptions
) -> Route:
    """Return a route with what is known of the matrices that its parameter holds."""
    if getattr(p, "muon_blocks", None) is not None:  # which decide before
        return route
    if p in parts:
        found = parts[p]
        elsewhere = any(use.map and set(found.modules).isdisjoint(use.around) for use in places)
        agree = found.agree and not (elsewhere and found.parts[0].blocks)
        return replace(route, parts=found.parts[0]) if agree else replace(route, unsplit=SHARED)
    near = [module for use in places for module in use.down_to_owner[-3:]]
    may_be_heads = switches.split_heads and any(map(is_attention, near))
    may_be_gated = switches.split_gate_up and (
        any(is_called_gate_up(use.path) for use in places) or any(may_be_gate_up(module, p) for module in near)
    )
    return replace(route, unsplit=UNSPLIT) if may_be_heads or may_be_gated else route


def _reason_of_place(use: _Use, findings: _Findings) -> str | None:
    """Return the reason for which the modules around a parameter send it to AdamW, if they do."""
    heads = findings.heads
    head = next((heads[module] for module in use.around if module in heads), None)
    if head:
        return head
    if any(module in findings.routers for module in use.around):
        return "router"
    if use.adapts:
        base = use.adapts.base
        if is_embedding(base) or getattr(base, "weight", None) in findings.tables:
            return "adapter of an embedding"
        path = [part for part in use.adapts.path if part not in _WRAPPERS]
        if base in heads or head_by_name(path, networks=findings.networks):
            return "adapter of an output head"
        if use.adapts.is_wrapped and not is_linear(base):
            return _reason_of_adapter(base, findings)
    kind = type(use.module).__name__
    if isinstance(use.module, nn.Linear):  # also a LayerNormLinear
        return None
    if is_embedding(use.module):
        return "embedding"
    if re.search(r"Norm(\dd)?$", kind):
        return f"norm, {kind}"
    if isinstance(use.module, nn.RNNBase | nn.RNNCellBase):
        return f"recurrent, {kind}"
    return None


def _reason_of_adapter(base: nn.Module, findings: _Findings) -> str | None:
    """Return the reason for which the adapter of what is no linear layer goes to AdamW; None if that is a matrix."""
    own, adapter = [*base.parameters(recurse=False)], f"adapter of {type(base).__name__}"
    kinds = {findings.forms[p].kind for p in own if p in findings.forms}
    reasons = [findings.reasons[p] for p in own if p in findings.reasons]
    if "stack" in kinds or EXPERTS in reasons:
        return f"{adapter}, a stack of linear maps and not one"
    return None if kinds else f"{adapter}, {(reasons or ['which is not a linear map'])[0]}"


def _route_by_choice(p: torch.Tensor, name: str, form: Form | None = None) -> Route | None:
    """Return the route that the attribute ``use_muon`` decides; None without it, or where AdaptiveMuon cannot do it."""
    use_muon = use_muon_of(p, name)
    if use_muon is None or (use_muon and (is_lazy(p) or _why_unusable(p, form))):
        return None
    return Route("adaptive_muon" if use_muon else "adamw", f"its attribute use_muon={use_muon}")


def _route_by_itself(
    p: torch.Tensor,
    names: Sequence[str],
    networks: Collection[tuple[str, ...]] = (),
    form: Form | None = None,
    no_matrix: str = "",
) -> Route | None:
    """Return the route that a parameter's tags, shape, dtype and names decide, if they do."""
    require(
        not is_lazy(p),
        "a parameter must have a shape to be routed",
        names[0] or "an uninitialized parameter",
        "Run the model once before making the optimizer.",
    )
    check_rows_and_columns(p, names[0] or "a parameter")
    if getattr(p, "is_embedding_or_output_parameter", False):
        return Route("adamw", "tagged as embedding or output")
    reason = _why_unusable(p, form, no_matrix)
    if reason:
        return Route("adamw", reason)
    paths = (name.split(".")[:-1] for name in names)
    head = next(filter(None, (head_by_name(path, networks=networks) for path in paths)), None)
    return Route("adamw", f"output head by its name, {head!r}") if head else None


def _why_unusable(p: torch.Tensor, form: Form | None = None, no_matrix: str = "") -> str | None:
    """Return the reason for which AdaptiveMuon cannot take a parameter, if there is one.

    A parameter of more than two dimensions has a form if it is taken for a matrix, and else perhaps a reason why not.
    """
    if form is None and not is_matrix(p):
        is_stack = p.ndim == 3 and min(p.shape) > 1
        return no_matrix or (f"{STACK}, set its muon_stacked = True" if is_stack else f"{p.ndim}-D, not a matrix")
    if unusable := unusable_form(p):
        return f"{unusable}, which AdaptiveMuon does not take"
    shape = tuple(p.shape[-2:]) if form is None else form.shape
    # Of a dimension that is split, the size at hand says nothing.
    split = getattr(p, "partition_dim", None)
    if any(size == 1 for dim, size in enumerate(shape, start=p.ndim - 2) if dim != split):
        return "a single row or column"
    return None


def _is_tagged(p: torch.Tensor) -> bool:
    """Return whether a parameter has an attribute that only AdaptiveMuon reads."""
    return p.ndim == 3 or getattr(p, "muon_blocks", None) is not None or bool(getattr(p, "muon_transposed", False))


def _to_muon(p: torch.Tensor, form: Form | None = None) -> Route:
    """Return the route of a matrix, or of a stack of them."""
    if form is not None:
        return Route("adaptive_muon", form.text)
    return Route("adaptive_muon", "hidden matrix" if p.ndim == 2 else "stack of hidden matrices")
