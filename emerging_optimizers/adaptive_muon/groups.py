# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of HybridAdaptiveMuon: read, routed and split in two where they hold both kinds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, override
from weakref import ref

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon.checks import require, within
from emerging_optimizers.adaptive_muon.routing import AlgorithmT, Route, plain_names, route_parameter, unwrapped


__all__ = [
    "ModelRoutes",
    "as_groups",
    "check_scalar",
    "entries_of",
    "in_model",
    "listed",
    "present_routes",
    "split",
    "tag_transposed",
    "with_names",
]

_SCALAR_KEYS = ("scalar_lr", "scalar_eps", "scalar_weight_decay")
# Keys by which loggers tell groups apart: Lightning's LearningRateMonitor refuses two groups of one name.
_IDENTIFIERS = ("name", "group_name")


class ModelRoutes:
    """The routes of a model's parameters, by name: a parameter that is replaced under its name keeps its route.

    It keeps neither the model nor its parameters alive; a copy of it, by pickle or deepcopy, keeps the parameters.

    Args:
        model: The model.
        routed: What :func:`~emerging_optimizers.adaptive_muon.routing.route_model` returned for it.
    """

    def __init__(self, model: nn.Module | None = None, routed: Sequence[tuple[str, torch.Tensor, Route]] = ()) -> None:
        self.routes = {name: route for name, _, route in routed}
        self._model = None if model is None else ref(unwrapped(model))
        self._copied: list[tuple[str, torch.Tensor]] = []

    def by_parameter(self) -> dict[torch.Tensor, tuple[str, Route]]:
        """Return name and route of each parameter that the model has now; none once the model is gone."""
        return {p: (name, self.routes[name]) for name, p in self._named() if name in self.routes}

    def _named(self) -> list[tuple[str, torch.Tensor]]:
        """Return the names and parameters of the model, or of the one that was copied."""
        model = self._model() if self._model else None
        return self._copied if model is None else plain_names(model)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"routes": self.routes, "_model": None, "_copied": self._named()}


def as_groups(params: ParamsT) -> list[dict[str, Any]]:
    """Return the constructor's ``params`` as parameter groups."""
    if isinstance(params, torch.Tensor | nn.Module | Mapping):
        raise TypeError(
            "params must be an iterable of tensors, of (name, tensor) pairs or of dicts, "
            f"got a {type(params).__name__}: pass model.named_parameters(), "
            "or use HybridAdaptiveMuon.from_model(model)"
        )
    entries: list[Any] = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    return [listed(group) for group in groups]


def listed(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group whose ``params`` can be read more than once, unlike a generator; a set stays one, to be refused."""
    if "params" not in group or isinstance(group["params"], torch.Tensor | set):
        return group
    return {**group, "params": list(group["params"])}


def entries_of(group: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Return a group's parameters as pairs of name, "" where it has none, and parameter."""
    if "params" not in group:
        raise ValueError(f"a parameter group must have params, got {sorted(group)}: add the list of its parameters")
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("the order of a set changes between runs; pass the parameters as a list")
    entries = [_named(entry) for entry in ([params] if isinstance(params, torch.Tensor) else params)]
    names = group.get("param_names")  # where the group is another optimizer's
    if names is None or any(name for name, _ in entries):
        return entries
    require(
        len(names) == len(entries),
        f"param_names of a group must be as many as its {len(entries)} params",
        len(names),
        "leave param_names out, or pass (name, parameter) pairs as params",
    )
    return [(name, p) for name, (_, p) in zip(names, entries, strict=True)]


def in_model(known: Mapping[torch.Tensor, tuple[str, Route]], group: dict[str, Any]) -> dict[str, Any]:
    """Return a group with the names and routes of a model; what is not of the model is routed by itself.

    Args:
        known: Names and routes of the model's parameters.
        group: The group. Its ``use_muon`` decides before the model does.
    """
    entries = [(known[p][0] if p in known else name, p) for name, p in entries_of(group)]
    routes, use_muon = group.get("routes"), group.get("use_muon")
    if routes is None:
        routes = [known[p][1] if p in known else route_parameter(p, name) for name, p in entries]
        if use_muon is not None:
            algorithm, reason = "adaptive_muon" if use_muon else "adamw", f"use_muon={use_muon} in its group"
            routes = [replace(route, algorithm=algorithm, reason=reason) for route in routes]
    return {**_without(group, "param_names"), "params": entries, "routes": routes}


def with_names(group: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a group, as :func:`in_model` returned it, whose parameters have names if those in other groups have."""
    taken = {name for each in others for name in each.get("param_names", [])}
    entries = group["params"]
    if not taken and not any(name for name, _ in entries):
        return group
    made_up = []
    for index, (name, p) in enumerate(entries):
        own = name or f"added.{len(others)}.{index}"
        while not name and own in taken:
            own += "_"
        made_up.append((own, p))
    return {**group, "params": made_up}


def present_routes(
    groups: Sequence[dict[str, Any]], reasons: Sequence[Sequence[tuple[str, Route]]], model: ModelRoutes
) -> list[tuple[str, torch.Tensor, Route]]:
    """Return name, parameter and route of each parameter in groups, which may have changed since they were added.

    Args:
        groups: The groups, each of one kind.
        reasons: Names and routes of each group's parameters when it was added.
        model: The routes of a model, for groups that have changed in length.
    """
    routes = []
    for index, group in enumerate(groups):
        algorithm: AlgorithmT = "adaptive_muon" if group["use_muon"] else "adamw"
        by_group = Route(algorithm, "put into a group from outside")
        names = group.get("param_names", [""] * len(group["params"]))
        known = reasons[index] if index < len(reasons) else []
        if len(known) != len(names) or any(route.algorithm != algorithm for _, route in known):
            known = [("", model.routes.get(name, by_group)) for name in names]
        rows = zip(names, group["params"], known, strict=True)
        routes += [(name or own, p, route) for name, p, (own, route) in rows]
    return routes


def split(group: dict[str, Any], taken: Collection[str]) -> list[dict[str, Any]]:
    """Return a group as one or two groups of one kind each, matrices first, with ``use_muon`` and ``routes`` set.

    Options are those of the kind. A value that is a list with an entry for each parameter is split too, and a name
    (``"name"``) gets the kind appended, so that the two groups can be told apart.

    Args:
        group: The group, as :func:`in_model` returned it.
        taken: Names of other groups.
    """
    entries, routes = group["params"], group["routes"]
    unknown = [key for key in group if key.startswith("scalar_") and key not in _SCALAR_KEYS]
    require(not unknown, "scalar_ options of a group must be known", unknown, f"choose from {', '.join(_SCALAR_KEYS)}")
    chosen = {
        algorithm: [index for index, route in enumerate(routes) if route.algorithm == algorithm]
        for algorithm in ("adaptive_muon", "adamw")
    }
    parts = []
    for algorithm, indices in chosen.items():
        if not indices:
            continue
        options = _options(group, use_muon=algorithm == "adaptive_muon")
        if len(indices) < len(entries):
            options = _of_half(options, algorithm, indices, len(entries), taken)
        parts.append(
            options
            | {
                "params": [entries[index] for index in indices],
                "routes": [routes[index] for index in indices],
                "use_muon": algorithm == "adaptive_muon",
            }
        )
    return parts


def tag_transposed(entries: Sequence[tuple[str, torch.Tensor]], routes: Sequence[Route]) -> list[Any]:
    """Tag the matrices that are stored as (in, out), ``muon_transposed``, and return those that lacked the tag."""
    lacking = [
        p
        for (_, p), route in zip(entries, routes, strict=False)
        if route.transposed and route.algorithm == "adaptive_muon" and not getattr(p, "muon_transposed", False)
    ]
    for p in lacking:
        p.muon_transposed = True  # type: ignore[attr-defined]
    return lacking


def check_scalar(options: Mapping[str, Any]) -> None:
    """Check the options of the AdamW part."""
    lr, betas, eps, weight_decay = options["lr"], options["betas"], options["eps"], options["weight_decay"]
    two = isinstance(betas, Sequence) and len(betas) == 2 and all(within(beta, 0, 1) for beta in betas)
    require(within(lr, 0), "scalar_lr must be >= 0", lr, "AdamW's rates are about 1e-4 to 3e-3")
    require(two, "betas must be two numbers in [0, 1)", betas, "try (0.9, 0.95)")
    require(within(eps, 0), "scalar_eps must be >= 0", eps, "the default is 1e-8")
    require(within(weight_decay, 0), "scalar_weight_decay must be >= 0", weight_decay, "pass 0 for none")


def _options(group: dict[str, Any], *, use_muon: bool) -> dict[str, Any]:
    """Return a group's options for one kind, ``scalar_`` ones resolved."""
    options = {key: value for key, value in group.items() if not key.startswith("scalar_")}
    options = _without(options, "params", "param_names", "routes")
    if use_muon:
        return _without(options, "betas")
    scalar = {key.removeprefix("scalar_"): value for key, value in group.items() if key.startswith("scalar_")}
    if "initial_lr" in options and "lr" in scalar and options.get("lr"):
        scalar["initial_lr"] = options["initial_lr"] * scalar["lr"] / options["lr"]  # a scheduler's base rate
    return options | scalar


def _of_half(
    options: dict[str, Any], algorithm: str, indices: list[int], length: int, taken: Collection[str]
) -> dict[str, Any]:
    """Return the options of one of the two halves of a group."""
    half = {
        key: [value[index] for index in indices] if _is_per_parameter(key, value, length) else value
        for key, value in options.items()
    }
    for key in _IDENTIFIERS:
        if key in half:
            name = f"{half[key]}/{algorithm}"
            while name in taken:
                name += "_"
            half[key] = name
    return half


def _is_per_parameter(key: str, value: Any, length: int) -> bool:
    """Return whether an option is a list with an entry for each of a group's parameters."""
    return isinstance(value, list) and len(value) == length and key != "betas"


def _without(group: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return a group without some of its keys."""
    return {key: value for key, value in group.items() if key not in keys}


def _named(entry: Any) -> tuple[str, torch.Tensor]:
    """Return a group's entry as a pair of name, "" where it has none, and parameter."""
    name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else ("", entry)
    if not isinstance(name, str) or not isinstance(p, torch.Tensor):
        raise TypeError(f"a parameter must be a tensor or a (name, tensor) pair, got {type(entry).__name__}")
    return name, p
