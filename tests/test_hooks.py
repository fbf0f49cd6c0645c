# SPDX-License-Identifier: Apache-2.0
"""``weight_update_hook``: taken as upstream's base class takes it since 0.5, and called as it calls it."""

import copy
import pickle
from typing import Any, get_args

import pytest
import torch
from hooks import HOOKS, UPSTREAM_HAS_HOOKS, Restrained
from side_by_side import difference, each_method, normal, smooth
from torch import nn

import emerging_optimizers
import oracle
from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, HybridAdaptiveMuon, hooks
from emerging_optimizers.orthogonalized_optimizers import adaptive_muon as upstream
from emerging_optimizers.orthogonalized_optimizers.muon import Muon


each_hook = pytest.mark.parametrize("name", HOOKS)
HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "fp32_matmul_prec": "highest"}


@pytest.fixture(autouse=True)
def upstream_has_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed release may have none."""
    monkeypatch.setattr(hooks, "find_spec", lambda name: True)


class ByExtensionPoints(upstream.AdaptiveMuon):
    """Upstream's class, which calls no such hook itself, with a hook in its extension points."""

    def pre_weight_update_fn_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
        self.before = self.hook.pre_weight_update_inplace(p, update)

    def post_weight_update_fn_inplace(self, p: torch.Tensor) -> None:
        self.hook.post_weight_update_inplace(p, self.before)


@each_hook
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)], ids=["tall", "wide"])
@pytest.mark.parametrize("method", get_args(upstream.Moment2MethodT))
def test_same_path_as_upstream_with_the_hook(method: str, shape: tuple[int, int], name: str) -> None:
    initial, *gradients = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    theirs = ByExtensionPoints([nn.Parameter(initial.clone())], moment2_method=method, **HYPER)
    theirs.hook = HOOKS[name]
    ours, without = (
        AdaptiveMuon(
            [nn.Parameter(initial.clone())],
            moment2_method=method,
            weight_update_hook=hook,
            ns_algorithm="standard",
            **HYPER,
        )
        for hook in (HOOKS[name], None)
    )
    path, own, other = (oracle.walk(each, gradients) for each in (theirs, ours, without))
    assert oracle.disagreement(own, path, initial) <= 2e-5
    assert oracle.disagreement(other, path, initial) > 1e-3


class Noting:
    """Notes in which order what is called, and with which norms."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def note(self, what: str, p: torch.Tensor) -> None:
        self.calls.append((what, id(p), round(float(p.detach().norm()), 4)))

    def pre_weight_update_inplace(self, p: torch.Tensor, update: torch.Tensor) -> str:
        self.note("before", p)
        assert torch.all(update == 1)  # what the function before it has left
        update.fill_(2.0)
        return f"state of {id(p)}"

    def post_weight_update_inplace(self, p: torch.Tensor, pre_update_state: str) -> None:
        assert pre_update_state == f"state of {id(p)}"
        self.note("after", p)


def noting(kind: type) -> Any:
    """A subclass with both functions of upstream's."""

    class Functions(kind):  # type: ignore[misc]
        def pre_weight_update_fn_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
            self.noting.note("function before", p)
            update.fill_(1.0)

        def post_weight_update_fn_inplace(self, p: torch.Tensor) -> None:
            self.noting.note("function after", p)
            with torch.no_grad():
                p.mul_(0.5)

    return Functions


KINDS = [AdaptiveMuon, pytest.param(Muon, marks=pytest.mark.skipif(not UPSTREAM_HAS_HOOKS, reason="needs 0.5"))]


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_calls(kind: type) -> None:
    """Decay, function, hook, update, function, hook: for one parameter after the other. Upstream's Muon is the model."""
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(3)]
    calls: list[Any] = []
    hook = Noting(calls)
    optimizer = noting(kind)(params, lr=0.5, weight_decay=0.4, weight_update_hook=hook)
    optimizer.noting = hook
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    root = 12**0.5
    norms = (("function before", 0.8), ("before", 0.8), ("function after", -0.2), ("after", -0.1))
    assert calls == [(what, id(p), round(abs(norm) * root, 4)) for p in params for what, norm in norms]


@each_hook
@each_method
def test_a_stack_is_its_matrices(method: str, name: str) -> None:
    """Also one that is stored (in, out): the hook gets every expert's matrix."""
    options = {**HYPER, "moment2_method": method, "weight_update_hook": HOOKS[name], **smooth(method)}
    whole, transposed = nn.Parameter(normal((3, 12, 8))), nn.Parameter(normal((3, 12, 8)).mT.clone())
    for p in (whole, transposed):
        p.muon_stacked = True  # type: ignore[attr-defined]
    transposed.muon_transposed = True  # type: ignore[attr-defined]
    parts = [nn.Parameter(matrix.clone()) for matrix in whole.detach()]
    optimizers = [AdaptiveMuon(params, **options) for params in ([whole], [transposed], parts)]
    for step in range(3):
        gradient = normal((3, 12, 8), 1 + step) * torch.tensor([1.0, 1e-2, 30.0]).view(3, 1, 1)
        whole.grad, transposed.grad = gradient.clone(), gradient.mT.clone()
        for part, grad in zip(parts, gradient, strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    together = torch.stack([part.detach() for part in parts])
    assert difference(whole, together) <= 1e-4
    assert difference(transposed.mT, together) <= 1e-4


class Shapes:
    """Notes the shapes that it gets."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def pre_weight_update_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
        self.seen.append((tuple(p.shape), tuple(update.shape), p.requires_grad))

    def post_weight_update_inplace(self, p: torch.Tensor, pre_update_state: None) -> None:
        assert pre_update_state is None


def test_sees_parameters_as_they_are_stored() -> None:
    """A fused one whole, as upstream's class would; one stored (in, out) so; the parameter itself."""
    fused, stored, beside = (nn.Parameter(normal(shape)) for shape in ((20, 6), (6, 20), (5, 21)))
    fused.muon_blocks, beside.muon_blocks = (3, 2), ColumnBlocks((4, 2, 1))  # type: ignore[attr-defined]
    stored.muon_transposed = True  # type: ignore[attr-defined]
    hook = Shapes()
    optimizer = AdaptiveMuon([fused, stored, beside], weight_update_hook=hook)
    for p in (fused, stored, beside):
        p.grad = torch.ones_like(p)
    optimizer.step()
    shapes = [(5, 21), (6, 20), (20, 6)]
    assert sorted(hook.seen) == [(shape, shape, True) for shape in shapes]


@each_hook
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, name: str) -> None:
    """The path of float32, to the dtype's rounding. Upstream's own hooks take no norms of float64."""
    if dtype == torch.float64 and name != "ours":
        pytest.skip("upstream's hooks do not take it")
    paths = []
    for each in (dtype, torch.float32):
        p = nn.Parameter(normal((16, 12)).to(dtype).to(each))
        optimizer = AdaptiveMuon([p], weight_update_hook=HOOKS[name], moment2_method="namo", **HYPER)
        paths.append(oracle.walk(optimizer, [normal((16, 12), 1 + step).to(dtype) for step in range(3)])[-1])
    assert paths[0].dtype == dtype
    assert difference(paths[0].float(), paths[1]) <= 16 * max(torch.finfo(dtype).eps, 1e-7)


def test_a_first_step_that_makes_state_only_calls_none() -> None:
    p, hook = nn.Parameter(torch.ones(3, 4)), Shapes()
    optimizer = AdaptiveMuon([p], lr=0.0, weight_update_hook=hook)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.state[p] and not hook.seen


@pytest.mark.parametrize("how", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_keep_it(how: Any) -> None:
    initial, *gradients = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0))
    optimizer = AdaptiveMuon([nn.Parameter(initial.clone())], weight_update_hook=Restrained(), **HYPER)
    copied = how(optimizer)
    one, other = (oracle.walk(each, gradients)[-1] for each in (optimizer, copied))
    assert torch.equal(one, other)


def test_the_hybrid_passes_it_on() -> None:
    """To the matrices; AdamW's parameters have none."""
    model, hook = nn.Linear(4, 3), Shapes()
    optimizer = HybridAdaptiveMuon.from_model(model, weight_update_hook=hook, routes={"weight": "adaptive_muon"})
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert hook.seen == [((3, 4), (3, 4), True)]


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
def test_an_older_upstream_is_named(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(hooks, "find_spec", lambda name: None)
    version = emerging_optimizers.__version__
    with pytest.raises(ValueError) as error:
        make([torch.ones(2, 3)], weight_update_hook=Restrained())
    assert f"weight_update_hook must be None with emerging-optimizers {version}, which" in str(error.value)
    assert str(error.value).endswith(". Install emerging-optimizers 0.5 or newer.")
    make([torch.ones(2, 3)])


def test_looks_for_upstreams_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if UPSTREAM_HAS_HOOKS:
        AdaptiveMuon([torch.ones(2, 3)], weight_update_hook=Restrained())
    else:
        with pytest.raises(ValueError, match="Install emerging-optimizers 0.5"):
            AdaptiveMuon([torch.ones(2, 3)], weight_update_hook=Restrained())


BAD = {"class": Restrained, "object": object(), "name": "hyperball", "function": lambda p, update: None}


@pytest.mark.parametrize("hook", BAD.values(), ids=BAD)
def test_what_is_no_hook_is_refused(hook: Any) -> None:
    with pytest.raises(
        ValueError, match="weight_update_hook must be a hook with the methods pre_.* got .*. Pass an object"
    ):
        AdaptiveMuon([torch.ones(2, 3)], weight_update_hook=hook)


def test_no_group_may_have_its_own() -> None:
    with pytest.raises(ValueError, match=r"options of a group must be among .*, got \['weight_update_hook'\]"):
        AdaptiveMuon([{"params": [torch.ones(2, 3)], "weight_update_hook": Restrained()}])
