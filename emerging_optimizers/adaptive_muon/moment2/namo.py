# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.adaptive_muon.moment2.base import Average, Moment2, Seen
from emerging_optimizers.adaptive_muon.moment2.registry import register_moment2
from emerging_optimizers.adaptive_muon.sharding.layout import Layout


@register_moment2("namo")
@dataclass(frozen=True)
class Namo(Moment2):
    """NAMO (arXiv:2602.17080): the whole of O by the momentum's norm over the root mean square of the gradient's.

    .. math:: V \\leftarrow \\mathrm{EMA}(\\|G\\|_F^2), \\qquad D = \\|M'\\|_F / (\\sqrt{V} + \\varepsilon)

    The paper corrects the bias of both averages; Emerging-Optimizers 0.3.0, whose path the default follows, does not.
    """

    momentum_degree = 1
    moment2_degree = -0.5
    reads_gradient = True
    adaptive_decay = True

    @override
    def dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return ()

    @override
    async def scale(self, average: Average, seen: Seen, layout: Layout, *, eps: float) -> torch.Tensor:
        of_gradient, of_momentum = await layout.norms(seen.gradient, seen.momentum)
        return of_momentum / (average(of_gradient.square()).sqrt() + eps)
