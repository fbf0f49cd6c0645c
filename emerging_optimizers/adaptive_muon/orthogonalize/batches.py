# SPDX-License-Identifier: Apache-2.0
"""Where batches are cut: how many tensors of one shape are worked on as one tensor."""

import math
from collections.abc import Iterator, Sequence
from itertools import batched

import torch


__all__ = ["LIMITS", "as_batch", "batch_size", "in_batches"]

# By device: the longest short side of matrices that are worked on in batches, and the float32 bytes of a batch. Longer
# matrices keep the device busy one at a time. The bytes bound a step's temporary memory, and on a CPU fit a core's own
# cache: 48 matrices of 256 x 256 take 0.7 of the time that they take as one batch.
LIMITS = {"cpu": (256, 2**21), "cuda": (1024, 2**27)}


def as_batch(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors of one shape as one tensor with a further first dimension. A single tensor is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def batch_size(shape: Sequence[int], device: torch.device) -> int:
    """Return how many tensors of a shape, matrices or stacks of matrices, make a batch: at least 1."""
    longest, most_bytes = LIMITS.get(device.type, (0, 0))
    fit = most_bytes // max(4 * math.prod(shape), 1) if min(shape[-2:]) <= longest else 0
    return max(fit, 1)


def in_batches[Member](
    members: Sequence[Member], shape: Sequence[int], device: torch.device
) -> Iterator[tuple[Member, ...]]:
    """Yield the members of each batch, where every member has one tensor of this shape on this device."""
    return batched(members, min(batch_size(shape, device), len(members)))
