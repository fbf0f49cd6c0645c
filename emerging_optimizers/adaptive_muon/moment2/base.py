# SPDX-License-Identifier: Apache-2.0
"""What a second-moment method is: which sums of squares it observes, what V averages, and which scale V gives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch


__all__ = ["Moment2", "Observed"]

Observed = Literal["gradient", "momentum", "orthogonalized"]


@dataclass(frozen=True)
class Moment2(ABC):
    """A second-moment method: pure functions of whole vectors.

    A method is one file of this package that defines one subclass under ``@register_moment2(name)``, and one word in
    ``Moment2MethodT``. Its dataclass fields, if any, are its own options, named as the optimizer's arguments.

    A method never sees a matrix, or a shard of one. It receives sums of squares over the whole matrix, along the
    dimensions that V does not keep. A dimension that V does not keep has size 1. Leading dimensions, if any, are those
    of a batch of matrices. So a method communicates nothing, and is right for every sharding.

    Attributes:
        observed: Whose sums of squares the method receives, in this order: "gradient" G, the raw gradient; "momentum"
            M', the momentum after Nesterov, before orthogonalization; and last "orthogonalized", O.
        momentum_degree: p, where D is proportional to the p-th power of the size of M'.
        moment2_degree: q, where D is proportional to the q-th power of V (eps and clamps aside).
        scales_momentum: Whether D scales M' before the orthogonalization, as Muon^2 (arXiv:2604.09967) and Muon-VS
            (arXiv:2601.14603) do, instead of O after it. Both degrees are then 0: O does not depend on the size of M'.
        bias_correction: Whether the method's source corrects the bias of its moving averages.
        reads_gradient: Whether V averages the raw gradient, which "l2" weight decay would falsify.
        adaptive_decay: Whether D is a ratio of signal to noise in the order of 1, fit to scale the weight decay.
    """

    observed: ClassVar[tuple[Observed, ...]]
    momentum_degree: ClassVar[float]
    moment2_degree: ClassVar[float]
    scales_momentum: ClassVar[bool] = False
    bias_correction: ClassVar[bool] = False
    reads_gradient: ClassVar[bool] = False
    adaptive_decay: ClassVar[bool] = False

    @abstractmethod
    def kept_dims(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the dimensions that V keeps: -2 for an entry per row, -1 for an entry per column.

        Args:
            rows: Rows of the whole matrix.
            columns: Columns of the whole matrix.
        """

    def statistic(self, squares: Sequence[torch.Tensor], *, shape: tuple[int, int]) -> torch.Tensor:
        """Return what V averages; by default the first of the observed sums of squares.

        Args:
            squares: The sums of squares of what is ``observed``, in its order.
            shape: ``(rows, columns)`` of the whole matrix.
        """
        return squares[0]

    @abstractmethod
    def scale(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor:
        """Return the adaptive scale D, without bias correction: a new tensor, broadcastable to the whole matrix.

        Args:
            V: The moving average of the statistic, after this step's update; it is not to be changed.
            squares: The sums of squares of what is ``observed``, in its order.
            shape: ``(rows, columns)`` of the whole matrix.
            eps: Small constant for numerical stability.
        """

    def clamped(
        self, V: torch.Tensor, squares: Sequence[torch.Tensor], *, shape: tuple[int, int], eps: float
    ) -> torch.Tensor | None:
        """Return the share of D's entries that a clamp has moved, shape ``(..., 1, 1)``; None for a D without a clamp.

        It is for diagnostics, and takes what :meth:`scale` takes.
        """
        return None

    @final
    def correction[Step: (float, torch.Tensor)](self, step: Step, *, momentum: float, beta2: float) -> Step:
        """Return the factor on D that corrects the bias of the moving averages D is made of.

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
