# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.adaptive_muon.moment2.base import Average, Moment2, Seen
from emerging_optimizers.adaptive_muon.moment2.registry import register_moment2
from emerging_optimizers.adaptive_muon.sharding.layout import Layout


@register_moment2("adamuon")
@dataclass(frozen=True)
class AdaMuon(Moment2):
    """AdaMuon (arXiv:2507.11005): every element of O by its own root mean square, as in Adam.

    .. math:: V \\leftarrow \\mathrm{EMA}(O \\odot O), \\qquad D = 1 / (\\sqrt{V} + \\varepsilon)
    """

    momentum_degree = 0  # O does not depend on the size of M'
    moment2_degree = -0.5

    @override
    def dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-2, -1)

    @override
    async def scale(self, average: Average, seen: Seen, layout: Layout, *, eps: float) -> torch.Tensor:
        return average(seen.orthogonalized.square()).sqrt().add_(eps).reciprocal_()
