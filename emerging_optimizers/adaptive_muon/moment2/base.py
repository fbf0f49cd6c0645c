# SPDX-License-Identifier: Apache-2.0
"""What a second-moment method is, and what it may see."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from emerging_optimizers.adaptive_muon.sharding.layout import Layout


__all__ = ["Average", "Moment2", "Seen"]

Average = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """One step of one matrix, as every method sees it.

    The tensors are stacks of shape ``(..., rows, columns)``, as are the statistics made of them: reductions are over
    the last two dimensions.

    Args:
        gradient: G, the raw gradient.
        momentum: M', the momentum after Nesterov, before orthogonalization.
        orthogonalized: O, the orthogonalized momentum, not scaled.
    """

    gradient: torch.Tensor
    momentum: torch.Tensor
    orthogonalized: torch.Tensor


@dataclass(frozen=True)
class Moment2(ABC):
    """A second-moment method: which statistic is averaged into V, and which adaptive scale D is made of it.

    A method is one file of this package that defines one subclass under ``@register_moment2(name)``, and one word in
    ``Moment2MethodT``. Its dataclass fields, if any, are its own options; for users to set them,
    :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon` takes them as arguments by the same name. Formulas reduce
    through the layout only and along the last two dimensions, which makes them right for a matrix in pieces and for a
    stack of matrices; they ask for what they need at once in one call, since an answer may have to travel.

    Attributes:
        momentum_degree: p, where D is proportional to the p-th power of the size of M'.
        moment2_degree: q, where D is proportional to the q-th power of V (eps and clamps aside).
        bias_correction: Whether the method's source corrects the bias of its moving averages.
        reads_gradient: Whether V averages the raw gradient, which "l2" weight decay would falsify.
        adaptive_decay: Whether D is a ratio of signal to noise in the order of 1, fit to scale the weight decay.
    """

    momentum_degree: ClassVar[float]
    moment2_degree: ClassVar[float]
    bias_correction: ClassVar[bool] = False
    reads_gradient: ClassVar[bool] = False
    adaptive_decay: ClassVar[bool] = False

    @abstractmethod
    def dims(self, rows: int, columns: int) -> tuple[int, ...]:
        """Returns along which dimensions V has entries of its own: -2 one for each row, -1 one for each column.

        Args:
            rows: Rows of the whole matrix.
            columns: Columns of the whole matrix.
        """

    @abstractmethod
    async def scale(self, average: Average, seen: Seen, layout: Layout, *, eps: float) -> torch.Tensor:
        """Returns the adaptive scale D, without bias correction: a new tensor, broadcastable to O.

        Args:
            average: Takes the statistic, averages it into V in place, and returns V; to be called once. The statistic
                has one entry along every dimension that :meth:`dims` leaves out, and so has what is returned.
            seen: The matrix's G, M' and O.
            layout: Answers questions about the whole matrix.
            eps: Small constant for numerical stability.
        """

    @final
    def correction[Step: (float, torch.Tensor)](self, step: Step, *, momentum: float, beta2: float) -> Step:
        """Returns the factor on D that corrects the bias of the moving averages D is made of.

        After ``step`` updates an average that began at zero is short by the factor ``1 - decay**step``; D inherits
        that to the power of its degree in the average.

        Args:
            step: Number of updates of the averages, counted from 1; a float64 tensor gives a tensor.
            momentum: Decay rate of the momentum.
            beta2: Decay rate of V.
        """
        short_of_momentum, short_of_moment2 = 1 - momentum**step, 1 - beta2**step
        correction: Step = short_of_momentum**-self.momentum_degree * short_of_moment2**-self.moment2_degree
        return correction
