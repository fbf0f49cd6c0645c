# SPDX-License-Identifier: Apache-2.0
"""One torch optimizer for a whole model: hidden matrices to AdaptiveMuon, everything else to torch's AdamW."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self, overload, override

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon import checkpoint
from emerging_optimizers.adaptive_muon.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.checks import require, within
from emerging_optimizers.adaptive_muon.parameters import check_gradients
from emerging_optimizers.adaptive_muon.routing import AlgorithmT, Route, route_model, route_parameter


__all__ = ["HybridAdaptiveMuon"]

_SCALAR_KEYS = ("scalar_lr", "scalar_eps", "scalar_weight_decay")


class HybridAdaptiveMuon(Optimizer):
    """AdaptiveMuon for the hidden matrices and ``torch.optim.AdamW`` for everything else, as one torch optimizer.

    Schedulers, gradient clipping, ``zero_grad`` and gradient scalers see the groups of both, the matrices' first
    (groups added later come last); one ``state_dict`` saves and resumes both. Hooks that torch runs for every
    optimizer's step run for the two parts also. :meth:`from_model` knows the modules and routes best. The constructor
    routes what it can: parameters tagged ``is_embedding_or_output_parameter``, of other than two dimensions (but for
    stacks of matrices tagged ``muon_stacked``) or with a single row or column go to AdamW, and where names come along
    (``model.named_parameters()``) so do biases, tables and output heads by their names. It cannot know an embedding
    without name or tag: set ``use_muon`` in its group.

    Args:
        params: Iterable of parameters, of ``(name, parameter)`` pairs, or of dicts that define parameter groups. A
            group's parameters are routed one by one unless the group says ``use_muon``: True sends all of them to
            AdaptiveMuon, False to AdamW. A group's own ``lr``, ``weight_decay`` and ``eps`` hold for all its
            parameters unless it also has ``scalar_lr``, ``scalar_weight_decay`` or ``scalar_eps`` for those that go to
            AdamW.
        lr: Learning rate of the matrices. Default 3e-4.
        momentum: Decay rate of the matrices' momentum. Default 0.95.
        weight_decay: Weight decay coefficient of the matrices. Default 0.01.
        scalar_lr: Learning rate of the AdamW part; ``lr`` when left out.
        betas: Decay rates of the AdamW part. Default (0.9, 0.999), as ``torch.optim.AdamW``.
        scalar_eps: ``eps`` of the AdamW part. Default 1e-8, as ``torch.optim.AdamW``.
        scalar_weight_decay: Weight decay coefficient of the AdamW part; ``weight_decay`` when left out.
        **options: All other options of :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon`, by name.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option is out of its range, or ``use_muon`` sends AdaptiveMuon what is not a matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        scalar_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        scalar_eps: float = 1e-8,
        scalar_weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        self._routes: list[tuple[str, torch.Tensor, Route]] = []
        self._of_model: dict[torch.Tensor, tuple[str, Route]] = {}
        scalar: dict[str, Any] = {
            # a tensor of its own: a scheduler that multiplies each group's in place would meet a shared one twice
            "lr": deepcopy(lr) if scalar_lr is None else scalar_lr,
            "betas": betas,
            "eps": scalar_eps,
            "weight_decay": weight_decay if scalar_weight_decay is None else scalar_weight_decay,
        }
        _check_scalar(scalar)
        # Made empty: add_param_group fills both.
        self._muon = AdaptiveMuon([{"params": []}], lr, momentum, weight_decay, **options)
        self._adamw = AdamW([{"params": []}], **scalar, capturable=self._muon.capturable)
        self._muon.param_groups.clear()
        self._adamw.param_groups.clear()
        parts = [part for group in _as_groups(params) for part in _split(group)]
        # Schedulers and loggers take the first group for the learning rate.
        super().__init__(sorted(parts, key=lambda part: not part["use_muon"]), dict(self._muon.defaults))
        self._share()

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        lr: float = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        *,
        routes: Mapping[str, AlgorithmT] | None = None,
        params: ParamsT | None = None,
        **options: Any,
    ) -> Self:
        """Makes the optimizer of a model, routing its parameters by the modules that own them.

        To AdamW go embeddings and what is tied to them, output heads (Hugging Face's ``get_output_embeddings()``, the
        last linear layers if they have the shape of an embedding, and modules by names such as
        ``lm_head``), norms, biases, recurrent weights, everything that has not two dimensions and everything tagged
        ``is_embedding_or_output_parameter``. :meth:`describe` tells.

        Args:
            model: The model.
            lr: Learning rate of the matrices. Default 3e-4.
            momentum: Decay rate of the matrices' momentum. Default 0.95.
            weight_decay: Weight decay coefficient of the matrices. Default 0.01.
            routes: Name pattern (as in ``fnmatch``) to "adaptive_muon" or "adamw", before all other rules; the first
                pattern that matches wins. Example: ``{"decoder.out.*": "adamw"}``.
            params: Parameters of the model, or groups of them, as in the constructor. Default: all. What is left out,
                :meth:`add_param_group` routes and names as the model says when it is added.
            **options: All other arguments of the class.

        Raises:
            ValueError: As the class, and if a pattern matches no parameter or a parameter is not the model's.
        """
        of_model: dict[torch.Tensor, tuple[str, Route]] = {
            p: (name, route) for name, p, route in route_model(model, routes)
        }
        groups = [_as_in(of_model, group) for group in _as_groups(model.parameters() if params is None else params)]
        optimizer = cls(groups, lr, momentum, weight_decay, **options)
        optimizer._of_model = of_model
        return optimizer

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, split in two where it holds both kinds, or raises and leaves all as it was.

        Args:
            param_group: As in the constructor's ``params``.
        """
        self._share()
        grown: tuple[list[Any], ...] = (
            self._routes,
            self.param_groups,
            self._muon.param_groups,
            self._adamw.param_groups,
        )
        lengths = [len(entries) for entries in grown]
        try:
            for part in _split(self._as_in_model(param_group)):
                self._add_part(part)
        except Exception:
            for entries, length in zip(grown, lengths, strict=True):
                del entries[length:]
            raise

    def _as_in_model(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group that is added later, with names and routes where the model is known and all of it is the model's."""
        params = [_named(entry)[1] for entry in _entries(group)]
        return _as_in(self._of_model, group) if all(p in self._of_model for p in params) else group

    def _add_part(self, part: dict[str, Any]) -> None:
        """Adds a group of one kind to the optimizer of its kind, and shares it."""
        routes = part.pop("routes")
        if part["use_muon"]:
            inner: Optimizer = self._muon
        else:
            inner = self._adamw
            _check_scalar({**inner.defaults, **part})
        inner.add_param_group(part)
        group = inner.param_groups[-1]
        held = {p for group in self.param_groups for p in group["params"]}
        repeated = [tuple(p.shape) for p in group["params"] if p in held]
        require(not repeated, "a parameter must be in one group only", repeated, "remove it from the other group")
        self.param_groups.append(group)
        names = group.get("param_names", [""] * len(routes))
        self._routes += zip(names, group["params"], routes, strict=True)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates all parameters that have a gradient.

        Args:
            closure: Optional; evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: If a gradient is sparse, or a matrix's is complex. No weight and no state has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()
        for group in self._adamw.param_groups:
            check_gradients(group, "AdamW", complex_too=True)
        self._muon.step()  # checks its own before it changes anything
        self._adamw.step()
        return loss

    def describe(self, *, each: bool = True) -> str:
        """Returns a table of the parameters: how many went where and, of ``each``, its shape, its name and why.

        Those that are frozen now, which no step changes before they are unfrozen, are counted by themselves.
        """
        titles = {"adaptive_muon": f"AdaptiveMuon ({self._muon.moment2_method})", "adamw": "AdamW", "frozen": "frozen"}
        lines = []
        for kind, title in titles.items():
            rows = [row for row in self._routes if kind == (row[2].algorithm if row[1].requires_grad else "frozen")]
            lines.append(f"{title}: {len(rows)} parameters, {sum(p.numel() for _, p, _ in rows):,} elements")
            lines += [
                f"  {' x '.join(map(str, p.shape)):>15}  {name}  ({route.reason})" for name, p, route in rows if each
            ]
        return "\n".join(lines)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the checkpoint is of another routing, or its matrices' part is one that
                :meth:`AdaptiveMuon.load_state_dict` refuses. Nothing is changed.
        """
        checkpoint.load(self, state_dict, super().load_state_dict, self._muon)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return checkpoint.attributes(self)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
        for inner in (self._muon, self._adamw):
            inner.__setstate__({})  # fills in what an older checkpoint's groups lack

    def _share(self) -> None:
        """Gives both optimizers the state and the groups that stand here now, whoever has set them."""
        for inner, use_muon in ((self._muon, True), (self._adamw, False)):
            inner.state = self.state
            inner.param_groups = [group for group in self.param_groups if bool(group["use_muon"]) is use_muon]


def _as_groups(params: ParamsT) -> list[dict[str, Any]]:
    """The constructor's ``params`` as parameter groups."""
    if isinstance(params, torch.Tensor | nn.Module | Mapping):
        raise TypeError(
            "params must be an iterable of tensors, of (name, tensor) pairs or of dicts, "
            f"got a {type(params).__name__}: pass model.named_parameters(), "
            "or use HybridAdaptiveMuon.from_model(model)"
        )
    entries: list[Any] = list(params)
    return entries if entries and isinstance(entries[0], dict) else [{"params": entries}]


def _split(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group as one or two groups of one kind each, with ``use_muon`` and ``routes`` set and options resolved."""
    entries = _entries(group)
    unknown = [key for key in group if key.startswith("scalar_") and key not in _SCALAR_KEYS]
    require(not unknown, "scalar_ options of a group must be known", unknown, f"choose from {', '.join(_SCALAR_KEYS)}")
    routes = group.get("routes") or [_route(entry, group.get("use_muon")) for entry in entries]
    parts = []
    for use_muon, algorithm in ((True, "adaptive_muon"), (False, "adamw")):
        chosen = [index for index, route in enumerate(routes) if route.algorithm == algorithm]
        if not chosen:
            continue
        part = {key: value for key, value in group.items() if not key.startswith("scalar_")}
        if use_muon:
            part.pop("betas", None)
        else:
            part |= {key.removeprefix("scalar_"): value for key, value in group.items() if key.startswith("scalar_")}
        part["params"] = [entries[index] for index in chosen]
        part["routes"] = [routes[index] for index in chosen]
        part["use_muon"] = use_muon
        parts.append(part)
    return parts


def _as_in(of_model: Mapping[torch.Tensor, tuple[str, Route]], group: dict[str, Any]) -> dict[str, Any]:
    """A group with the names of its parameters in a model and, where it has not decided itself, their routes."""
    params = [_named(entry)[1] for entry in _entries(group)]
    foreign = [tuple(p.shape) for p in params if p not in of_model]
    require(not foreign, "params must be parameters of the model", foreign, "pass the model that holds them")
    named = {**group, "params": [(of_model[p][0], p) for p in params]}
    return named if group.get("use_muon") is not None else {**named, "routes": [of_model[p][1] for p in params]}


def _entries(group: dict[str, Any]) -> list[Any]:
    """A group's parameters, or pairs of name and parameter."""
    if "params" not in group:
        raise ValueError(f"a parameter group must have params, got {sorted(group)}: add the list of its parameters")
    params = group["params"]
    if isinstance(params, set):
        raise TypeError("the order of a set changes between runs; pass the parameters as a list")
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _named(entry: Any) -> tuple[str, torch.Tensor]:
    """A group's entry as a pair of name, where it has one, and parameter."""
    name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else ("", entry)
    if not isinstance(name, str) or not isinstance(p, torch.Tensor):
        raise TypeError(f"a parameter must be a tensor or a (name, tensor) pair, got {type(entry).__name__}")
    return name, p


def _route(entry: Any, use_muon: bool | None) -> Route:
    """The route of a group's entry, which the group may have decided."""
    name, p = _named(entry)
    route = route_parameter(p, name)
    if use_muon is None:
        return route
    return Route("adaptive_muon" if use_muon else "adamw", f"use_muon={use_muon} in its group")


def _check_scalar(options: Mapping[str, Any]) -> None:
    """Checks the options of the AdamW part."""
    lr, betas, eps, weight_decay = options["lr"], options["betas"], options["eps"], options["weight_decay"]
    two = isinstance(betas, Sequence) and len(betas) == 2 and all(within(beta, 0, 1) for beta in betas)
    require(within(lr, 0), "scalar_lr must be >= 0", lr, "AdamW's rates are about 1e-4 to 3e-3")
    require(two, "betas must be two numbers in [0, 1)", betas, "try (0.9, 0.95)")
    require(within(eps, 0), "scalar_eps must be >= 0", eps, "the default is 1e-8")
    require(within(weight_decay, 0), "scalar_weight_decay must be >= 0", weight_decay, "pass 0 for none")
