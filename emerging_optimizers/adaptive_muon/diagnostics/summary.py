# SPDX-License-Identifier: Apache-2.0
"""A summary over matrices, so that a thousand of them do not make ten thousand curves."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from emerging_optimizers.adaptive_muon.checks import require


__all__ = ["PREFIX", "QUANTILES", "Matrices", "check_matrices", "flat", "quantiles"]

# Which values a logger gets: of the summary only, of all matrices beside, or of those whose names match a pattern.
Matrices = Literal["summary", "all"] | Sequence[str]

PREFIX = "adaptive_muon"
QUANTILES = {"min": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "max": 1.0}


def check_matrices(matrices: Any) -> None:
    """Raise a ``ValueError`` unless a value names the matrices to log."""
    is_list = isinstance(matrices, Sequence) and not isinstance(matrices, str)
    require(
        matrices in ("summary", "all") or (is_list and all(isinstance(each, str) for each in matrices)),
        'matrices must be "summary", "all" or a list of name patterns',
        matrices,
        'Pass "summary", or patterns as in fnmatch, such as ["*.qkv*"].',
    )


def flat(
    measured: Mapping[str, Mapping[str, float]], matrices: Matrices = "summary", prefix: str = PREFIX
) -> dict[str, float]:
    """Return the summary for a logger, and the values of single matrices as "adaptive_muon/update_ratio/layers.0.weight".

    Args:
        measured: Values by their names, by the names of matrices.
        matrices: Of which matrices: "summary" for none, "all", or patterns of their names.
        prefix: What all names begin with.
    """
    patterns = {"summary": [], "all": ["*"]}[matrices] if isinstance(matrices, str) else matrices
    single = {
        f"{prefix}/{value}/{name}": each
        for name, row in measured.items()
        if any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)
        for value, each in row.items()
        if value != "step"
    }
    return quantiles(measured, prefix) | single


def quantiles(measured: Mapping[str, Mapping[str, float]], prefix: str = PREFIX) -> dict[str, float]:
    """Return quantiles over matrices of every value but the step, under flat names.

    Args:
        measured: Values by their names, by the names of matrices.
        prefix: What all names begin with.
    """
    if not measured:
        return {}
    rows = list(measured.values())
    summary = {f"{prefix}/matrices": float(len(rows))}
    not_finite = sum(not all(map(math.isfinite, _core(row))) for row in rows)
    summary[f"{prefix}/not_finite"] = float(not_finite)
    levels = torch.tensor([*QUANTILES.values()], dtype=torch.float64, device="cpu")
    for value in rows[0]:
        finite = [row[value] for row in rows if math.isfinite(row[value])]
        if finite and value != "step":
            of_value = torch.tensor(finite, dtype=torch.float64, device="cpu").quantile(levels).tolist()
            summary.update({f"{prefix}/{value}/{name}": each for name, each in zip(QUANTILES, of_value, strict=True)})
    return summary


def _core(row: Mapping[str, float]) -> list[float]:
    """Return what a healthy matrix has finite; ratios to a weight or gradient of zero are not."""
    return [row["gradient_norm"], row["momentum_norm"], row["weight_rms"], row["update_rms"]]
