# SPDX-License-Identifier: Apache-2.0
"""Many tensors in one message: packed as bytes, each on a boundary that every dtype is fit for.

A message leaves when it is made. The work of a rank goes on while it is on its way.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.sharding.comparison import Flag


__all__ = ["Message", "Part", "all_gather", "all_to_all", "new_buffer"]

_ALIGNED = 16


class Part(NamedTuple):
    """A tensor in a message."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Its bytes, without the gap to the next part."""
        return math.prod(self.shape) * self.dtype.itemsize


class Message:
    """A message on its way.

    Args:
        work: The collective, which runs.
        buffers: What it reads and writes. They must be kept until it has ended.
        incoming: For each rank, the tensors that come from there, and the buffer in which they arrive.
        flag: Takes the first tensor from each rank.
    """

    def __init__(
        self,
        work: dist.Work,
        buffers: Sequence[torch.Tensor],
        incoming: Sequence[tuple[torch.Tensor, Sequence[Part]]],
        flag: Flag | None,
    ) -> None:
        self._flag = flag
        # All of it keeps the buffers: the work too.
        self._on_its_way: tuple[Any, ...] | None = work, buffers, incoming

    def wait(self) -> list[list[torch.Tensor]]:
        """Return for each rank the tensors that came from there, views of one buffer. Call this once.

        On CUDA the current stream waits, and the process does not. The flag may raise what it raises.
        """
        assert self._on_its_way is not None
        (work, _, incoming), self._on_its_way = self._on_its_way, None
        work.wait()
        arrived = [_views(buffer, parts) for buffer, parts in incoming]
        if self._flag is not None:
            self._flag.arrived([from_rank.pop(0) for from_rank in arrived])
        return arrived


# What a flag is in a message. In float32 as most parts, so that all are packed together.
_FLAG = Part((1,), torch.float32)


def all_to_all(
    outgoing: Sequence[Sequence[tuple[torch.Tensor, torch.dtype]]],
    incoming: Sequence[Sequence[Part]],
    group: ProcessGroup,
    device: torch.device,
    flag: Flag | None = None,
) -> Message:
    """Send every rank of a group its own list of tensors, in one all-to-all.

    Args:
        outgoing: For each rank, the tensors to send there, each with the dtype in which to send it.
        incoming: For each rank, the tensors that come from there.
        group: The process group.
        device: The device of all of them; a rank may have none to send.
        flag: What is sent to all ranks beside.
    """
    if flag is not None:
        own = flag.tensor(device), _FLAG.dtype
        outgoing, incoming = [[own, *tensors] for tensors in outgoing], [[_FLAG, *parts] for parts in incoming]
    sent = [_size([Part((*tensor.shape,), dtype) for tensor, dtype in tensors]) for tensors in outgoing]
    received = [_size(parts) for parts in incoming]
    packed, arrived = new_buffer(sum(sent), device), new_buffer(sum(received), device)
    for buffer, tensors in zip(torch.split(packed, sent), outgoing, strict=True):
        _pack(buffer, tensors)
    work = cast(dist.Work, dist.all_to_all_single(arrived, packed, received, sent, group=group, async_op=True))
    return Message(work, (packed, arrived), [*zip(torch.split(arrived, received), incoming, strict=True)], flag)


def all_gather(
    tensors: Sequence[tuple[torch.Tensor, torch.dtype]],
    incoming: Sequence[Sequence[Part]],
    group: ProcessGroup,
    device: torch.device,
    flag: Flag | None = None,
) -> Message:
    """Send all ranks the same tensors, in one all-gather of the longest list's size; otherwise as :func:`all_to_all`."""
    if flag is not None:
        tensors, incoming = [(flag.tensor(device), _FLAG.dtype), *tensors], [[_FLAG, *parts] for parts in incoming]
    longest = max(_size(parts) for parts in incoming)
    packed, arrived = new_buffer(longest, device), new_buffer(len(incoming) * longest, device)
    _pack(packed, tensors)
    # Torch renamed it, and warns of the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = cast(dist.Work, gather(arrived, packed, group=group, async_op=True))
    buffers = torch.split(arrived, [longest] * len(incoming))
    return Message(work, (packed, arrived), [*zip(buffers, incoming, strict=True)], flag)


def new_buffer(size: int, device: torch.device) -> torch.Tensor:
    """Return memory for the bytes of a message."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def _size(parts: Sequence[Part]) -> int:
    """Return the bytes of a message."""
    return _starts(parts)[-1]


def _starts(parts: Iterable[Part]) -> list[int]:
    """Return where each part starts, and the end of the last."""
    return list(accumulate((-(-part.size // _ALIGNED) * _ALIGNED for part in parts), initial=0))


def _views(buffer: torch.Tensor, parts: Sequence[Part]) -> list[torch.Tensor]:
    """Return the parts of a message, as views of its buffer."""
    return [
        buffer[start : start + part.size].view(part.dtype).view(part.shape)
        for part, (start, _) in zip(parts, pairwise(_starts(parts)), strict=True)
    ]


def _pack(buffer: torch.Tensor, tensors: Sequence[tuple[torch.Tensor, torch.dtype]]) -> None:
    """Copy tensors into a message's buffer, each in its dtype."""
    if tensors:
        views = _views(buffer, [Part((*tensor.shape,), dtype) for tensor, dtype in tensors])
        torch._foreach_copy_(views, [tensor for tensor, _ in tensors])
