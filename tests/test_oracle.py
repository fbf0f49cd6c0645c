# SPDX-License-Identifier: Apache-2.0
"""The optimizer in float32 walks the float64 oracle's path, whatever the options."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from emerging_optimizers.adaptive_muon import AdaptiveMuon, Moment2MethodT


METHODS = tuple(oracle.METHODS)
DECAYS = ("decoupled", "independent", "l2", "palm", "adaptive", "cautious")
SCALES = ("shape_scaling", "spectral", "unit_rms_norm")
COEFFICIENTS = ("simple", "quintic", "polar_express", "cans", "aol", "deepseekv4")
SHAPES = [(24, 8), (8, 24), (12, 12), (1, 16), (16, 1)]

# Newton-Schulz multiplies a small singular value, and its rounding with it, by the product of the a, about 500.
# AdaMuon then divides each entry of O by its own size, so an entry near 0 brings its rounding into W at full size.
ADAMUON_TOLERANCE = 1e-3


def legal(method: str, decay: str) -> bool:
    """NAMO's D is a ratio to the raw gradient, which l2 would hide; only such a D can scale the decay."""
    return decay != "l2" if method.startswith("namo") else decay != "adaptive"


PAIRS = [(method, decay) for method in METHODS for decay in DECAYS if legal(method, decay)]
REFUSED = [(method, decay) for method in METHODS for decay in DECAYS if not legal(method, decay)]


def test_every_method_has_its_oracle() -> None:
    assert set(METHODS) == set(get_args(Moment2MethodT)), "write the new method's formula in tests/oracle.py"


def problem(rows: int, columns: int, steps: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A weight matrix, and gradients that agree from step to step in some columns and are noise in the others."""
    generator = torch.Generator().manual_seed(seed)
    initial, drift, *noise = torch.randn(2 + steps, rows, columns, generator=generator)
    drift = drift * (torch.arange(columns) % 3)
    return initial, [drift + (1 + t / 2) * noise[t] for t in range(steps)]


def check(
    initial: torch.Tensor, gradients: list[torch.Tensor], method: str, tolerance: float = 5e-5, **hyper: Any
) -> None:
    parameter = torch.nn.Parameter(initial.clone())
    optimizer = AdaptiveMuon([parameter], moment2_method=method, fp32_matmul_prec="highest", **hyper)
    path = oracle.walk(optimizer, gradients)
    reference = oracle.trajectory(method, initial, gradients, **hyper)
    assert oracle.disagreement(path, reference, initial) <= (
        max(tolerance, ADAMUON_TOLERANCE) if method == "adamuon" else tolerance
    )


@pytest.mark.parametrize("bias_correction", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
@pytest.mark.parametrize("scale_mode", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("method", "decay"), PAIRS)
def test_options(
    method: str, decay: str, shape: tuple, scale_mode: str, nesterov: bool, bias_correction: bool
) -> None:
    check(
        *problem(*shape, steps=5),
        method,
        lr=0.02,
        momentum=0.9,
        weight_decay=0.1,
        nesterov=nesterov,
        weight_decay_method=decay,
        scale_mode=scale_mode,
        extra_scale_factor=0.7,
        beta2=0.8,
        bias_correction=bias_correction,
    )


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)], ids=["tall", "wide"])
@pytest.mark.parametrize("num_ns_steps", [1, 5, 8, 11])
@pytest.mark.parametrize("coefficient_type", COEFFICIENTS)
def test_coefficients(coefficient_type: str, num_ns_steps: int, shape: tuple) -> None:
    check(*problem(*shape, steps=3), "namo_d", lr=0.02, coefficient_type=coefficient_type, num_ns_steps=num_ns_steps)


@pytest.mark.parametrize("method", METHODS)
def test_defaults(method: str) -> None:
    check(*problem(16, 12, steps=5), method)


@pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])
@pytest.mark.parametrize("method", METHODS)
def test_an_eps_that_matters(method: str, nesterov: bool) -> None:
    check(*problem(16, 12, steps=5), method, lr=0.02, eps=0.1, nesterov=nesterov)


@pytest.mark.parametrize("clamp", [0.05, 0.4, 0.9, 1.0])
def test_namo_d_clamp(clamp: float) -> None:
    check(*problem(12, 9, steps=5), "namo_d", lr=0.02, namo_d_clamp=clamp)


@pytest.mark.parametrize(("method", "decay"), REFUSED)
def test_refused(method: str, decay: str) -> None:
    with pytest.raises(ValueError, match=decay):
        AdaptiveMuon([torch.zeros(2, 3)], moment2_method=method, weight_decay_method=decay)


@st.composite
def hypers(draw: st.DrawFn) -> dict[str, Any]:
    method, decay = draw(st.sampled_from(PAIRS))
    return {
        "method": method,
        "weight_decay_method": decay,
        "lr": draw(st.floats(1e-4, 0.1)),
        "momentum": draw(st.floats(0, 0.99)),
        "weight_decay": draw(st.floats(0, 0.5)),
        "nesterov": draw(st.booleans()),
        "coefficient_type": draw(st.sampled_from(COEFFICIENTS)),
        "num_ns_steps": draw(st.integers(1, 6)),
        "scale_mode": draw(st.sampled_from(SCALES)),
        "extra_scale_factor": draw(st.floats(0.1, 2)),
        "beta2": draw(st.floats(0, 0.999)),
        "eps": draw(st.sampled_from([1e-10, 1e-8, 1e-3])),
        "bias_correction": draw(st.sampled_from([None, False, True])),
        "namo_d_clamp": draw(st.floats(0.01, 1)),
    }


@settings(deadline=None, max_examples=60, derandomize=True)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 2**16), hyper=hypers())
def test_anything(rows: int, columns: int, seed: int, hyper: dict[str, Any]) -> None:
    # Of rank 1, a singular value starts at 1, where the polynomials of cans are steep: three take 1e-7 to 2e-4.
    check(*problem(rows, columns, steps=3, seed=seed), tolerance=1e-3, **hyper)
