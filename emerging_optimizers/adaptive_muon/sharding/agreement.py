# SPDX-License-Identifier: Apache-2.0
"""What all ranks of a group find out together: their sums, and whether they agree, an error on all of them if not."""

from collections.abc import Hashable, Iterable, Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require


__all__ = ["gather_from_all", "group_of", "require_agreement", "sum_over", "union"]


def gather_from_all[T](group: ProcessGroup, value: T, subject: str) -> list[T]:
    """Return the values of all ranks of a group, in the order of the ranks. All of them must call.

    Raises:
        RuntimeError: If a rank does not answer, because it died, took another path or is later than the group's
            timeout. The error names the subject.
    """
    values: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"all ranks of a process group must compare {subject}, got no answer on rank {group.rank()} of "
            f"{group.size()}. See the error of the rank that failed, or make the same optimizer step on all ranks."
        ) from error
    return values


# For each world, the groups that were found or made in it: by their ranks, and by the two groups of a union.
_GROUPS: WeakKeyDictionary[ProcessGroup, dict[Hashable, ProcessGroup]] = WeakKeyDictionary()


def group_of(ranks: Iterable[int]) -> ProcessGroup:
    """Return the process group of these ranks of the world, made where there is none yet. All of them must call."""
    world, key = dist.group.WORLD, tuple(sorted(ranks))
    assert world is not None
    if len(key) == world.size():
        return world
    known = _GROUPS.setdefault(world, {})
    if key not in known:
        # Bound to a device, NCCL would split the world's communicator, in which all ranks of the world must take part.
        device, world.bound_device_id = world.bound_device_id, None
        try:
            group = dist.new_group(list(key), use_local_synchronization=True)
        finally:
            world.bound_device_id = device
        assert isinstance(group, ProcessGroup)  # this process belongs to it
        known[key] = group
    return known[key]


def union(groups: ProcessGroup, own: ProcessGroup) -> ProcessGroup:
    """Return the group of all ranks in the groups that the ranks of ``groups`` have as their own.

    All must call. They exchange the ranks the first time.
    """
    assert dist.group.WORLD is not None
    known = _GROUPS.setdefault(dist.group.WORLD, {})
    if (groups, own) not in known:
        ranks = gather_from_all(groups, dist.get_process_group_ranks(own), "the ranks of its process groups")
        known[groups, own] = group_of({rank for each in ranks for rank in each})
    return known[groups, own]


def require_agreement(values: list[Any], subject: str, remedy: str) -> None:
    """Raise a ``ValueError``, the same on all ranks, unless the values of all ranks are equal.

    If the values are lists, the error shows the first entry that differs.
    """
    if isinstance(values[0], list):
        for entries in zip_longest(*values, fillvalue="nothing"):
            require_agreement(list(entries), subject, remedy)
        return
    ranks_with: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_with.setdefault(str(value), []).append(rank)
    by_rank = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in ranks_with.items())
    require(len(ranks_with) == 1, f"{subject} must be the same on all ranks of a process group", by_rank, remedy)


def sum_over(group: ProcessGroup, terms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the sums of tensors over the ranks of a group, from one all-reduce in the widest of their dtypes.

    The terms must have the same shapes and dtypes on all ranks. Without terms, nothing is sent.
    """
    if not terms:
        return []
    widest = reduce(torch.promote_types, (term.dtype for term in terms))
    bucket = torch.cat([term.reshape(-1).to(widest) for term in terms])
    dist.all_reduce(bucket, group=group)
    sums = torch.split(bucket, [term.numel() for term in terms])
    return [total.view(term.shape).to(term.dtype) for total, term in zip(sums, terms, strict=True)]
