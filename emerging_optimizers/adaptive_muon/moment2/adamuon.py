# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass
from typing import override

import torch

from .base import Moment2
from .registry import register_moment2


@register_moment2("adamuon")
@dataclass(frozen=True)
class AdaMuon(Moment2):
    """AdaMuon (arXiv:2507.11005): every element of O by its own root mean square, as in Adam.

    .. math:: V \\leftarrow \\mathrm{EMA}(O \\odot O), \\qquad D = 1 / (\\sqrt{V} + \\varepsilon)
    """

    observed = ("orthogonalized",)
    momentum_degree = 0  # O does not depend on the size of M'
    moment2_degree = -0.5

    @override
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return (-2, -1)

    @override
    def scale(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor:
        return V.sqrt().add_(eps).reciprocal_()
