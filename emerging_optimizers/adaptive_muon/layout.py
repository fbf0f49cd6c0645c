# SPDX-License-Identifier: Apache-2.0
"""Questions about a whole matrix, asked of the piece at hand.

Every formula asks its shapes and reductions here and never of the tensor itself, so that the formulas stay the same
when a matrix is held in pieces.
"""

from dataclasses import dataclass

import torch


__all__ = ["Layout", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """A matrix that is held whole.

    All methods take ``local``, the tensor at hand, shape ``(..., rows, columns)``: leading dimensions, if any, stack
    independent matrices. Reductions keep the reduced dimensions with size 1, so results broadcast against ``local``.
    """

    def shape(self, local: torch.Tensor) -> tuple[int, int]:
        """Returns ``(rows, columns)`` of the whole matrix."""
        return local.size(-2), local.size(-1)

    def norm(self, local: torch.Tensor, dim: int | None = None) -> torch.Tensor:
        """Returns the Frobenius norm of the whole matrix, or the Euclidean norms along one of its dimensions.

        Args:
            local: The tensor at hand.
            dim: -2 for the norm of each column, -1 for the norm of each row, None for the whole matrix.
        """
        norm: torch.Tensor = torch.linalg.vector_norm(local, dim=(-2, -1) if dim is None else dim, keepdim=True)
        return norm

    def mean(self, local: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the mean of the whole matrix along one of its dimensions.

        Args:
            local: The tensor at hand.
            dim: -2 for the mean of each column, -1 for the mean of each row.
        """
        return local.mean(dim=dim, keepdim=True)


def layout_of(p: torch.Tensor) -> Layout:
    """Returns who holds which piece of a parameter: every parameter that is accepted is held whole."""
    return Layout()
