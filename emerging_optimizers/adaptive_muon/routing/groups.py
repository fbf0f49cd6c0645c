# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of HybridAdaptiveMuon: read, routed and split in two where they hold both kinds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, override
from weakref import ref

import torch
from absl import logging
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon.checks import is_rate, require, within
from emerging_optimizers.adaptive_muon.identity import give_key, key_of
from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.routing.rules import (
    SHARED,
    UNSPLIT,
    UNSTACKED,
    AlgorithmT,
    Route,
    plain_names,
    route_model,
    route_parameter,
    unwrapped,
)


__all__ = [
    "Entries",
    "ModelRoutes",
    "as_groups",
    "check_options",
    "check_scalar",
    "distinct",
    "in_model",
    "split",
    "tag",
    "with_entries",
    "with_names",
]

_SCALAR_KEYS = ("scalar_lr", "scalar_eps", "scalar_weight_decay")
_OUTSIDE = "put into a group from outside"
# Keys by which loggers tell groups apart: Lightning's LearningRateMonitor refuses two groups of one name.
_IDENTIFIERS = ("name", "group_name")


class ModelRoutes:
    """The routes of a model's parameters, by name: a parameter that is replaced under its name keeps its route.

    It keeps neither the model nor its parameters alive, and pickle does not store them. ``patterns``
    and ``switches`` are those that :func:`~emerging_optimizers.adaptive_muon.routing.rules.route_model` was given.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        routed: Sequence[tuple[str, torch.Tensor, Route]] = (),
        patterns: Mapping[str, AlgorithmT] | None = None,
        switches: SplitOptions | None = None,
    ) -> None:
        self.routes = {name: route for name, _, route in routed}
        self._patterns, self._switches = dict(patterns or {}), switches or SplitOptions()
        self._model = None if model is None else ref(unwrapped(model))

    @classmethod
    def of(cls, model: nn.Module, patterns: Mapping[str, AlgorithmT] | None, switches: SplitOptions) -> "ModelRoutes":
        """Route a model's parameters, and log the weights that a switch is for in modules that are not recognized."""
        routes = cls(model, route_model(model, patterns, switches), patterns, switches)
        for text in (UNSPLIT, SHARED, UNSTACKED):
            unsplit = [name for name, route in routes.routes.items() if route.unsplit == text]
            if unsplit:
                logging.warning("adaptive_muon: %d weights are %s: %s", len(unsplit), text, ", ".join(unsplit))
        return routes

    def by_parameter(self, params: Iterable[torch.Tensor] = ()) -> dict[torch.Tensor, tuple[str, Route]]:
        """Return name and route of each parameter that the model has now; none once the model is gone.

        If the model has got some of ``params`` since it was routed, it is routed anew. The parameters that it had before
        keep their routes.
        """
        model = self._model() if self._model else None
        if model is None:
            return {}
        named, wanted, routes = plain_names(model), set(params), self.routes
        if any(p in wanted and name not in routes for name, p in named):
            anew = route_model(model, self._patterns, self._switches, partly=True)
            routes = {name: route for name, _, route in anew} | routes
        return {p: (name, routes[name]) for name, p in named if name in routes}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelRoutes":
        """Return one for a copy of the model, if that was copied before in the same call, or for none."""
        model = self._model() if self._model else None
        copied = ModelRoutes(memo.get(id(model)))
        copied.routes, copied._patterns, copied._switches = dict(self.routes), dict(self._patterns), self._switches
        return copied

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}


class Entries:
    """Names and routes of the parameters in groups. They follow the parameters, whoever edits the groups.

    They are stored under the parameters' keys, which keep no parameter alive. What is put in a parameter's place (a copy
    of the optimizer, ``fully_shard`` and ``torch.utils.swap_tensors`` do so) has no key or an unknown one, and takes over
    the name and route of its place. It does so only if all groups still have their lengths and the key of the place has
    not gone elsewhere.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, Route]] = {}
        self._places: list[list[str]] = []

    def add(self, entries: Sequence[tuple[str, torch.Tensor]], routes: Sequence[Route]) -> None:
        """Add the parameters of a new group, the last one."""
        self._places.append([])
        for (name, p), route in zip(entries, routes, strict=True):
            key = key_of(p)
            if not key or any(key in place for place in self._places):  # the key of a copy of a parameter
                key = give_key(p)
            self._known[key] = (name, route)
            self._places[-1].append(key)

    def follow(self, groups: Sequence[dict[str, Any]], model: ModelRoutes) -> list[tuple[str, torch.Tensor, Route]]:
        """Return name, parameter and route of each parameter in groups, which may have been edited.

        Parameters that were put into a group from outside have those of the model, if it has them. Names in the groups
        and tags of parameters are put right, in place.
        """
        places = [[key_of(p) for p in group["params"]] for group in groups]
        if any(key not in self._known for place in places for key in place):
            self._take_over(groups, places)
            self._look_up(groups, model)
            places = [[key_of(p) for p in group["params"]] for group in groups]
        self._places = places
        known = [[self._known[key] for key in place] for place in places]
        _rename(groups, known)
        rows: list[tuple[str, torch.Tensor, Route]] = []
        for group, in_group in zip(groups, known, strict=True):
            routes = [_in_group(group, route) for _, route in in_group]
            names = group.get("param_names", [name for name, _ in in_group])
            # Copies of parameters, and what a wrapper has put in their place, lack the tag.
            tag(group["params"], routes)
            rows += zip(names, group["params"], routes, strict=True)
        return rows

    def _take_over(self, groups: Sequence[dict[str, Any]], places: list[list[str]]) -> None:
        """Give parameters without a known key the name and route of their place, where the place is beyond doubt."""
        if [len(place) for place in places] != [len(place) for place in self._places]:
            return
        present = {key for place in places for key in place}
        for group, place, before in zip(groups, places, self._places, strict=True):
            for p, key, old in zip(group["params"], place, before, strict=True):
                if key not in self._known and old not in present:
                    self._known[key or give_key(p)] = self._known[old]

    def _look_up(self, groups: Sequence[dict[str, Any]], model: ModelRoutes) -> None:
        """Give all other parameters without a known key the name and route that the model has for them, if any."""
        new = [(p, group.get("use_muon")) for group in groups for p in group["params"] if key_of(p) not in self._known]
        known = model.by_parameter(p for p, _ in new) if new else {}
        for p, use_muon in new:
            outside = Route("adaptive_muon" if use_muon else "adamw", _OUTSIDE)
            self._known[key_of(p) or give_key(p)] = known.get(p, ("", outside))


def _in_group(group: dict[str, Any], route: Route) -> Route:
    """Return a route, or if it is not to the algorithm of the group that its parameter is in now, that one."""
    algorithm: AlgorithmT = "adaptive_muon" if group.get("use_muon") else "adamw"
    return route if route.algorithm == algorithm else replace(route, algorithm=algorithm, reason=_OUTSIDE)


def as_groups(params: ParamsT) -> list[dict[str, Any]]:
    """Return the constructor's ``params`` as parameter groups, see :func:`with_entries`."""
    if isinstance(params, torch.Tensor | nn.Module | Mapping):
        raise TypeError(
            "params must be an iterable of tensors, of (name, tensor) pairs or of dicts, "
            f"got a {type(params).__name__}. Pass model.named_parameters(), "
            "or use HybridAdaptiveMuon.from_model(model)."
        )
    entries: list[Any] = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    return [with_entries(group) for group in groups]


def with_entries(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group whose ``params`` are a list of pairs: the name, "" where it has none, and the parameter."""
    if "params" not in group:
        raise ValueError(f"a parameter group must have params, got {sorted(group)}. Add the list of its parameters.")
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("params must have an order, got a set. Pass them as a list.")
    entries = [_named(entry) for entry in ([params] if isinstance(params, torch.Tensor) else params)]
    names = group.get("param_names")  # where the group is another optimizer's
    if names is not None and not any(name for name, _ in entries):
        require(
            len(names) == len(entries),
            f"param_names of a group must be as many as its {len(entries)} params",
            len(names),
            "Leave param_names out, or pass (name, parameter) pairs as params.",
        )
        entries = [(name, p) for name, (_, p) in zip(names, entries, strict=True)]
    return {**_without(group, "param_names"), "params": entries}


def in_model(known: Mapping[torch.Tensor, tuple[str, Route]], group: dict[str, Any]) -> dict[str, Any]:
    """Return a group of entries with the names and routes of a model; what is not of the model is routed by itself.

    The group's ``use_muon`` decides before the model does.
    """
    entries = [(known[p][0] if p in known else name, p) for name, p in group["params"]]
    routes, use_muon = group.get("routes"), group.get("use_muon")
    if routes is None:
        routes = [known[p][1] if p in known else route_parameter(p, name) for name, p in entries]
        if use_muon is not None:
            algorithm, reason = "adaptive_muon" if use_muon else "adamw", f"use_muon={use_muon} in its group"
            routes = [replace(route, algorithm=algorithm, reason=reason) for route in routes]
    return {**group, "params": entries, "routes": routes}


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


def _rename(groups: Sequence[dict[str, Any]], entries: Sequence[Sequence[tuple[str, Route]]]) -> None:
    """Put the names of groups right whose parameters were edited without their names, in place."""
    owned = {name for known in entries for name, _ in known}
    for at, (group, known) in enumerate(zip(groups, entries, strict=True)):
        if "param_names" not in group:
            continue
        names = group["param_names"]
        names = names if len(names) == len(known) else [""] * len(known)
        group["param_names"] = [
            own or (name if name not in owned else "") or f"added.{at}.{index}"
            for index, (name, (own, _)) in enumerate(zip(names, known, strict=True))
        ]


def split(group: dict[str, Any], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a group as one or two groups, matrices first, each with the options of one optimizer.

    A value that is a list with an entry for each parameter is split too. A name (``"name"``) gets the algorithm
    appended, and differs from those of other groups.
    """
    entries, routes = group["params"], group["routes"]
    unknown = [key for key in group if key.startswith("scalar_") and key not in _SCALAR_KEYS]
    require(
        not unknown, "scalar_ options of a group must be known", unknown, f"Choose from {', '.join(_SCALAR_KEYS)}."
    )
    parts = []
    for algorithm in ("adaptive_muon", "adamw"):
        indices = [index for index, route in enumerate(routes) if route.algorithm == algorithm]
        if not indices:
            continue
        part = _options(group, use_muon=algorithm == "adaptive_muon")
        if len(indices) < len(entries):
            part = _of_half(part, algorithm, indices, len(entries), others)
        part["params"], part["routes"] = ([values[index] for index in indices] for values in (entries, routes))
        part["use_muon"] = algorithm == "adaptive_muon"
        parts.append(part)
    return parts


def distinct(group: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a group under a name that no other group has; a name is made longer by underscores."""
    taken = {str(other[key]) for other in others for key in _IDENTIFIERS if key in other}
    named = {key: f"{group[key]}" for key in _IDENTIFIERS if group.get(key) is not None}
    for key in named:
        while named[key] in taken:
            named[key] += "_"
    return group | {key: name for key, name in named.items() if name != f"{group[key]}"}


def tag(params: Sequence[torch.Tensor], routes: Sequence[Route]) -> list[Callable[[], None]]:
    """Tag the matrices that are stored as (in, out), ``muon_transposed``, and those of several parts, ``muon_parts``.

    Stacks and what is flattened are tagged ``muon_form``. Return functions that undo it.
    """
    undo: list[Callable[[], None]] = []
    for p, route in zip(params, routes, strict=True):
        to_muon = route.algorithm == "adaptive_muon"
        blocks = route.parts.blocks if to_muon and route.parts is not None else None
        form = route.form if to_muon else None
        tags = (("muon_transposed", to_muon and route.transposed), ("muon_parts", blocks), ("muon_form", form))
        for name, value in tags:
            before = getattr(p, name, None)
            # What is stored transposed stays so; parts and forms are those of this optimizer, and no other's.
            if before != value and (value or (name != "muon_transposed" and before is not None)):
                setattr(p, name, value)
                undo.append(partial(delattr, p, name) if before is None else partial(setattr, p, name, before))
    return undo


def check_scalar(options: Mapping[str, Any]) -> None:
    """Check the options of the AdamW part."""
    lr, betas, eps, weight_decay = options["lr"], options["betas"], options["eps"], options["weight_decay"]
    two = isinstance(betas, Sequence) and len(betas) == 2 and all(within(beta, 0, 1) for beta in betas)
    require(is_rate(lr), "scalar_lr must be >= 0", lr, "Use about 1e-4 to 3e-3.")
    require(two, "betas must be two numbers in [0, 1)", betas, "Use (0.9, 0.95).")
    require(within(eps, 0), "scalar_eps must be >= 0", eps, "Use 1e-8, the default.")
    require(within(weight_decay, 0), "scalar_weight_decay must be >= 0", weight_decay, "Pass 0 for none.")


def check_options(optimizer: Optimizer) -> None:
    """Raise a ``ValueError`` if a group lacks options of its optimizer, since it was edited from outside."""
    for group in optimizer.param_groups:
        # Torch adds "differentiable" to the defaults alone.
        missing = sorted(optimizer.defaults.keys() - group.keys() - {"differentiable"})
        require(
            not missing,
            f"a group with use_muon={group.get('use_muon')} must have all options of its kind; it lacks",
            missing,
            "Remove the group from param_groups and add it by add_param_group({'params': ..., 'use_muon': ...}).",
        )


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
    options: dict[str, Any], algorithm: str, indices: list[int], length: int, others: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the options of one of the two halves of a group, which share no tensor."""
    half = {key: _cloned(value) for key, value in options.items()} if algorithm == "adamw" else dict(options)
    for key, value in half.items():
        if key in _IDENTIFIERS:
            half[key] = f"{value}/{algorithm}"
        elif isinstance(value, list) and len(value) == length and key != "betas":
            half[key] = [value[index] for index in indices]
    return distinct(half, others)


def _cloned(value: Any) -> Any:
    """Return an option with tensors of its own: schedulers change a tensor in place, in each group once."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(_cloned, value)) if type(value) in (list, tuple) else value


def _without(group: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return a group without some of its keys."""
    return {key: value for key, value in group.items() if key not in keys}


def _named(entry: Any) -> tuple[str, torch.Tensor]:
    """Return a group's entry as a pair of name, "" where it has none, and parameter."""
    name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else ("", entry)
    if not isinstance(name, str) or not isinstance(p, torch.Tensor):
        raise TypeError(
            f"a parameter must be a tensor or a (name, tensor) pair, got {type(entry).__name__}. "
            "Pass model.named_parameters()."
        )
    return name, p
