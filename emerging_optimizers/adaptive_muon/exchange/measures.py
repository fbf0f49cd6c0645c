# SPDX-License-Identifier: Apache-2.0
"""Measures of matrices, for diagnostics: each rank's partial ones are in the first message, the whole ones in the second.

Measures are a tensor of shape ``(batch, ..., 1, 9)``: for each matrix the :data:`SUMS`, and then the :data:`MAXIMA`. Their
partial values of the shards of a matrix are added, or the largest is taken.
"""

from collections.abc import Sequence

import torch


__all__ = ["MAXIMA", "NUMBER", "SUMS", "combined", "from_slots", "in_slots", "new_measures"]

# Sums over all elements: of G^2, M'^2, G M' and W^2; of (O O^T - I)^2 over the smaller side, estimated where O is whole; and,
# where shards alone know it, of the step before: of (D O)^2 and of D.
SUMS = ("gradient", "momentum", "product", "weight", "orthogonality", "update", "scale")
# The largest of -D and of D, of the step before too.
MAXIMA = ("scale_min", "scale_max")
NUMBER = len(SUMS) + len(MAXIMA)


def new_measures(like: torch.Tensor) -> torch.Tensor:
    """Return the measures of no elements, for the matrices of a tensor of shape ``(batch, ..., rows, columns)``."""
    measures = like.new_zeros((*like.shape[:-2], 1, NUMBER))
    measures[..., len(SUMS) :] = -torch.inf
    return measures


def combined(partial: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the measures of whole matrices, from the partial ones of their shards in the order of the ranks."""
    of_ranks, number = torch.stack(list(partial)), len(SUMS)
    return torch.cat([of_ranks[..., :number].sum(0), of_ranks[..., number:].amax(0)], -1)


def in_slots(measures: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return partial measures for a sum over ranks. Each rank has slots of its own for its maxima, zero in the others."""
    number = len(SUMS)
    slots = measures.new_zeros((*measures.shape[:-1], size, len(MAXIMA)))
    slots[..., rank, :] = measures[..., number:]
    return torch.cat([measures[..., :number], slots.flatten(-2)], -1)


def from_slots(total: torch.Tensor) -> torch.Tensor:
    """Return the measures of whole matrices, from the sum over ranks of what :func:`in_slots` returns."""
    number = len(SUMS)
    maxima = total[..., number:].reshape(*total.shape[:-1], -1, len(MAXIMA)).amax(-2)
    return torch.cat([total[..., :number], maxima], -1)
