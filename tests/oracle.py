# SPDX-License-Identifier: Apache-2.0
"""The four methods on one whole matrix, in float64: read from the top, this file is the tutorial.

Every method is the same step,

    W  <-  W  -  lr * s * (D (.) O)

    G   the gradient of the weight matrix W, which has m rows and n columns
    M   the momentum: a running average of G. M' is what is orthogonalized: M, or with Nesterov a look ahead of it
    O   M' with all its singular values pulled towards 1: the step has a direction from G and no size from it
    D   how far to go along O, from a second running average V: a number, a row, a column or a matrix
    s   a factor from the shape (m, n), so that one learning rate serves matrices of every shape

and the methods differ in V and D alone. Steps are counted t = 1, 2, ...; the running averages start from 0.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from emerging_optimizers.orthogonalized_optimizers.muon_utils import _COEFFICIENT_SETS  # the published numbers only


@dataclass(frozen=True)
class Hyper:
    """What the user chooses; the defaults are the optimizer's own."""

    lr: float = 3e-4
    momentum: float = 0.95
    weight_decay: float = 0.01
    nesterov: bool = False
    weight_decay_method: str = "decoupled"
    coefficient_type: str = "quintic"
    num_ns_steps: int = 5
    scale_mode: str = "spectral"
    extra_scale_factor: float = 1.0
    beta2: float = 0.95
    eps: float = 1e-8
    bias_correction: bool = False
    namo_d_clamp: float = 0.75


def ema(average: Tensor, new: Tensor, decay: float) -> Tensor:
    """A running average: keep `decay` of the old, add `1 - decay` of the new."""
    return decay * average + (1 - decay) * new


# ----------------------------------------------------------------------------------------------- O: the direction


def coefficients(coefficient_type: str, steps: int) -> list[tuple[float, float, float]]:
    """One (a, b, c) for each step. A list that is too short goes on with its last entry, or starts again."""
    table = _COEFFICIENT_SETS[coefficient_type]
    if coefficient_type in ("polar_express", "cans", "deepseekv4"):
        table = table + [table[-1]] * steps  # these end in a polynomial that is made to be repeated
    return [table[i % len(table)] for i in range(steps)]


def newton_schulz(M: Tensor, coefficient_type: str = "quintic", num_ns_steps: int = 5) -> Tensor:
    """O: an odd polynomial, applied again and again, pulls every singular value of M towards 1."""
    m, n = M.shape
    X = M.mT if m > n else M  # A = X X^T is then the smaller of the two Gram matrices
    X = X / max(torch.linalg.norm(X).item(), 1e-7)  # no singular value is above 1 now
    for a, b, c in coefficients(coefficient_type, num_ns_steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X  # each singular value x becomes a x + b x^3 + c x^5
    return X.mT if m > n else X


# ------------------------------------------------------------------------------------------- s: the shape's factor


def muon_scale(m: int, n: int, scale_mode: str) -> float:
    """`spectral` keeps an entry of O near 1 in size; the other two bound how much W x can change for unit x."""
    return {
        "shape_scaling": sqrt(max(1, m / n)),
        "spectral": sqrt(max(m, n)),
        "unit_rms_norm": sqrt(m / n),
    }[scale_mode]


# ------------------------------------- V and D: the four methods. Each gets the old V and gives (the new V, D)


def adamuon(V: Tensor, G: Tensor, M: Tensor, O: Tensor, t: int, h: Hyper) -> tuple[Tensor, Tensor]:
    """AdaMuon (arXiv:2507.11005): Adam's rule, entry by entry, with O in the gradient's place."""
    V = ema(V, O * O, h.beta2)
    D = 1 / (V.sqrt() + h.eps)
    if h.bias_correction:
        D = D * sqrt(1 - h.beta2**t)  # V is still small. O is not: it has the same size however small M is
    return V, D


def normuon(V: Tensor, G: Tensor, M: Tensor, O: Tensor, t: int, h: Hyper) -> tuple[Tensor, Tensor]:
    """NorMuon (arXiv:2510.05491): even out the rows (of a wide matrix: the columns), and keep O's length."""
    m, n = O.shape
    V = ema(V, (O * O).mean(dim=-1 if m >= n else -2, keepdim=True), h.beta2)
    r = V.clamp(min=h.eps) ** -0.5
    D = r * torch.linalg.norm(O) / torch.linalg.norm(r * O).clamp(min=h.eps)  # a factor on V would cancel here
    return V, D


def momentum_correction(t: int, h: Hyper) -> float:
    """After t steps from 0, M lacks the factor 1 - momentum^t and sqrt(V) the factor sqrt(1 - beta2^t)."""
    return sqrt(1 - h.beta2**t) / (1 - h.momentum**t) if h.bias_correction else 1.0


def namo(V: Tensor, G: Tensor, M: Tensor, O: Tensor, t: int, h: Hyper) -> tuple[Tensor, Tensor]:
    """NAMO (arXiv:2602.17080): one number, near 1 where gradients agree and small where they are noise."""
    V = ema(V, (G * G).sum(), h.beta2)
    alpha = momentum_correction(t, h) * torch.linalg.norm(M) / (V.sqrt() + h.eps)
    return V, alpha


def namo_d(V: Tensor, G: Tensor, M: Tensor, O: Tensor, t: int, h: Hyper) -> tuple[Tensor, Tensor]:
    """NAMO-D (the same paper): NAMO's number for each column, none of them far from the columns' mean."""
    V = ema(V, (G * G).sum(dim=0, keepdim=True), h.beta2)
    d = momentum_correction(t, h) * torch.linalg.norm(M, dim=0, keepdim=True) / (V.sqrt() + h.eps)
    mean = d.mean()
    return V, d.clamp(min=h.namo_d_clamp * mean, max=mean / h.namo_d_clamp)


METHODS = {"adamuon": adamuon, "normuon": normuon, "namo": namo, "namo_d": namo_d}


# --------------------------------------------------------------------------------------------------- the whole step


def step(method: str, W: Tensor, M: Tensor, V: Tensor, G: Tensor, t: int, h: Hyper) -> tuple[Tensor, Tensor, Tensor]:
    """One step: gives the new W, M and V."""
    match h.weight_decay_method:
        case "decoupled":
            W = W - h.lr * h.weight_decay * W
        case "independent":
            W = W - h.weight_decay * W
        case "palm":
            W = W - h.lr**2 * h.weight_decay * W
        case "l2":
            G = G + h.weight_decay * W

    M = ema(M, G, h.momentum)
    M_ahead = ema(M, G, h.momentum) if h.nesterov else M  # Nesterov: count today's gradient once more
    O = newton_schulz(M_ahead, h.coefficient_type, h.num_ns_steps)
    V, D = METHODS[method](V, G, M_ahead, O, t, h)

    if h.weight_decay_method == "adaptive":
        W = W * (1 - h.lr * h.weight_decay * D)  # NAMO's own decay: W shrinks where, and as far as, it moves
    s = muon_scale(*W.shape, h.scale_mode) * h.extra_scale_factor
    if h.weight_decay_method == "cautious":
        W = W - h.lr * h.weight_decay * W * (s * D * O * W >= 0)  # only where the step goes towards zero too
    return W - h.lr * s * D * O, M, V


def trajectory(method: str, initial: Tensor, gradients: list[Tensor], **hyper: object) -> list[Tensor]:
    """The weights, in float64, after each of the steps that `gradients` holds."""
    if hyper.get("bias_correction") is None:
        hyper["bias_correction"] = method == "namo_d"  # what each method's source does
    h = Hyper(**hyper)
    W, M, V = initial.double(), torch.zeros(()), torch.zeros(())
    path = []
    for t, G in enumerate(gradients, start=1):
        W, M, V = step(method, W, M, V, G.double(), t, h)
        path.append(W)
    return path


# -------------------------------------------------------------- to lay an optimizer's path beside another one's


def walk(optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> list[Tensor]:
    """The weights of the optimizer's one parameter after each of the steps that `gradients` holds."""
    [p] = optimizer.param_groups[0]["params"]
    path = []
    for G in gradients:
        p.grad = G.to(p.dtype, copy=True)
        optimizer.step()
        path.append(p.detach().clone())
    return path


def disagreement(path: list[Tensor], reference: list[Tensor], initial: Tensor) -> float:
    """How far two paths end from each other, as a part of the way gone.

    What float32 cannot avoid is taken off first: W itself is rounded (by 2^-24 of it) when decayed and when moved.
    """
    apart = torch.linalg.norm(path[-1].double() - reference[-1].double()).item()
    gone = torch.linalg.norm(reference[-1].double() - initial.double()).item()
    rounding = 2 * len(path) * 2**-24 * torch.linalg.norm(initial.double()).item()
    return max(apart - rounding, 0.0) / gone if gone else apart
