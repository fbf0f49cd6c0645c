# SPDX-License-Identifier: Apache-2.0
"""Which parameters have a gradient: what the ranks of a process group agree about, and find out where they do not.

Ranks compare their gradients in a small exchange. They do so after they have exchanged shard infos, and not in every
step. In a later step a rank can find its gradients changed while the others are in their usual messages. It must not
begin an exchange then: nobody would answer. It *knocks*: it takes part in the others' messages, with zeros, and raises
its flag, which is in the first message of every step.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.identity import identity
from emerging_optimizers.adaptive_muon.sharding.agreement import gather_from_all, require_agreement


__all__ = ["AllChanged", "Comparison", "Flag", "flags_are_read_at_once", "require_equal_replicas"]

Key = tuple[int, str]
# The parameters that a process group holds, in their order, and their names in errors.
Names = Mapping[torch.Tensor, str]

_REMEDY = "Let every rank take part in the backward pass."


class AllChanged(Exception):
    """All ranks have other gradients than they had, and the same ones: the step that they began is left."""


class Flag:
    """What each rank adds to the first message of a step in a process group: whether its gradients have changed.

    Args:
        raised: Whether they have.
        arrived: Called with the flags of all ranks, or with their sum.
    """

    def __init__(self, raised: bool, arrived: Callable[[torch.Tensor], None]) -> None:
        self._raised, self._arrived = raised, arrived

    def tensor(self, device: torch.device) -> torch.Tensor:
        """Return what is sent: one element, 1 if the flag is raised."""
        return torch.full((1,), float(self._raised), dtype=torch.float32, device=device)

    def arrived(self, flags: Sequence[torch.Tensor]) -> None:
        """Take the flags of all ranks, or their sum.

        Raises:
            ValueError: If ranks disagree about gradients.
            AllChanged: If this rank's flag is raised, and all ranks agree.
        """
        self._arrived(torch.cat([*flags]))


def flags_are_read_at_once(device: torch.device) -> bool:
    """Return whether flags are read when they arrive, which on CUDA would make the process wait for the device."""
    return device.type != "cuda"


class Comparison:
    """What the ranks of each process group have agreed about their gradients."""

    def __init__(self) -> None:
        # The parameters that had a gradient when ranks compared them; None if they have exchanged shard infos since.
        self._agreed: dict[ProcessGroup, list[Key] | None] = {}
        # This rank's parameters with a gradient where they are others, and it could not compare them yet.
        self._changed: dict[ProcessGroup, list[Key]] = {}
        # Flags that are not read yet, and the event after which they can be.
        self._flags: dict[ProcessGroup, tuple[torch.Tensor, torch.cuda.Event | None]] = {}

    @property
    def changed(self) -> Collection[ProcessGroup]:
        """The process groups in which this rank must knock."""
        return self._changed.keys()

    @property
    def is_due(self) -> bool:
        """Whether ranks have exchanged shard infos since :meth:`compare`, which all of them then call."""
        return None in self._agreed.values()

    def forget(self, group: ProcessGroup) -> None:
        """Have all ranks of a group compare their gradients next time: they have exchanged shard infos."""
        self._agreed[group] = None

    def compare(self, by_group: Mapping[ProcessGroup, Names]) -> None:
        """Raise a ``ValueError`` unless all ranks have a gradient of the same parameters, as far as they compare now.

        They do if they have exchanged shard infos, or if none had a gradient last time. Else no other rank may come: the
        groups are in :attr:`changed` then.
        """
        self._changed = {}
        for group, names in by_group.items():
            having = [identity(p) for p in names if p.grad is not None]
            agreed = self._agreed.get(group)
            if having != agreed:
                self._changed[group] = having
                if not agreed:
                    self.agree(group, names)
        self._agreed = {group: agreed or [] for group, agreed in self._agreed.items()}

    def agree(self, group: ProcessGroup, names: Names, remedy: str = _REMEDY) -> None:
        """Compare gradients with the other ranks of a group, all of which call this, or raise a ``ValueError`` on all."""
        having = self._changed.get(group, self._agreed.get(group) or [])
        lines = [f"{name} has {'a' if identity(p) in having else 'no'} gradient" for p, name in names.items()]
        subject = "which parameters have a gradient"
        require_agreement(gather_from_all(group, lines, subject), subject, remedy)
        self._agreed[group] = having
        self._changed.pop(group, None)

    def agreed(self, group: ProcessGroup, names: Names) -> list[torch.Tensor]:
        """Return the parameters that had a gradient when the ranks of a group last agreed; none if one is gone."""
        keys = {*(self._agreed.get(group) or [])}
        found = [p for p in names if identity(p) in keys]
        return found if len(found) == len(keys) else []

    def flag(self, group: ProcessGroup, names: Callable[[], Names]) -> Flag:
        """Return this rank's flag for a step of a group.

        Args:
            group: The process group.
            names: Returns its parameters, for an error.
        """
        raised = group in self._changed

        def arrived(flags: torch.Tensor) -> None:
            at_once = flags_are_read_at_once(flags.device)
            number = int(flags.sum()) if raised or at_once else 0
            if number == group.size() or (number and at_once):
                self.agree(group, names())
                raise AllChanged
            if at_once or (flags.is_cuda and torch.cuda.is_current_stream_capturing()):
                return
            event = torch.cuda.Event() if flags.is_cuda else None  # type: ignore[no-untyped-call]
            self._flags[group] = flags.to("cpu", non_blocking=True), event
            if event is not None:
                event.record(torch.cuda.current_stream(flags.device))  # the current device may be another one

        return Flag(raised, arrived)

    def check_last_step(self, by_group: Callable[[], Mapping[ProcessGroup, Names]]) -> None:
        """Raise a ``ValueError`` if a rank had other gradients in the last step, whose flags are not read yet.

        They have arrived long before. Nothing is read while a CUDA graph is captured.
        """
        if not self._flags or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        pending, self._flags = self._flags, {}
        for group, (flags, event) in pending.items():
            if event is not None:
                event.synchronize()
            if flags.any():
                remedy = f"Load a checkpoint from before the last step, which was wrong on all ranks. {_REMEDY}"
                self.agree(group, by_group()[group], remedy)


def require_equal_replicas(group: ProcessGroup, shards: Mapping[str, tuple[Hashable, torch.Tensor]]) -> None:
    """Raise a ``ValueError``, the same on all ranks of a group, unless equal shards have the same bits.

    Args:
        group: The process group.
        shards: For each parameter, by its name in errors, which shard this rank holds and its values.
    """
    own = [(shard, _sum_of_bits(values)) for shard, values in shards.values()]
    for name, *of_ranks in zip(shards, *gather_from_all(group, own, "the weights of replicas"), strict=True):
        first: dict[Hashable, tuple[int, int]] = {}
        for rank, (shard, total) in enumerate(of_ranks):
            other, expected = first.setdefault(shard, (rank, total))
            require(
                total == expected,
                f"replicas must have the same weights; those of {name} differ on the ranks of a process group",
                [other, rank],
                "Broadcast the weights first, or set share_replicas=False if these are no replicas.",
            )


def _sum_of_bits(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's elements, each taken for an integer with the same bits."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(integers).sum(dtype=torch.int64))
