# SPDX-License-Identifier: Apache-2.0
"""One torch optimizer for a whole model: hidden matrices to AdaptiveMuon, everything else to torch's AdamW."""

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Self, Unpack, overload, override

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon.adamw import is_widened, step_by_mesh, step_in_float32
from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.diagnostics.face import Diagnosed
from emerging_optimizers.adaptive_muon.diagnostics.report import Finding
from emerging_optimizers.adaptive_muon.modes import check_capture, loss_of, plain_modes
from emerging_optimizers.adaptive_muon.optimizer import AdaptiveMuon
from emerging_optimizers.adaptive_muon.options import Options, OptionsDict, SplitOptions
from emerging_optimizers.adaptive_muon.parameters import check_capturable, check_distinct, check_gradients
from emerging_optimizers.adaptive_muon.rounding import check_rounding
from emerging_optimizers.adaptive_muon.routing.forms import EXPERTS, FLATTENS
from emerging_optimizers.adaptive_muon.routing.groups import (
    Entries,
    ModelRoutes,
    as_groups,
    check_options,
    check_scalar,
    distinct,
    in_model,
    split,
    tag,
    with_entries,
    with_names,
)
from emerging_optimizers.adaptive_muon.routing.replicas import replica_group_of
from emerging_optimizers.adaptive_muon.routing.rules import NOT_A_MAP, STACK, AlgorithmT, Route
from emerging_optimizers.adaptive_muon.sharding.blocks import in_words
from emerging_optimizers.adaptive_muon.state import checkpoint
from emerging_optimizers.adaptive_muon.state.buffers import check_adamw_state


__all__ = ["HybridAdaptiveMuon"]


class _DiagnosedModel(Diagnosed, ABC):
    """The diagnostics of an optimizer that has routed the parameters of a model."""

    @property
    @abstractmethod
    def routes(self) -> list[tuple[str, torch.Tensor, Route]]:
        """The name, the parameter and the route of every parameter."""

    _model: ModelRoutes  # what a model says of its parameters, if one was given

    @override
    def named_matrices(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters that AdaptiveMuon updates, with their names in the model where it is known."""
        names = {id(p): name for name, p, _ in self.routes}
        yield from ((names.get(id(p)) or name, p) for name, p in super().named_matrices())

    @override
    def further_findings(self) -> list[Finding]:
        """Return the parameters that went to AdamW though they are the largest, and for want of a better reason only."""
        places = {
            id(p): f"{number}.{index}"
            for number, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
        }
        rows = ((name or places[id(p)], p, route) for name, p, route in self.routes)
        return _misrouted(rows, of_model=bool(self._model.routes))


class HybridAdaptiveMuon(_DiagnosedModel, Optimizer):
    """AdaptiveMuon for the hidden matrices and ``torch.optim.AdamW`` for everything else, as one torch optimizer.

    Schedulers, gradient clipping, ``zero_grad`` and gradient scalers see the groups of both, the matrices' first
    (groups added later come last); one ``state_dict`` saves and resumes both. Hooks that torch runs for every
    optimizer's step run for the two parts also. ``diagnostics()``, ``diagnostics_summary()`` and ``report()`` are those of
    AdaptiveMuon. Use :meth:`from_model`, which routes by the modules, where you can.

    The constructor sees parameters only. It sends to AdamW those tagged ``is_embedding_or_output_parameter``, those of
    other than two dimensions (except stacks of matrices tagged ``muon_stacked``), those with a single row or column, and
    dtypes that AdaptiveMuon does not take. Given names (``model.named_parameters()``), it also sends output heads, norms
    and embeddings there by their names, and matrices without a weight's name. It cannot recognize an embedding without
    a tag or such a name: set ``use_muon`` to False in its group, or as an attribute of the parameter.

    A parameter's attribute ``use_muon`` decides before these rules: False sends it to AdamW, and True to AdaptiveMuon if
    that can take it. A group's ``use_muon`` and ``routes`` decide before the attribute.

    Args:
        params: Iterable of parameters, of ``(name, parameter)`` pairs, or of dicts that define parameter groups. A
            group's parameters are routed one by one unless the group has ``use_muon``: True sends all of them to
            AdaptiveMuon, False to AdamW. A group's own ``lr``, ``weight_decay`` and ``eps`` hold for all its
            parameters unless it also has ``scalar_lr``, ``scalar_weight_decay`` or ``scalar_eps`` for those that go to
            AdamW. A group with parameters of both kinds becomes two. Its ``name``, by which loggers tell groups
            apart, gets "/adaptive_muon" and "/adamw" appended, and a list with an entry for each parameter is split.
        lr: Learning rate of the matrices. Default 3e-4, as upstream's Muon.
        momentum: Decay rate of the matrices' momentum. Default 0.95, as upstream's Muon.
        weight_decay: Weight decay coefficient of the matrices. Default 0.01, as upstream's Muon.
        scalar_lr: Learning rate of the AdamW part. Without it, AdamW takes ``lr``, which is too high for most models.
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
        lr: float = Options.lr,
        momentum: float = Options.momentum,
        weight_decay: float = Options.weight_decay,
        *,
        scalar_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        scalar_eps: float = 1e-8,
        scalar_weight_decay: float | None = None,
        **options: Unpack[OptionsDict],
    ) -> None:
        self._entries = Entries()
        self._model = ModelRoutes()
        scalar: dict[str, Any] = {
            # a tensor of its own: a scheduler that multiplies each group's in place would meet a shared one twice
            "lr": deepcopy(lr) if scalar_lr is None else scalar_lr,
            "betas": betas,
            "eps": scalar_eps,
            "weight_decay": weight_decay if scalar_weight_decay is None else scalar_weight_decay,
        }
        # They lend their steps and checks: _shared gives them the groups.
        self._muon = AdaptiveMuon([{"params": []}], lr, momentum, weight_decay, **options)
        check_scalar(scalar)
        self._adamw = AdamW([{"params": []}], **scalar, capturable=self._muon.capturable)
        self.state_format, self.diagnostics_store = self._muon.state_format, self._muon.diagnostics_store
        groups = as_groups(params)
        _check_names(groups)
        parts = [part for group in groups for part in split(in_model({}, group), groups)]
        # Schedulers and loggers take the first group for the learning rate.
        super().__init__(sorted(parts, key=lambda part: not part["use_muon"]), dict(self._muon.defaults))

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        lr: float = Options.lr,
        momentum: float = Options.momentum,
        weight_decay: float = Options.weight_decay,
        *,
        routes: Mapping[str, AlgorithmT] | None = None,
        params: ParamsT | None = None,
        split_qkv: bool = SplitOptions.split_qkv,
        split_heads: bool = SplitOptions.split_heads,
        split_gate_up: bool = SplitOptions.split_gate_up,
        stacked_experts: bool = SplitOptions.stacked_experts,
        flatten_conv: bool = SplitOptions.flatten_conv,
        **options: Any,
    ) -> Self:
        """Make the optimizer of a model, routing its parameters by the modules that own them.

        To AdaptiveMuon go the weights of hidden linear maps, such as ``nn.Linear``. To AdamW go embeddings and what is
        tied to them, output heads, routers, norms, biases, recurrent weights, all other parameters, and everything tagged
        ``is_embedding_or_output_parameter``. The attribute ``use_muon`` of a parameter decides before these rules.
        :meth:`describe` has the reason for each parameter. The weight of Hugging Face's ``Conv1D``, which is stored as
        (in, out), gets the attribute ``muon_transposed``.

        Where ``DistributedDataParallel`` wraps the model, or Lightning's strategy "ddp" does, its ranks share the work, as
        with ``replica_group``; :meth:`describe` counts them. ``share_replicas=False`` lets every rank do all of it.

        Args:
            model: The model.
            lr, momentum, weight_decay: As the class.
            routes: Name pattern (as in ``fnmatch``) to "adaptive_muon" or "adamw", before all other rules; the first
                pattern that matches wins. Example: ``{"decoder.out.*": "adamw"}``. Components of wrappers are optional.
            params: Parameters of the model, or groups of them, as in the constructor. Default: all. What is left out,
                :meth:`add_param_group` routes and names by the model when it is added.
            split_qkv, split_heads, split_gate_up, stacked_experts, flatten_conv: As
                :class:`~emerging_optimizers.adaptive_muon.options.SplitOptions`.
            **options: All other arguments of the class.

        Raises:
            ValueError: As the class, and if a pattern matches no parameter, a parameter is not the model's, or a
                sharding engine has emptied or flattened it.
        """
        switches = SplitOptions(split_qkv, split_heads, split_gate_up, stacked_experts, flatten_conv)
        of_model = ModelRoutes.of(model, routes, switches)
        known, groups = of_model.by_parameter(), as_groups(model.parameters() if params is None else params)
        foreign = [tuple(p.shape) for group in groups for _, p in group["params"] if p not in known]
        require(not foreign, "params must be parameters of the model", foreign, "Pass the model that holds them.")
        options.setdefault("replica_group", replica_group_of(model))
        optimizer = cls([in_model(known, group) for group in groups], lr, momentum, weight_decay, **options)
        optimizer._model = of_model
        return optimizer

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, split in two where it holds both kinds, or raise and leave all as it was.

        The group is as in the constructor's ``params``. Where the other groups have names and a parameter has none, not
        even in the model of :meth:`from_model`, it is called by the place of its group, such as "added.2.0": the same
        whenever groups are added in the same order.
        """
        number, group = len(self.param_groups), with_entries(param_group)
        known = self._model.by_parameter(p for _, p in group["params"])
        group = with_names(in_model(known, group), self.param_groups)
        undo, added = [], []
        with self._shared():
            try:
                for part in split(group, self.param_groups):
                    entries, routes = part["params"], part.pop("routes")
                    undo += tag([p for _, p in entries], routes)
                    self._add_part(distinct(part, self.param_groups))
                    added.append((entries, routes))
            except Exception:
                del self.param_groups[number:]
                for untag in reversed(undo):
                    untag()
                raise
        for entries, routes in added:
            self._entries.add(entries, routes)

    def _add_part(self, part: dict[str, Any]) -> None:
        """Add a group of one kind to the optimizer of its kind, and share it."""
        entries = part["params"]
        if any("param_names" not in group for group in self.param_groups) or not all(name for name, _ in entries):
            part["params"] = [p for _, p in entries]  # torch wants names in all groups or in none
        if part["use_muon"]:
            inner: Optimizer = self._muon
        else:
            inner = self._adamw
            check_scalar({**inner.defaults, **part})
        inner.add_param_group(part)
        group = inner.param_groups[-1]
        check_rounding(group, self._muon.options, scalar=inner is self._adamw)
        check_distinct(group, self.param_groups)
        self.param_groups.append(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @_disable_dynamo  # as AdaptiveMuon's
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: Optional; evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: As :meth:`AdaptiveMuon.step`, and if AdamW's part cannot step. Nothing has changed then.
        """
        loss = loss_of(closure)
        with self._shared(), plain_modes([p for group in self.param_groups for p in group["params"]]):
            for inner in (self._muon, self._adamw):
                check_options(inner)
            _prepare(self._adamw, self._muon.options)
            self._muon.step()  # checks its own parameters before it changes anything
            if self._muon.options.stochastic_rounding:
                step_in_float32(self._adamw)
            else:
                step_by_mesh(self._adamw)
        return loss

    def describe(self, *, each: bool = True) -> str:
        """Return a table of the parameters: how many went where and, of ``each``, its shape, name, reason and blocks.

        The line of AdaptiveMuon counts parameters that replicas share. The line of AdamW counts two-dimensional parameters
        that are not the weights of linear maps, and three-dimensional ones that may be stacks of experts: check them.
        """
        return _description(self.routes, self._muon, each=each)

    @property
    @override
    def routes(self) -> list[tuple[str, torch.Tensor, Route]]:
        """The name, the parameter and the route of every parameter."""
        return self._entries.follow(self.param_groups, self._model)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class.

        Raises:
            ValueError: If the checkpoint is of another routing, AdamW's part does not fit, or the matrices' part is
                one that :meth:`AdaptiveMuon.load_state_dict` rejects. Nothing is changed.
        """
        self._entries.follow(self.param_groups, self._model)
        widened = is_widened if self._muon.options.stochastic_rounding else None
        checkpoint.load(self, state_dict, super().load_state_dict, self.state_format, widened)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return checkpoint.attributes(self)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with self._shared():
            for inner in (self._muon, self._adamw):
                inner.__setstate__({})  # fills in what an older checkpoint's groups lack

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Lend both optimizers the state and groups of now, whoever set them; they keep nothing of them alive later."""
        self._entries.follow(self.param_groups, self._model)
        for inner, use_muon in ((self._muon, True), (self._adamw, False)):
            inner.state = self.state
            inner.param_groups = [group for group in self.param_groups if bool(group.get("use_muon")) is use_muon]
        try:
            yield
        finally:
            for inner in (self._muon, self._adamw):
                inner.state, inner.param_groups = defaultdict(dict), []


def _misrouted(routes: Iterable[tuple[str, torch.Tensor, Route]], *, of_model: bool) -> list[Finding]:
    """Return the findings of parameters that are the largest, and that AdamW has for want of a better reason only.

    Args:
        routes: Name, parameter and route of each.
        of_model: Whether a model has given them.
    """
    rows = [(p.numel(), name, route) for name, p, route in routes if p.requires_grad]
    largest = max((size for size, _, route in rows if route.algorithm == "adaptive_muon"), default=0)
    return [
        Finding(
            1e4 * size / max(largest, 1),
            name,
            f"AdamW has it, though it is larger than all matrices of AdaptiveMuon ({route.reason.split(';')[0]})",
            remedy,
        )
        for size, name, route in rows
        if route.algorithm == "adamw" and size > largest and (remedy := _remedy(name, route.reason, of_model))
    ]


def _remedy(name: str, reason: str, of_model: bool) -> str:
    """Return what to try about a parameter that went to AdamW for a reason; "" where that is right."""
    if reason == EXPERTS:
        return "pass stacked_experts=True to from_model"
    if reason.endswith(FLATTENS):
        return "pass flatten_conv=True to from_model, and compare"
    if reason.startswith(STACK):
        return "set its muon_stacked = True if it is a stack of matrices"
    if reason.startswith(NOT_A_MAP) and of_model:
        return f'pass routes={{"{name}": "adaptive_muon"}} to from_model if it is the weight of a linear map'
    if reason.startswith(NOT_A_MAP):
        return "set 'use_muon': True in its group if it is the weight of a linear map"
    return ""


def _prepare(adamw: AdamW, options: Options) -> None:
    """Check AdamW's groups before a step, and choose its kernel."""

    def widens(p: torch.Tensor) -> bool:
        return options.stochastic_rounding and is_widened(p)

    check_capture(adamw.param_groups, adamw.state, options.capturable)
    for group in adamw.param_groups:
        check_gradients(group, "AdamW", complex_too=True, converts=widens)
        check_adamw_state(group, adamw.state, lambda p: torch.float32 if widens(p) else p.dtype)
        check_capturable(group)
        check_rounding(group, options, scalar=True)
        _fuse(group, adamw.state)


def _fuse(group: dict[str, Any], states: Mapping[torch.Tensor, dict[str, Any]]) -> None:
    """Have AdamW take its fused kernel for a group on a GPU, and not elsewhere; the kernel counts steps on the device."""
    fused = all(p.is_cuda and p.is_floating_point() for p in group["params"])
    if fused == bool(group.get("fused")):
        return
    group["fused"] = fused
    for p in group["params"]:
        if "step" in states.get(p, {}):
            states[p]["step"] = states[p]["step"].to(p.device if fused or group["capturable"] else "cpu")


def _check_names(groups: list[dict[str, Any]]) -> None:
    """Raise a ``ValueError`` if some parameters have names and others have none, as torch does."""
    named = {bool(name) for group in groups for name, _ in group["params"]}
    require(
        len(named) < 2,
        "all parameters must have names, or none",
        "some of each",
        "Pass (name, parameter) pairs for all of them, as in model.named_parameters().",
    )


def _description(routes: list[tuple[str, torch.Tensor, Route]], muon: AdaptiveMuon, *, each: bool) -> str:
    """Return the table that :meth:`HybridAdaptiveMuon.describe` returns."""
    titles = {"adaptive_muon": f"AdaptiveMuon ({muon.moment2_method})", "adamw": "AdamW", "frozen": "frozen"}
    lines = []
    for part, title in titles.items():
        rows = [row for row in routes if part == (row[2].algorithm if row[1].requires_grad else "frozen")]
        line = f"{title}: {len(rows)} parameters, {sum(p.numel() for _, p, _ in rows):,} elements"
        for reason, text in (
            (NOT_A_MAP, NOT_A_MAP),
            (EXPERTS, "3-D, stacks of experts"),
            (STACK, "3-D, stacks of experts perhaps"),
        ):
            count = sum(route.reason.startswith(reason) for *_, route in rows) if part == "adamw" else 0
            line += f"; {count} of them {text}" if count else ""
        shared = Counter(muon.state_format.sharding.replicas_of(p) for _, p, _ in rows if part == "adaptive_muon")
        for replicas, count in sorted(shared.items()):
            line += f"; {count} shared by {replicas} replicas" if replicas > 1 else ""
        lines.append(line)
        for name, p, route in rows if each else ():
            blocks = muon.state_format.sharding.rules.blocks(p) if route.algorithm == "adaptive_muon" else None
            recognized = blocks is None or (route.parts is not None and route.parts.blocks == blocks)
            text = route.text if recognized else f"{route.reason}, blocks of {in_words(blocks)}"
            lines.append(f"  {' x '.join(map(str, p.shape)):>15}  {name}  ({text})")
    return "\n".join(lines)
