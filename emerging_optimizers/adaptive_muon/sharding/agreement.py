# SPDX-License-Identifier: Apache-2.0
"""What the processes of a group tell each other before they rely on it: an error on all of them, not a hang."""

from itertools import zip_longest
from typing import Any

from torch import distributed as dist
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require


__all__ = ["require_agreement", "tell_all"]


def tell_all[T](group: ProcessGroup, value: T, subject: str) -> list[T]:
    """Returns the values of all ranks of a group, in their order.

    Args:
        group: The process group; all of its ranks must call.
        value: What this rank tells; it is pickled.
        subject: What is compared, for the error.

    Raises:
        RuntimeError: If a rank does not answer, because it died, went elsewhere or is late beyond the group's timeout.
    """
    values: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(values, value, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {group.rank()} of {group.size()} compared {subject} with its process group, and not all answered: "
            "another rank has failed (see its own error) or makes another optimizer step"
        ) from error
    return values


def require_agreement(values: list[Any], subject: str, remedy: str) -> None:
    """Raises a ``ValueError``, the same on all ranks, unless all ranks told the same.

    Args:
        values: What each rank told. Of lists, the first entry that differs is shown.
        subject: What must be the same.
        remedy: What to do about it.
    """
    if isinstance(values[0], list):
        for entries in zip_longest(*values, fillvalue="nothing"):
            require_agreement(list(entries), subject, remedy)
        return
    told: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        told.setdefault(str(value), []).append(rank)
    by_rank = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in told.items())
    require(len(told) == 1, f"{subject} must be the same on all ranks of a process group", by_rank, remedy)
