# SPDX-License-Identifier: Apache-2.0
"""How much the iteration rounds at "medium" precision: ours in float16, upstream's in bfloat16."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from on_gpu.record import Record
from on_gpu.sizes import Sizes

from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz


CONTESTANTS = {
    "ours": NewtonSchulz("quintic", 5, precision="medium"),
    "upstream": NewtonSchulz("quintic", 5, algorithm="standard", precision="medium"),
}


def run(record: Record, sizes: Sizes) -> None:
    """Measure all shapes and spectra."""
    for shape in sizes.exact:
        for spectrum, make in SPECTRA.items():
            title = f"rounding {shape[0]} x {shape[1]} {spectrum}"
            record.measure(title, partial(errors, make, shape, record.device), about=5)


def normal(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return independent normal numbers."""
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(3))


def decaying(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return normal numbers whose rows, or columns of a tall matrix, fall off to 1e-5."""
    scales = torch.logspace(0, -5, min(shape), device=device)
    return normal(shape, device) * (scales if shape[0] > shape[1] else scales[:, None])


def low_rank(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return a matrix of an eighth of the full rank, with noise of 1e-3."""
    rank = max(min(shape) // 8, 1)
    left, right = normal((sum(shape), rank), device).split(shape)
    return left @ right.mT + 1e-3 * normal(shape, device)


SPECTRA = {"normal": normal, "decaying": decaying, "low rank": low_rank}


def errors(make: Callable[..., torch.Tensor], shape: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Return the distance of each result from the float64 iteration's, relative to it."""
    X = make(shape, device)
    exact = iterated(X, CONTESTANTS["ours"].coefficients)
    return {
        name: ((function(X).double() - exact).norm() / exact.norm()).item() for name, function in CONTESTANTS.items()
    }


def iterated(X: torch.Tensor, coefficients: Sequence[tuple[float, float, float]]) -> torch.Tensor:
    """Return the iteration in float64, one step after the other."""
    X = X.double() / X.double().norm()
    is_tall = X.size(0) > X.size(1)
    X = X.mT if is_tall else X
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if is_tall else X
