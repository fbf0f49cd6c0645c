# SPDX-License-Identifier: Apache-2.0
"""What stands out among the matrices, and what to try about it."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple


__all__ = ["Finding", "findings", "table"]

Row = Mapping[str, float]

_MOST_ROWS = 20
_LARGER = 10.0  # times the others' median
_CLAMPED = 0.9  # the share of D from which on the clamp decides
# With the default iteration, matrices of full rank in our tests have an error of 0.03 to 0.25. An O of zeros has the error 1.
_FAR_FROM_ORTHOGONAL = 0.6


class Finding(NamedTuple):
    """Something that stands out."""

    severity: float  # the larger the worse
    name: str  # of the matrix
    what: str
    remedy: str


def findings(measured: Mapping[str, Row]) -> list[Finding]:
    """Return what stands out of each matrix: the worst of it.

    Args:
        measured: Values by their names, by the names of matrices.
    """
    finite = {
        value: sorted(row[value] for row in measured.values() if math.isfinite(row[value]))
        for value in ("update_rms", "update_ratio")
    }
    found = []
    for name, row in measured.items():
        medians = {value: _median_without(row[value], values) for value, values in finite.items()}
        of_matrix = [Finding(severity, name, what, remedy) for severity, what, remedy in _of(row, medians)]
        found += sorted(of_matrix, reverse=True)[:1]
    return found


def table(found: Sequence[Finding], matrices: int) -> str:
    """Return findings as a table, the worst first; of many, the first ones.

    Args:
        found: The findings.
        matrices: How many matrices were measured.
    """
    unmeasured = "Nothing has been measured yet: no step of diagnostics_every steps is complete."
    if not found:
        return f"Nothing stands out among {matrices} matrices." if matrices else unmeasured
    rows = sorted(found, key=lambda finding: -finding.severity)
    width = max(len(row.name) for row in rows[:_MOST_ROWS])
    number = f"{len(rows)} finding{'s' if len(rows) > 1 else ''}"
    lines = [f"{number}, {matrices} matrices measured:" if matrices else f"{unmeasured} {number} of the routes:"]
    lines += [f"  {row.name:<{width}}  {row.what}; {row.remedy}" for row in rows[:_MOST_ROWS]]
    rest = len(rows) - _MOST_ROWS
    return "\n".join([*lines, f"  and {rest} more"] if rest > 0 else lines)


def _of(row: Row, medians: Mapping[str, float]) -> Iterator[tuple[float, str, str]]:
    """Yield what stands out of one matrix, beside the others' medians: how bad it is, what it is, and what to try."""
    gradient = row["gradient_norm"]
    if not math.isfinite(gradient):
        yield 5e9, f"its gradient is not finite ({gradient})", "look at the loss; clip gradients, or lower the rate"
        return
    if not math.isfinite(row["weight_rms"]) or not math.isfinite(row["update_rms"]):
        yield 4e9, "its weight or update is not finite", "load a checkpoint from before, and look at the loss"
        return
    if gradient == 0:
        yield 2e9, "its gradient is zero", "see that the loss depends on it; freeze it if it is not to be trained"
        return
    for value, what in (("update_rms", "update"), ("update_ratio", "update, relative to the weight,")):
        ratio = row[value] / medians[value] if medians[value] > 0 else 0.0
        if ratio >= _LARGER and math.isfinite(ratio):
            yield (
                1e6 * ratio,
                f"its {what} is {ratio:.0f} times the others' median",
                "give it a group with a smaller lr",
            )
            break
    if row.get("clamped", 0.0) >= _CLAMPED:
        what = f"the clamp moves {row['clamped']:.0%} of its D, in [{row['scale_min']:.3g}, {row['scale_max']:.3g}]"
        yield 1e5 * row["clamped"], what, 'lower namo_d_clamp, or use "namo"'
    error = row["orthogonality_error"]
    if error > _FAR_FROM_ORTHOGONAL:
        what = f"its O is far from orthogonal ({error:.2f})"
        yield 1e3 * error, what, "raise num_ns_steps; nothing helps where its gradients have a low rank"


def _median_without(value: float, values: Sequence[float]) -> float:
    """Return the median of values, which are sorted, without one of them; 0 where there are no others."""
    alone = math.isfinite(value)
    place = bisect_left(values, value) if alone else len(values)
    number = len(values) - alone
    middle = {(number - 1) // 2, number // 2} if number else set()
    return fmean(values[index + (index >= place)] for index in middle) if middle else 0.0
