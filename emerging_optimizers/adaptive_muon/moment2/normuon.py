# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass
from typing import override

import torch

from .base import Moment2
from .registry import register_moment2


@register_moment2("normuon")
@dataclass(frozen=True)
class NorMuon(Moment2):
    """NorMuon (arXiv:2510.05491): each row of O (each column of a wide matrix) by its root mean square, norm kept.

    .. math:: V \\leftarrow \\mathrm{EMA}(\\mathrm{mean}(O \\odot O)), \\qquad
        r = \\max(V, \\varepsilon)^{-1/2}, \\qquad D = r \\, \\|O\\|_F / \\|r \\odot O\\|_F

    The mean runs along a matrix's columns where it has at least as many rows as columns, else along its rows, as
    Emerging-Optimizers 0.3.0 has it; the paper always takes rows.
    """

    observed = ("orthogonalized",)
    momentum_degree = 0
    moment2_degree = 0  # a common factor on V cancels

    @override
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-2,) if rows >= columns else (-1,)

    @override
    def statistic(self, squares: Sequence[torch.Tensor], *, shape: tuple[int, int]) -> torch.Tensor:
        return squares[0] / min(shape)  # the shorter dimension is averaged away

    @override
    def scale(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor:
        [orthogonalized] = squares
        r = V.clamp_min(eps).rsqrt_()
        before, after = (x.sum((-2, -1), keepdim=True).sqrt() for x in (orthogonalized, r.square() * orthogonalized))
        return r * (before / after.clamp_min(eps))
