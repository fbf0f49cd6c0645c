# SPDX-License-Identifier: Apache-2.0
"""What is done with whole matrices, wherever they are whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from emerging_optimizers.adaptive_muon.exchange.measures import SUMS
from emerging_optimizers.adaptive_muon.moment2 import sum_of_squares
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz
from emerging_optimizers.adaptive_muon.orthogonalize.probes import error_of


__all__ = ["Orthogonalize", "Squares", "Whole", "measure_error", "orthogonalize_together"]

Squares = list[torch.Tensor]
# What an Orthogonalize is called with.
Whole = tuple[torch.Tensor, Squares, Squares, Sequence[int], torch.dtype]


@dataclass(frozen=True, eq=False)
class Orthogonalize:
    """Orthogonalizes whole matrices of a batch.

    Args:
        function: The iteration, for all matrices together; or a user's function for each member of the batch.
        kept_dims: The dimensions that the sums of squares keep.
        observes_result: Whether the sums of squares of O are asked for.
        scale: Makes D out of the whole sums of squares and the members, where D scales M' first; else None.
        probes: Whether the error of O is measured.
    """

    function: NewtonSchulz | Sequence[Callable[[torch.Tensor], torch.Tensor]]
    kept_dims: tuple[int, ...]
    observes_result: bool
    scale: Callable[[Squares, Sequence[int]], torch.Tensor] | None = None
    probes: bool = False

    def __call__(
        self, momentum: torch.Tensor, squares: Squares, measures: Squares, members: Sequence[int], dtype: torch.dtype
    ) -> tuple[torch.Tensor, Squares]:
        """Return O, and the sums of squares with those of O where they are asked for; and then the measures.

        Args:
            momentum: M' of whole matrices, shape ``(members, ..., rows, columns)``.
            squares: Sums of squares of the whole matrices.
            measures: Their measures, if there are any, in a list of one.
            members: Which members of the batch they belong to.
            dtype: The dtype of the sums of squares. O is returned in the dtype in which it is exact.
        """
        momentum = self.scaled(momentum, squares, members)
        if isinstance(self.function, NewtonSchulz):
            O = self.function.iterated(momentum)
        else:
            # A function may work in place, and M' may be the momentum buffer itself.
            Os = [self.function[i](matrix.clone()) for i, matrix in zip(members, momentum, strict=True)]
            O = as_batch(Os).to(dtype)
        return self.with_sums(O, squares, measures, dtype)

    def scaled(self, momentum: torch.Tensor, squares: Squares, members: Sequence[int]) -> torch.Tensor:
        """Return what is iterated on: D M' where D scales it, else M' itself."""
        if self.scale is None:
            return momentum
        return (momentum * self.scale(squares, members)).to(momentum.dtype)  # D may be in float64

    def with_sums(
        self, O: torch.Tensor, squares: Squares, measures: Squares, dtype: torch.dtype
    ) -> tuple[torch.Tensor, Squares]:
        """Return O, and the sums of squares with those of O where they are asked for; and then the measures."""
        of_O = [sum_of_squares(O, self.kept_dims, dtype)] if self.observes_result else []
        if self.probes:
            measure_error(measures[0], error_of(O))
        return O, [*squares, *of_O, *measures]

    def goes_with(self, other: "Orthogonalize") -> bool:
        """Return whether both iterate in the same way, and on several matrices at once."""
        function = self.function
        return isinstance(function, NewtonSchulz) and function.takes_batches and function == other.function

    def dtype(self, device: torch.device, shape: Sequence[int]) -> torch.dtype:
        """Return the dtype in which O is exact, of matrices of a shape on a device."""
        return self.function.dtype(device, shape) if isinstance(self.function, NewtonSchulz) else torch.float32


def measure_error(measures: torch.Tensor, error: torch.Tensor) -> None:
    """Enter the square of the error of O into measures in place."""
    measures[..., 0, SUMS.index("orthogonality")] = error.view(measures.shape[:-2])


def orthogonalize_together(
    functions: Sequence[Orthogonalize], wholes: Sequence[Whole]
) -> list[tuple[torch.Tensor, Squares]]:
    """Return what each function returns of its own arguments, where all iterate in the same way on matrices of one shape."""
    iteration = functions[0].function
    if len(functions) == 1 or not isinstance(iteration, NewtonSchulz):
        return [function(*whole) for function, whole in zip(functions, wholes, strict=True)]
    both = [*zip(functions, wholes, strict=True)]
    scaled = [function.scaled(momentum, squares, members) for function, (momentum, squares, _, members, _) in both]
    Os = torch.split(iteration.iterated(torch.cat(scaled)), [len(momentum) for momentum in scaled])
    return [
        function.with_sums(O, squares, measures, dtype)
        for (function, (_, squares, measures, _, dtype)), O in zip(both, Os, strict=True)
    ]
