# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.adaptive_muon.layout import Layout
from emerging_optimizers.adaptive_muon.moment2.base import Moment2, Seen
from emerging_optimizers.adaptive_muon.moment2.registry import register_moment2


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
    def shape(self, local: torch.Tensor, layout: Layout) -> tuple[int, ...]:
        return (1,)

    @override
    def statistic(self, seen: Seen, layout: Layout) -> torch.Tensor:
        return layout.norm(seen.gradient).square()

    @override
    def adapt(self, moment2: torch.Tensor, seen: Seen, layout: Layout, *, eps: float) -> torch.Tensor:
        return layout.norm(seen.momentum) / (moment2.sqrt() + eps)
