# SPDX-License-Identifier: Apache-2.0
"""A method that scales M' before it is orthogonalized goes the way of its formula in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scaled_momentum import SCALED, OfRows, registered
from side_by_side import normal

import oracle
from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS, register_moment2


OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "momentum": 0.8,
    "beta2": 0.9,
    "eps": 1e-3,
    "weight_decay": 0.1,
    "extra_scale_factor": 0.2,
    "fp32_matmul_prec": "highest",
}


@pytest.fixture
def methods() -> Iterator[None]:
    with registered():
        yield


def scale(method: str, V: torch.Tensor, G: torch.Tensor, M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """V and D of a step, from the formulas."""
    eps, beta2 = OPTIONS["eps"], OPTIONS["beta2"]
    if method == "of_columns":
        V = oracle.ema(V, (G * G).mean(0, keepdim=True), beta2)
        return V, (M * M).mean(0, keepdim=True).sqrt() / (V + eps)
    squares = M * M
    if method == "of_matrix":
        squares = squares.sum()
    elif method == "of_rows":
        squares = squares.sum(1, keepdim=True)
    V = oracle.ema(V, squares, beta2)
    return V, 1 / (V.sqrt() + eps)


def path(method: str, W: torch.Tensor, gradients: torch.Tensor, nesterov: bool) -> tuple[list[torch.Tensor], Any]:
    """The weights after each step, and V after the last."""
    lr, momentum = OPTIONS["lr"], OPTIONS["momentum"]
    W, M, V, weights = W.double(), torch.zeros(()), torch.zeros(()), []
    for G in gradients.double():
        W = W - lr * OPTIONS["weight_decay"] * W
        M = oracle.ema(M, G, momentum)
        M_prime = oracle.ema(M, G, momentum) if nesterov else M
        V, D = scale(method, V, G, M_prime)
        O = oracle.newton_schulz(D * M_prime)
        W = W - lr * oracle.muon_scale(*W.shape, "spectral") * OPTIONS["extra_scale_factor"] * O
        weights.append(W)
    return weights, V


@pytest.mark.parametrize("bias_correction", [None, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(15, 6), (6, 15), (9, 9)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("method", SCALED)
def test_whole_matrices(
    method: str, shape: tuple[int, int], nesterov: bool, bias_correction: bool | None, methods: None
) -> None:
    """Rows and columns differ in size by 30, so that a scale at another place would show."""
    initial, gradients = normal(shape), normal((4, *shape), 1)
    gradients *= torch.linspace(0.1, 3, shape[0])[:, None] * torch.linspace(3, 0.1, shape[1])
    p = torch.nn.Parameter(initial.clone())
    options = {"nesterov": nesterov, "bias_correction": bias_correction, "moment2_method": method}
    optimizer = AdaptiveMuon([p], **OPTIONS | options)
    expected, V = path(method, initial, gradients, nesterov)
    assert oracle.disagreement(oracle.walk(optimizer, [*gradients]), expected, initial) <= 2e-5
    found = optimizer.state[p]["moment2_buffer"]
    torch.testing.assert_close(found.double(), V.view_as(found), rtol=1e-5, atol=0)
    assert optimizer.state[p].get("step", 4) == 4 and ("step" in optimizer.state[p]) is bool(bias_correction)


def test_other_tests_know_nothing_of_them() -> None:
    before = dict(METHODS)
    with pytest.raises(RuntimeError, match="stop"), registered():
        assert METHODS.keys() == before.keys() | SCALED.keys()
        raise RuntimeError("stop")
    assert METHODS == before
    with pytest.raises(ValueError, match="'of_rows'"):
        AdaptiveMuon([torch.nn.Parameter(torch.ones(3, 4))], moment2_method="of_rows")


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        ({"momentum_degree": 1}, r"must have degrees of 0 .*, got \(1, "),
        ({"moment2_degree": -0.5}, r"must have degrees of 0 .*, -0.5\)"),
        ({"adaptive_decay": True}, "no adaptive_decay, got .* and True. Change"),
        ({"observed": ("orthogonalized",)}, "or not if it scales the momentum"),
        ({"observed": ("orthogonalized", "momentum"), "scales_momentum": False}, "orthogonalized last"),
    ],
)
def test_what_contradicts_itself_is_not_registered(attributes: dict[str, Any], problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        register_moment2("contradiction")(type("Contradiction", (OfRows,), attributes))
    assert "contradiction" not in METHODS
