# SPDX-License-Identifier: Apache-2.0
"""A summary over matrices, so that a thousand of them do not make ten thousand curves."""

import math
from collections.abc import Mapping

import torch


__all__ = ["PREFIX", "QUANTILES", "quantiles"]

PREFIX = "adaptive_muon"
QUANTILES = {"min": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "max": 1.0}


def quantiles(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return quantiles over matrices of every value but the step, under flat names.

    Args:
        measured: Values by their names, by the names of matrices.
    """
    if not measured:
        return {}
    rows = list(measured.values())
    summary = {f"{PREFIX}/matrices": float(len(rows))}
    not_finite = sum(not all(map(math.isfinite, _core(row))) for row in rows)
    summary[f"{PREFIX}/not_finite"] = float(not_finite)
    levels = torch.tensor([*QUANTILES.values()], dtype=torch.float64, device="cpu")
    for value in rows[0]:
        finite = [row[value] for row in rows if math.isfinite(row[value])]
        if finite and value != "step":
            of_value = torch.tensor(finite, dtype=torch.float64, device="cpu").quantile(levels).tolist()
            summary.update({f"{PREFIX}/{value}/{name}": each for name, each in zip(QUANTILES, of_value, strict=True)})
    return summary


def _core(row: Mapping[str, float]) -> list[float]:
    """What a healthy matrix has finite; ratios to a weight or gradient of zero are not."""
    return [row["gradient_norm"], row["momentum_norm"], row["weight_rms"], row["update_rms"]]
