# SPDX-License-Identifier: Apache-2.0
"""What ``diagnostics()`` should show of one whole matrix, in float64 and plain torch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oracle import METHODS, Hyper, ema, muon_scale, newton_schulz, step


def values(method: str, W: Tensor, M: Tensor, V: Tensor, G: Tensor, t: int, h: Hyper) -> dict[str, float]:
    """The values of step t, from the weight, the momentum and V before it, and its gradient."""
    if h.weight_decay_method == "l2":
        G = G + h.weight_decay * W
    M = ema(M, G, h.momentum)
    M_ahead = ema(M, G, h.momentum) if h.nesterov else M
    O = newton_schulz(M_ahead, h.coefficient_type, h.num_ns_steps)
    V, D = METHODS[method](V, G, M_ahead, O, t, h)
    m, n = W.shape
    side = min(m, n)
    U = h.lr * muon_scale(m, n, h.scale_mode) * h.extra_scale_factor * D * O
    gram = O @ O.mT if m <= n else O.mT @ O
    weight, update = rms(W), rms(U)
    shown = {
        "step": float(t),
        "gradient_norm": float(G.norm()),
        "momentum_norm": float(M_ahead.norm()),
        "cosine": float((G * M_ahead).sum() / G.norm() / M_ahead.norm()),
        "scale_mean": float(D.mean()),
        "scale_min": float(D.min()),
        "scale_max": float(D.max()),
        "weight_rms": weight,
        "update_rms": update,
        "update_ratio": update / weight,
        "orthogonality_error": float((gram - torch.eye(side, dtype=gram.dtype)).norm()) / math.sqrt(side),
    }
    if method == "namo_d":
        d = M_ahead.norm(dim=0) / (V.sqrt() + h.eps)
        c, mean = h.namo_d_clamp, float(d.mean())
        shown["clamped"] = float(((d < c * mean) | (d > mean / c)).double().mean())
    return shown


def rms(matrix: Tensor) -> float:
    return float(matrix.square().mean().sqrt())


def walked(method: str, W: Tensor, gradients: Sequence[Tensor], **hyper: Any) -> list[dict[str, float]]:
    """The values of every step from a weight on."""
    if hyper.get("bias_correction") is None:
        hyper["bias_correction"] = method == "namo_d"
    h = Hyper(**hyper)
    W, M, V, shown = W.detach().double(), torch.zeros(()), torch.zeros(()), []
    for t, G in enumerate(gradients, start=1):
        shown.append(values(method, W, M, V, G.double(), t, h))
        W, M, V = step(method, W, M, V, G.double(), t, h)
    return shown


# Beyond 8 singular values the error of O is an estimate, see orthogonalize/probes.py.
ESTIMATED = 0.5  # twice the standard error at worst


def assert_shows(shown: dict[str, float], expected: dict[str, float], side: int, rtol: float = 2e-4) -> None:
    """Checks the values of a matrix of which the smaller side is given."""
    assert shown.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = ESTIMATED if name == "orthogonality_error" and side > 8 else rtol
        assert math.isclose(shown[name], value, rel_tol=tolerance, abs_tol=1e-12), (name, shown[name], value)
