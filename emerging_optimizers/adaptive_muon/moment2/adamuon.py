# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.adaptive_muon.layout import Layout
from emerging_optimizers.adaptive_muon.moment2.base import Moment2, Seen
from emerging_optimizers.adaptive_muon.moment2.registry import register_moment2


@register_moment2("adamuon")
@dataclass(frozen=True)
class AdaMuon(Moment2):
    """AdaMuon (arXiv:2507.11005): every element of O by its own root mean square, as in Adam.

    .. math:: V \\leftarrow \\mathrm{EMA}(O \\odot O), \\qquad D = 1 / (\\sqrt{V} + \\varepsilon)
    """

    momentum_degree = 0  # O does not depend on the size of M'
    moment2_degree = -0.5

    @override
    def shape(self, local: torch.Tensor, layout: Layout) -> tuple[int, ...]:
        return tuple(local.shape)

    @override
    def statistic(self, seen: Seen, layout: Layout) -> torch.Tensor:
        return seen.orthogonalized.square()

    @override
    def adapt(self, moment2: torch.Tensor, seen: Seen, layout: Layout, *, eps: float) -> torch.Tensor:
        return moment2.sqrt().add_(eps).reciprocal_()
