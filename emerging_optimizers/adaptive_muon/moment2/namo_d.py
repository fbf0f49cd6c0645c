# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.moment2.base import Average, Moment2, Seen
from emerging_optimizers.adaptive_muon.moment2.registry import register_moment2
from emerging_optimizers.adaptive_muon.sharding.layout import Layout


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

    momentum_degree = 1
    moment2_degree = -0.5
    bias_correction = True
    reads_gradient = True
    adaptive_decay = True

    def __post_init__(self) -> None:
        """Checks the clamp."""
        clamp = self.namo_d_clamp
        allowed = isinstance(clamp, float | int) and 0 < clamp <= 1
        require(allowed, "namo_d_clamp must be in (0, 1]", clamp, "the default is 0.75")

    @override
    def dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-1,)

    @override
    async def scale(self, average: Average, seen: Seen, layout: Layout, *, eps: float) -> torch.Tensor:
        of_gradient, of_momentum = await layout.norms(seen.gradient, seen.momentum, dim=-2)
        d = of_momentum / (average(of_gradient.square()).sqrt() + eps)
        [total] = await layout.totals(d, dim=-1)
        mean = total / layout.shape(seen.momentum)[-1]
        return d.clamp(self.namo_d_clamp * mean, mean / self.namo_d_clamp)
