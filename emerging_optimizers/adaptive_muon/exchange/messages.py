# SPDX-License-Identifier: Apache-2.0
"""Many tensors in one message: packed as bytes, each on a boundary that every dtype is fit for."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup


__all__ = ["Part", "all_gather", "all_to_all"]

_ALIGNED = 16


class Part(NamedTuple):
    """A tensor in a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Its bytes, without the gap to the next part."""
        return math.prod(self.shape) * self.dtype.itemsize


def all_to_all(
    outgoing: Sequence[Sequence[tuple[torch.Tensor, torch.dtype]]],
    incoming: Sequence[Sequence[Part]],
    group: ProcessGroup,
    device: torch.device,
) -> list[list[torch.Tensor]]:
    """Send every rank of a group its own list of tensors, in one all-to-all.

    Args:
        outgoing: For each rank, the tensors to send there, each with the dtype in which to send it.
        incoming: For each rank, the tensors that come from there.
        group: The process group.
        device: The device of all of them; a rank may have none to send.

    Returns:
        For each rank, the tensors that came from there: views of one buffer.
    """
    sent = [_size([Part((*tensor.shape,), dtype) for tensor, dtype in tensors]) for tensors in outgoing]
    received = [_size(parts) for parts in incoming]
    packed, arrived = (torch.empty(sum(sizes), dtype=torch.uint8, device=device) for sizes in (sent, received))
    for buffer, tensors in zip(torch.split(packed, sent), outgoing, strict=True):
        _pack(buffer, tensors)
    dist.all_to_all_single(arrived, packed, received, sent, group=group)
    return [_views(buffer, parts) for buffer, parts in zip(torch.split(arrived, received), incoming, strict=True)]


def all_gather(
    tensors: Sequence[tuple[torch.Tensor, torch.dtype]],
    incoming: Sequence[Sequence[Part]],
    group: ProcessGroup,
    device: torch.device,
) -> list[list[torch.Tensor]]:
    """Send all ranks the same tensors, in one all-gather of the longest list's size; otherwise as :func:`all_to_all`."""
    longest = max(_size(parts) for parts in incoming)
    packed = torch.empty(longest, dtype=torch.uint8, device=device)
    _pack(packed, tensors)
    arrived = packed.new_empty(len(incoming) * longest)
    # Torch renamed it, and warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(arrived, packed, group=group)
    buffers = torch.split(arrived, [longest] * len(incoming))
    return [_views(buffer, parts) for buffer, parts in zip(buffers, incoming, strict=True)]


def _size(parts: Sequence[Part]) -> int:
    """The bytes of a message."""
    return _starts(parts)[-1]


def _starts(parts: Iterable[Part]) -> list[int]:
    """Where each part starts, and the end of the last."""
    return list(accumulate((-(-part.size // _ALIGNED) * _ALIGNED for part in parts), initial=0))


def _views(buffer: torch.Tensor, parts: Sequence[Part]) -> list[torch.Tensor]:
    """The parts of a message, as views of its buffer."""
    return [
        buffer[start : start + part.size].view(part.dtype).view(part.shape)
        for part, (start, _) in zip(parts, pairwise(_starts(parts)), strict=True)
    ]


def _pack(buffer: torch.Tensor, tensors: Sequence[tuple[torch.Tensor, torch.dtype]]) -> None:
    """Copies tensors into a message's buffer, each in its dtype."""
    if tensors:
        views = _views(buffer, [Part((*tensor.shape,), dtype) for tensor, dtype in tensors])
        torch._foreach_copy_(views, [tensor for tensor, _ in tensors])
