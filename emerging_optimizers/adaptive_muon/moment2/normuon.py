# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from typing import override

import torch

from emerging_optimizers.adaptive_muon.moment2.base import Average, Moment2, Seen
from emerging_optimizers.adaptive_muon.moment2.registry import register_moment2
from emerging_optimizers.adaptive_muon.sharding.layout import Layout


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
    def dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-2,) if rows >= columns else (-1,)

    @override
    async def scale(self, average: Average, seen: Seen, layout: Layout, *, eps: float) -> torch.Tensor:
        shape = layout.shape(seen.orthogonalized)
        [kept] = self.dims(*shape)
        averaged_away = -3 - kept
        [norms] = await layout.norms(seen.orthogonalized, dim=averaged_away)
        squares = norms.square()
        r = average(squares / shape[averaged_away]).clamp_min(eps).rsqrt_()
        before, after = await layout.totals(squares, r.square() * squares, dim=kept)
        return r * (before.sqrt() / after.sqrt().clamp_min(eps))
