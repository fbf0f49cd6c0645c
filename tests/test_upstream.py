# SPDX-License-Identifier: Apache-2.0
"""Side by side with upstream's own AdaptiveMuon: the same arguments, path, extension points and checkpoints."""

import sys
from collections.abc import Iterator
from copy import deepcopy
from inspect import signature
from typing import Any, get_args

import pytest
import torch

import oracle
from emerging_optimizers import triton_kernels
from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.orthogonalize import newton_schulz as orthogonalize
from emerging_optimizers.mixin import WeightDecayT
from emerging_optimizers.orthogonalized_optimizers import adaptive_muon as upstream
from emerging_optimizers.orthogonalized_optimizers import muon_utils
from emerging_optimizers.orthogonalized_optimizers.muon import Muon


METHODS = get_args(upstream.Moment2MethodT)
PAIRS = [
    (method, decay) for method in METHODS for decay in get_args(WeightDecayT) if (method, decay) != ("namo", "l2")
]
SCALES = ("shape_scaling", "spectral", "unit_rms_norm")
SHAPES = [(48, 16), (16, 48), (32, 32)]
HYPER = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "beta2": 0.8, "fp32_matmul_prec": "highest"}


def tolerance(scale_mode: str = "spectral") -> float:
    """The spectral scale is the largest of the three: W moves further, and its rounding counts for less."""
    return 2e-5 if scale_mode == "spectral" else 1e-4


def problem(shape: tuple[int, int], steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    initial, *gradients = torch.randn(1 + steps, *shape, generator=torch.Generator().manual_seed(0))
    return initial, gradients


def new(kind: type, initial: torch.Tensor, **hyper: Any) -> torch.optim.Optimizer:
    ours = {"ns_algorithm": "standard"} if issubclass(kind, AdaptiveMuon) else {}
    return kind([torch.nn.Parameter(initial.clone())], **HYPER | ours | hyper)


# ---------------------------------------------------------------------------------------------------- the same path


@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
@pytest.mark.parametrize("scale_mode", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide", "square"])
@pytest.mark.parametrize(("method", "decay"), PAIRS)
def test_same_path(method: str, decay: str, shape: tuple[int, int], scale_mode: str, nesterov: bool) -> None:
    initial, gradients = problem(shape, steps=5)
    hyper = {"moment2_method": method, "weight_decay_method": decay, "scale_mode": scale_mode, "nesterov": nesterov}
    theirs, ours = (
        oracle.walk(new(kind, initial, **hyper), gradients) for kind in (upstream.AdaptiveMuon, AdaptiveMuon)
    )
    # raw, with nothing taken off for rounding: both round alike
    assert torch.linalg.norm(ours[-1] - theirs[-1]) <= tolerance(scale_mode) * torch.linalg.norm(theirs[-1] - initial)


@pytest.mark.parametrize("method", METHODS)
def test_same_path_at_the_default_precision(method: str) -> None:
    """bfloat16 products: the same, and far from those in float32."""
    initial, gradients = problem((48, 32), steps=5)
    kinds = ((upstream.AdaptiveMuon, "medium"), (AdaptiveMuon, "medium"), (AdaptiveMuon, "highest"))
    theirs, ours, exact = (
        oracle.walk(new(kind, initial, moment2_method=method, fp32_matmul_prec=precision), gradients)[-1]
        for kind, precision in kinds
    )
    gone = torch.linalg.norm(theirs - initial)
    assert torch.linalg.norm(ours - theirs) <= 2e-5 * gone
    assert torch.linalg.norm(exact - theirs) > 1e-3 * gone
    assert torch.get_float32_matmul_precision() == "highest"  # as it was


# The least norm that upstream divides by: 1e-7 in 0.3, 1e-15 since 0.4.
LEAST_NORM = signature(muon_utils.newton_schulz).parameters["eps"].default


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("algorithm", get_args(orthogonalize.NSAlgorithmT))
@pytest.mark.parametrize("scale", [1e-6, 1e-12])
@pytest.mark.parametrize("method", ["normuon", "adamuon"])
def test_tiny_gradients_move_as_far(method: str, scale: float, algorithm: str, precision: Any) -> None:
    """As after a clipped loss spike: by all algorithms, beside any release; and as 0.4 does. 0.3 stalls."""
    initial, gradients = problem((24, 40), steps=2)
    hyper = {"moment2_method": method, "fp32_matmul_prec": precision, "weight_decay": 0.0, "eps": 1e-3}
    tiny = [scale * gradient for gradient in gradients]
    usual = oracle.walk(new(AdaptiveMuon, initial, ns_algorithm=algorithm, **hyper), gradients)[-1]
    ours = oracle.walk(new(AdaptiveMuon, initial, ns_algorithm=algorithm, **hyper), tiny)[-1]
    theirs = oracle.walk(new(upstream.AdaptiveMuon, initial, **hyper), tiny)[-1]
    gone = torch.linalg.norm(usual - initial)
    assert torch.linalg.norm(ours - usual) <= (1e-3 if precision == "highest" else 0.05) * gone
    if LEAST_NORM == 1e-15:
        assert torch.linalg.norm(ours - theirs) <= (1e-3 if precision == "highest" else 0.05) * gone
    elif scale == 1e-12 and method == "normuon":
        assert torch.linalg.norm(theirs - initial) < 0.1 * gone


@pytest.mark.parametrize("method", METHODS)
def test_an_upstream_checkpoint_goes_on(method: str) -> None:
    initial, gradients = problem((24, 40), steps=6)
    theirs = new(upstream.AdaptiveMuon, initial, moment2_method=method)
    half = oracle.walk(theirs, gradients[:3])[-1]
    ours = new(AdaptiveMuon, half, moment2_method=method, lr=1.0, momentum=0.1, beta2=0.1)  # the checkpoint's win
    ours.load_state_dict(deepcopy(theirs.state_dict()))  # a copy, as by way of a file
    rest = oracle.walk(theirs, gradients[3:])
    assert oracle.disagreement(oracle.walk(ours, gradients[3:]), rest, half) <= tolerance()


# ----------------------------------------------------------------------------------------------- the same signature


def test_every_upstream_argument_is_here() -> None:
    theirs, ours = (signature(kind).parameters for kind in (upstream.AdaptiveMuon, AdaptiveMuon))
    given_defaults = {"lr": 3e-4, "momentum": 0.95, "weight_decay": 0.01}
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == given_defaults.get(name, parameter.default), name
    positional = [name for name, parameter in theirs.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


def test_is_an_upstream_adaptive_muon() -> None:
    assert isinstance(AdaptiveMuon([torch.zeros(2, 3)]), upstream.AdaptiveMuon)


def test_upstreams_options_are_left_to_upstream() -> None:
    """Since 0.5 upstream's Muon has them as properties that cannot be set; its AdaptiveMuon may follow."""
    options = signature(upstream.AdaptiveMuon).parameters.keys() | signature(Muon).parameters.keys()
    assert {"scale_mode", "num_ns_steps", "extra_scale_factor"} <= options

    class ReadOnly(AdaptiveMuon):
        def __setattr__(self, name: str, value: Any) -> None:
            code = sys._getframe(1).f_code
            assert name not in options or "emerging_optimizers/adaptive_muon/" not in code.co_filename, (
                f"{code.co_name} sets {name}"
            )
            super().__setattr__(name, value)

    initial, gradients = problem((4, 6), steps=1)
    optimizer = new(ReadOnly, initial)
    oracle.walk(optimizer, gradients)
    resumed = new(ReadOnly, initial)
    resumed.load_state_dict(optimizer.state_dict())
    deepcopy(resumed).step()


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (10, 1), (10, 3), (12, 0), None])
def test_syrk_is_used_where_upstream_uses_it(monkeypatch: Any, capability: Any, has_triton: bool) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for module in (triton_kernels, orthogonalize):
        monkeypatch.setattr(module, "HAS_TRITON_340", has_triton)
    monkeypatch.setattr(muon_utils, "newton_schulz", lambda grad, use_syrk, **_: seen.append(use_syrk) or grad)
    Muon([torch.ones(8, 8)], use_syrk=True).scaled_orthogonalize_fn(torch.ones(8, 8))
    [theirs] = seen
    assert AdaptiveMuon([torch.ones(8, 8)], use_syrk=True).options.use_syrk is theirs


# ---------------------------------------------------------------------------------------- the same extension points


def matrices() -> Iterator[torch.nn.Parameter]:
    """Two of one shape, which may be worked on together, and one of another."""
    generator = torch.Generator().manual_seed(1)
    for shape in [(6, 4), (6, 4), (3, 8)]:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = torch.randn(shape, generator=generator)
        yield p


class Hooked(AdaptiveMuon):
    """Notes what the hooks see, and multiplies the update by `factor`."""

    factor = 1.0

    def pre_weight_update_fn_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
        self.pre = getattr(self, "pre", [])
        self.pre.append((p, p.detach().clone(), update.clone()))
        update.mul_(self.factor)

    def post_weight_update_fn_inplace(self, p: torch.Tensor) -> None:
        self.post = getattr(self, "post", [])
        self.post.append((p, p.detach().clone()))


@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_around_the_weight_update(method: str, factor: float) -> None:
    parameters = list(matrices())
    before = [p.detach().clone() for p in parameters]
    optimizer = Hooked(
        [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}], moment2_method=method, lr=0.3
    )
    optimizer.factor = factor
    for count in (1, 2):
        optimizer.step()
        assert sorted(id(p) for p, *_ in optimizer.pre) == sorted(count * [id(p) for p in parameters])
        assert sorted(id(p) for p, *_ in optimizer.post) == sorted(count * [id(p) for p in parameters])
        if count == 1:
            seen = {p: (at_pre, update) for p, at_pre, update in optimizer.pre}
            after = dict(optimizer.post)
    for p, W, lr in zip(parameters, before, (0.1, 0.3, 0.3), strict=True):
        at_pre, update = seen[p]
        torch.testing.assert_close(at_pre, W * (1 - lr * 0.01), atol=1e-6, rtol=1e-6)  # decayed, and not yet moved
        torch.testing.assert_close(after[p], at_pre - lr * factor * update, atol=1e-6, rtol=1e-6)
        assert update.norm() > 0.1


class WithOwnOrthogonalize:
    """The use that upstream documents: a fused matrix, each half orthogonalized by itself."""

    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.seen = getattr(self, "seen", [])
        self.seen.append((p, kwargs["lr"]))
        return torch.cat(
            [super(WithOwnOrthogonalize, self).orthogonalize(p, half, **kwargs) for half in grad.chunk(2)]
        )


@pytest.mark.parametrize("method", METHODS)
def test_orthogonalize_can_be_overridden(method: str) -> None:
    results = []
    for kind in (upstream.AdaptiveMuon, AdaptiveMuon):
        parameters = list(matrices())
        derived = type("Derived", (WithOwnOrthogonalize, kind), {})
        groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}]
        optimizer = derived(groups, moment2_method=method, **HYPER)
        for _ in range(3):
            optimizer.step()
        assert sorted((id(p), lr) for p, lr in optimizer.seen) == sorted(
            3 * [(id(p), lr) for p, lr in zip(parameters, (0.1, 0.02, 0.02), strict=True)]
        )
        results.append([p.detach() for p in parameters])
    for theirs, ours, initial in zip(*results, matrices(), strict=True):
        assert oracle.disagreement([ours], [theirs], initial) <= 1e-4


@pytest.mark.parametrize("by", ["p", "p.data"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_hook_sees_the_decayed_weight_and_its_change_stays(dtype: torch.dtype, by: str) -> None:
    class Zeroing(AdaptiveMuon):
        def pre_weight_update_fn_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
            self.seen, self.update = p.detach().clone(), update
            (p if by == "p" else p.data).zero_()

    initial, gradients = problem((8, 6), steps=1)
    optimizer = new(Zeroing, initial.to(dtype), lr=0.5, weight_decay=0.5)
    [weight] = oracle.walk(optimizer, gradients)
    torch.testing.assert_close(optimizer.seen, (0.75 * initial.to(dtype).float()).to(dtype), atol=0, rtol=0)
    torch.testing.assert_close(weight, (-0.5 * optimizer.update).to(dtype), atol=0, rtol=0)
