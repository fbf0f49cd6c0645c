# SPDX-License-Identifier: Apache-2.0
"""What an optimizer shows of itself: the methods that AdaptiveMuon and HybridAdaptiveMuon have in common."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from emerging_optimizers.adaptive_muon.checks import refusal
from emerging_optimizers.adaptive_muon.diagnostics.report import Finding, findings, table
from emerging_optimizers.adaptive_muon.diagnostics.store import VALUES, Key, Store
from emerging_optimizers.adaptive_muon.diagnostics.summary import quantiles
from emerging_optimizers.adaptive_muon.identity import identity
from emerging_optimizers.adaptive_muon.moment2 import Moment2
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, offset_of
from emerging_optimizers.adaptive_muon.state.buffers import StateFormat


__all__ = ["Diagnosed"]


class Diagnosed:
    """An optimizer of matrices that can be measured, see the option ``diagnostics_every``.

    No method of it talks to other ranks. Each rank has the values of the whole matrices of which it holds a part.
    """

    param_groups: list[dict[str, Any]]
    state_format: StateFormat
    diagnostics_store: Store | None

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Return what was measured last of every matrix: values by their names, by the name of the matrix.

        A matrix is called as its parameter, or by the places of its group and of itself in it, such as "0.3", where the
        optimizer was made without names. A block of it has its number behind it, as in "qkv[0]", and a matrix of a stack
        the number of the expert, as in "experts[expert 3]". The values are of the whole matrix, whatever this rank holds
        of it. The documentation has a table of them. Calling this waits for the device. Between steps any rank may call.

        Raises:
            ValueError: If the optimizer does not measure.
        """
        store = self._store()
        store.keep({identity(p) for _, p in self.named_matrices()})
        values, clamps = store.read(), _clamps(self.state_format.moment2)
        return {
            name: _shown(dict(zip(VALUES, row, strict=True)), clamps)
            for of_p in self._keys(values)
            for name, row in self._named_rows(*of_p, values)
        }

    def diagnostics_summary(self) -> dict[str, float]:
        """Return quantiles over all matrices, for a logger: "adaptive_muon/update_ratio/median" and so on.

        There are "min", "10%", "median", "90%" and "max" of every value of :meth:`diagnostics`, of those matrices in which
        it is finite; and "adaptive_muon/matrices" and "adaptive_muon/not_finite", which count matrices.

        Raises:
            ValueError: If the optimizer does not measure.
        """
        return quantiles(self.diagnostics())

    def report(self) -> str:
        """Return a table of what stands out among the matrices, the worst first, with what to try.

        It is made of :meth:`diagnostics`: a gradient that is zero or not finite, an update 10 times as large as the others'
        median, a matrix that is far from orthogonal, and a D that its clamp has moved nearly everywhere.

        Raises:
            ValueError: If the optimizer does not measure.
        """
        measured = self.diagnostics()
        return table([*findings(measured), *self.further_findings()], len(measured))

    def further_findings(self) -> Sequence[Finding]:
        """Return what stands out beside the matrices that are measured."""
        return ()

    def named_matrices(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters that AdaptiveMuon updates, with their names in :meth:`diagnostics`."""
        for number, group in enumerate(self.param_groups):
            if group.get("use_muon", True):
                names = group.get("param_names") or [f"{number}.{index}" for index in range(len(group["params"]))]
                yield from zip(names, group["params"], strict=True)

    def place_of_shard(self, p: torch.Tensor) -> int | None:
        """Return this rank's place among those with shards of a parameter, if each shard is a matrix by itself; else None."""
        return self.state_format.sharding.rules.place_of_shard(p)

    def _store(self) -> Store:
        if self.diagnostics_store is None:
            raise refusal(
                "diagnostics_every must be a number of steps for the optimizer to measure",
                None,
                "Pass diagnostics_every=100 to the constructor.",
            )
        return self.diagnostics_store

    def _keys(self, values: dict[Key, Any]) -> Iterator[tuple[str, torch.Tensor, list[Key]]]:
        """Yield the parameters of which there are values, with their names and the keys of their blocks."""
        of_parameter: dict[tuple[int, str], list[Key]] = {}
        for key in sorted(values, key=lambda key: key[1] or 0):
            of_parameter.setdefault(key[0], []).append(key)
        for name, p in self.named_matrices():
            yield name, p, of_parameter.get(identity(p), [])

    def _named_rows(
        self, name: str, p: torch.Tensor, keys: Sequence[Key], values: dict[Key, list[list[float]]]
    ) -> Iterator[tuple[str, list[float]]]:
        """Yield the rows of values of one parameter's matrices, with the names of these."""
        if not keys:
            return
        is_stack = as_matrices(p).ndim > 2
        place, first = self.place_of_shard(p), offset_of(p)[0] if is_stack else 0
        name += "" if place is None else f" (shard of rank {place})"
        for key in keys:
            block = "" if key[1] is None else f"[{key[1]}]"
            for number, row in enumerate(values[key], start=first):
                yield name + block + (f"[expert {number}]" if is_stack else ""), row


def _shown(value: dict[str, float], clamps: bool) -> dict[str, float]:
    """Return the values of a matrix as users see them."""
    size = value["size"]
    gradient, momentum = math.sqrt(value["gradient"]), math.sqrt(value["momentum"])
    weight, update = math.sqrt(value["weight"] / size), abs(value["factor"]) * math.sqrt(value["update"] / size)
    return {
        "step": value["step"],
        "gradient_norm": gradient,
        "momentum_norm": momentum,
        "cosine": _clamped(_ratio(value["product"], gradient * momentum)),
        "scale_mean": value["scale_mean"],
        "scale_min": value["scale_min"],
        "scale_max": value["scale_max"],
        **({"clamped": value["clamped"]} if clamps else {}),
        "weight_rms": weight,
        "update_rms": update,
        "update_ratio": _ratio(update, weight),
        "orthogonality_error": math.sqrt(value["orthogonality"]),
    }


def _ratio(numerator: float, denominator: float) -> float:
    """Return the ratio; infinite, or if both are zero not a number, where the denominator is zero."""
    if denominator:
        return numerator / denominator
    return math.inf if numerator > 0 else math.nan


def _clamped(cosine: float) -> float:
    """Return a cosine, which rounding can bring beyond 1, between -1 and 1; NaN stays."""
    return cosine if math.isnan(cosine) else min(max(cosine, -1.0), 1.0)


def _clamps(moment2: Moment2) -> bool:
    """Return whether a method's D has a clamp."""
    return type(moment2).clamped is not Moment2.clamped
