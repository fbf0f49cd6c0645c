# SPDX-License-Identifier: Apache-2.0
"""Methods that scale M' before it is orthogonalized. They are registered for a test only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.adaptive_muon.moment2 import METHODS, Moment2, register_moment2


class ScalesMomentum(Moment2):
    """D = 1 / (sqrt(V) + eps), with V the moving average of the observed squares."""

    observed = ("momentum",)
    momentum_degree = 0
    moment2_degree = 0
    scales_momentum = True

    @override
    def scale(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor:
        return 1 / (V.sqrt() + eps)


@dataclass(frozen=True)
class OfMatrix(ScalesMomentum):
    """One number. O does not depend on it; it is here for V."""

    @override
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class OfRows(ScalesMomentum):
    """A number per row, of the momentum."""

    @override
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-2,)


@dataclass(frozen=True)
class OfColumns(ScalesMomentum):
    """A number per column: the mean square of the gradient, and D the momentum's over it."""

    observed = ("gradient", "momentum")
    reads_gradient = True

    @override
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-1,)

    @override
    def statistic(self, squares: Sequence[torch.Tensor], *, shape: tuple[int, int]) -> torch.Tensor:
        return squares[0] / shape[0]

    @override
    def scale(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor:
        return (squares[1] / shape[0]).sqrt() / (V + eps)


@dataclass(frozen=True)
class OfElements(ScalesMomentum):
    """A number per element, as in Muon^2 (arXiv:2604.09967)."""

    @override
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-2, -1)


SCALED = {"of_matrix": OfMatrix, "of_rows": OfRows, "of_columns": OfColumns, "of_elements": OfElements}


@contextmanager
def registered() -> Iterator[None]:
    """The methods of ``SCALED`` among those that the optimizer knows."""
    assert not SCALED.keys() & METHODS.keys()
    try:
        for name, cls in SCALED.items():
            register_moment2(name)(cls)
        yield
    finally:
        for name in SCALED:
            METHODS.pop(name, None)
