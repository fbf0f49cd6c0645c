# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.adaptive_muon.layout import Layout
from emerging_optimizers.adaptive_muon.moment2.base import Moment2, Seen
from emerging_optimizers.adaptive_muon.moment2.registry import register_moment2


@register_moment2("normuon")
@dataclass(frozen=True)
class NorMuon(Moment2):
    """NorMuon (arXiv:2510.05491): each row of O (each column of a wide matrix) by its root mean square, norm kept.

    .. math:: V \\leftarrow \\mathrm{EMA}(\\mathrm{mean}(O \\odot O)), \\qquad
        r = \\max(V, \\varepsilon)^{-1/2}, \\qquad D = r \\, \\|O\\|_F / \\|r \\odot O\\|_F

    The mean runs along a matrix's columns where it has at least as many rows as columns, else along its rows, as
    Emerging-Optimizers 0.3.0 has it; the paper always takes rows.
    """

    momentum_degree = 0
    moment2_degree = 0  # a common factor on V cancels

    @override
    def shape(self, local: torch.Tensor, layout: Layout) -> tuple[int, ...]:
        return (local.size(-2), 1) if _mean_dim(local, layout) == -1 else (1, local.size(-1))

    @override
    def statistic(self, seen: Seen, layout: Layout) -> torch.Tensor:
        return layout.mean(seen.orthogonalized.square(), dim=_mean_dim(seen.orthogonalized, layout))

    @override
    def adapt(self, moment2: torch.Tensor, seen: Seen, layout: Layout, *, eps: float) -> torch.Tensor:
        r = moment2.clamp_min(eps).rsqrt_()
        norm_before = layout.norm(seen.orthogonalized)
        norm_after = layout.norm(r * seen.orthogonalized)
        return r * (norm_before / norm_after.clamp_min(eps))


def _mean_dim(local: torch.Tensor, layout: Layout) -> int:
    """The dimension that is averaged away: the shorter of the whole matrix."""
    rows, columns = layout.shape(local)
    return -1 if rows >= columns else -2
