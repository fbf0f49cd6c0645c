# SPDX-License-Identifier: Apache-2.0
"""What crosses process boundaries: many small things in one message."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self, override

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.exchange.together import Request


__all__ = ["GroupRequest", "Sum", "all_gather", "all_to_all"]

# Torch renamed it, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, eq=False)
class GroupRequest[Answer](Request[Answer]):
    """A request that the processes of a group answer together: all of them make it, in the same order.

    Args:
        group: The process group.
    """

    group: ProcessGroup

    async def answer(self) -> Answer:
        """Returns the answer, as a coroutine."""
        return await self

    @classmethod
    @override
    def answer_all(cls, requests: Sequence[Self]) -> Sequence[Answer]:
        groups: dict[ProcessGroup, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.group, []).append(index)
        answers: dict[int, Answer] = {}
        for group, indices in groups.items():
            answers |= zip(indices, cls.answer_group(group, [requests[i] for i in indices]), strict=True)
        return [answers[index] for index in range(len(requests))]

    @classmethod
    @abstractmethod
    def answer_group(cls, group: ProcessGroup, requests: Sequence[Self]) -> Sequence[Answer]:
        """Returns the answers to one group's requests."""


@dataclass(frozen=True, eq=False)
class Sum(GroupRequest[Sequence[torch.Tensor]]):
    """The sums of tensors over the ranks of a group: one all-reduce for all that are asked for at a time.

    Args:
        group: The process group.
        terms: This rank's terms, of the same shapes and dtypes on all ranks.
    """

    terms: Sequence[torch.Tensor]

    @classmethod
    @override
    def answer_group(cls, group: ProcessGroup, requests: Sequence[Self]) -> Sequence[Sequence[torch.Tensor]]:
        terms = [term for request in requests for term in request.terms]
        widest = reduce(torch.promote_types, (term.dtype for term in terms))
        bucket = torch.cat([term.reshape(-1).to(widest) for term in terms])
        dist.all_reduce(bucket, group=group)
        sums = iter(torch.split(bucket, [term.numel() for term in terms]))
        return [[next(sums).view(term.shape).to(term.dtype) for term in request.terms] for request in requests]


def all_to_all(
    outgoing: Sequence[Sequence[torch.Tensor]],
    shapes: Sequence[Sequence[Sequence[int]]],
    group: ProcessGroup,
    like: torch.Tensor,
) -> Callable[[], list[list[torch.Tensor]]]:
    """Starts to send every rank of a group its own list of tensors, in one all-to-all.

    Args:
        outgoing: For each rank, the tensors to send there.
        shapes: For each rank, the shapes of the tensors that come from there.
        group: The process group.
        like: A tensor of the dtype and device of all of them; a rank may have none to send.

    Returns:
        What waits for the tensors, and returns for each rank those that came from there: views of one buffer.
    """
    sent = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    received = [sum(map(math.prod, each)) for each in shapes]
    arrived = like.new_empty(sum(received))
    packed = _pack([tensor for tensors in outgoing for tensor in tensors], like)
    work = dist.all_to_all_single(arrived, packed, received, sent, group=group, async_op=True)

    def wait() -> list[list[torch.Tensor]]:
        assert work is not None
        work.wait()
        return [_unpack(each, of) for each, of in zip(torch.split(arrived, received), shapes, strict=True)]

    return wait


def all_gather(
    tensors: Sequence[torch.Tensor], shapes: Sequence[Sequence[Sequence[int]]], group: ProcessGroup
) -> list[list[torch.Tensor]]:
    """Sends all ranks of a group the same list of tensors, in one all-gather of the longest list's size.

    Args:
        tensors: The tensors to send; all of one dtype, at least one.
        shapes: For each rank, the shapes of the tensors that come from there.
        group: The process group.

    Returns:
        For each rank, the tensors that came from there: views of one buffer.
    """
    received = [sum(map(math.prod, each)) for each in shapes]
    packed = tensors[0].new_zeros(max(received))
    packed[: sum(tensor.numel() for tensor in tensors)] = _pack(tensors, packed)
    arrived = packed.new_empty(len(received), packed.numel())
    _all_gather(arrived.view(-1), packed, group=group)
    return [_unpack(row[:size], of) for row, size, of in zip(arrived, received, shapes, strict=True)]


def _pack(tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The elements of all tensors, one after the other."""
    return torch.cat([like.new_empty(0), *(tensor.reshape(-1) for tensor in tensors)])


def _unpack(buffer: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Views of a buffer in the given shapes, one after the other."""
    parts = torch.split(buffer, [math.prod(shape) for shape in shapes])
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
