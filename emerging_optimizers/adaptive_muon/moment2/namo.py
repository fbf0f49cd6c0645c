# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass
from typing import override

import torch

from .base import Moment2
from .registry import register_moment2


@register_moment2("namo")
@dataclass(frozen=True)
class Namo(Moment2):
    """NAMO (arXiv:2602.17080): the whole of O by the momentum's norm over the root mean square of the gradient's.

    .. math:: V \\leftarrow \\mathrm{EMA}(\\|G\\|_F^2), \\qquad D = \\|M'\\|_F / (\\sqrt{V} + \\varepsilon)

    The paper corrects the bias of both averages; Emerging-Optimizers 0.3.0, whose path the default follows, does not.
    """

    observed = ("gradient", "momentum")
    momentum_degree = 1
    moment2_degree = -0.5
    reads_gradient = True
    adaptive_decay = True

    @override
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        return ()

    @override
    def scale(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor:
        _, momentum = squares
        return momentum.sqrt() / (V.sqrt() + eps)
