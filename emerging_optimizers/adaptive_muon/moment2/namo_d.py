# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass
from typing import override

import torch

from .base import Moment2
from .registry import register_moment2


@register_moment2("namo_d")
@dataclass(frozen=True)
class NamoD(Moment2):
    """NAMO-D (arXiv:2602.17080): NAMO for each column, the columns' scales clamped around their mean.

    .. math:: V_j \\leftarrow \\mathrm{EMA}(\\|G_j\\|^2), \\qquad
        d_j = \\|M'_j\\| / (\\sqrt{V_j} + \\varepsilon), \\qquad
        D_j = \\mathrm{clamp}(d_j,\\; c \\, \\bar d,\\; \\bar d / c)

    Args:
        namo_d_clamp: c in (0, 1]; 1 gives every column the mean scale, small values free the columns.

    Raises:
        ValueError: If ``namo_d_clamp`` is outside (0, 1].
    """

    namo_d_clamp: float = 0.75

    observed = ("gradient", "momentum")
    momentum_degree = 1
    moment2_degree = -0.5
    bias_correction = True
    reads_gradient = True
    adaptive_decay = True

    def __post_init__(self) -> None:
        """Check the clamp."""
        c = self.namo_d_clamp
        if not (isinstance(c, float | int) and 0 < c <= 1):
            raise ValueError(f"namo_d_clamp must be in (0, 1], got {c!r}. Use 0.75, the default.")

    @override
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-1,)

    @override
    def scale(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor:
        d, least, most = self._ratios(V, squares, eps)
        return d.clamp(least, most)

    @override
    def clamped(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor:
        d, least, most = self._ratios(V, squares, eps)
        return ((d < least) | (d > most)).to(d.dtype).mean((-2, -1), keepdim=True)

    def _ratios(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return d, and the bounds between which D keeps it."""
        _, momentum = squares
        d, c = momentum.sqrt() / (V.sqrt() + eps), self.namo_d_clamp
        mean = d.mean(dim=-1, keepdim=True)
        return d, c * mean, mean / c
