# SPDX-License-Identifier: Apache-2.0
"""The values that were measured last of every matrix, on its device until somebody reads them."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, override

import torch

from emerging_optimizers.adaptive_muon.exchange import Mode


__all__ = ["VALUES", "Key", "Measuring", "Store", "make_store"]

# What is kept of a matrix: sums of G^2, M'^2, G M', W^2 and (D O)^2 over its elements; D's mean, least and largest; the square
# of O's error; the share of D that a clamp has moved; the factor of D O in the update; the number of elements; the step.
VALUES = (
    *("gradient", "momentum", "product", "weight", "update", "scale_mean", "scale_min", "scale_max"),
    *("orthogonality", "clamped", "factor", "size", "step"),
)

# The identity of a parameter, and the number of a block of it or None.
Key = tuple[tuple[int, str], int | None]


class _Rows:
    """A tensor of values for each matrix, kept as the tensors of the batches in which they were made.

    Values of the same batch as before are written in place. So a CUDA graph, which repeats what it saw, finds them.
    """

    def __init__(self) -> None:
        self._rows: dict[Key, tuple[torch.Tensor, int]] = {}

    def put(self, keys: Sequence[Key], values: torch.Tensor) -> None:
        """Keep a batch's values."""
        of_batch = self._of_batch(keys)
        if of_batch is not None and of_batch.shape == values.shape:
            of_batch.copy_(values)
            return
        values = values.clone()
        self._rows.update((key, (values, index)) for index, key in enumerate(keys))

    def take(self, keys: Sequence[Key], like: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return a batch's values; where some are missing, those that ``like`` returns, which are not a number."""
        of_batch = self._of_batch(keys)
        if of_batch is not None:
            return of_batch
        nothing = like()
        rows = [self._rows.get(key, (nothing, index)) for index, key in enumerate(keys)]
        return torch.stack([tensor[index] for tensor, index in rows])

    def __contains__(self, key: Key) -> bool:
        """Return whether there are values of a matrix."""
        return key in self._rows

    def items(self) -> Iterator[tuple[Key, torch.Tensor, int]]:
        """Yield the matrices with their batches' values, and their places in them."""
        yield from ((key, tensor, index) for key, (tensor, index) in self._rows.items())

    def keep(self, parameters: Collection[tuple[int, str]]) -> None:
        """Drop the values of all other parameters' matrices."""
        self._rows = {key: row for key, row in self._rows.items() if key[0] in parameters}

    def _of_batch(self, keys: Sequence[Key]) -> torch.Tensor | None:
        """Return the tensor of exactly these matrices in this order, or None."""
        tensor, _ = self._rows.get(keys[0], (None, 0))
        if tensor is None or tensor.size(0) != len(keys):
            return None
        rows = (self._rows.get(key, (None, -1)) for key in keys)
        return tensor if all(row[0] is tensor and row[1] == index for index, row in enumerate(rows)) else None


class Measuring(NamedTuple):
    """What a step measures. It is the same on all ranks, since the sizes of their messages depend on it."""

    store: "Store"
    measures: bool  # whether the step is measured
    carries: bool  # whether messages carry what shards alone knew after the step before
    assembles: bool  # whether O is whole on some rank


class Store:
    """What was measured last of every matrix.

    Args:
        every: How many steps there are from one that is measured to the next.
        on_device: Whether steps are counted on the device, where a CUDA graph's replays count.
        assembles: Whether the mode has O whole on some rank.
    """

    def __init__(self, every: int, *, on_device: bool, assembles: bool) -> None:
        self.every, self.on_device, self._assembles = every, on_device, assembles
        self.steps = 0  # that have ended
        self._counts: dict[torch.device, torch.Tensor] = {}
        self.complete = _Rows()
        self.awaiting = _Rows()  # of which the shards' part is on its way
        self.newest = 0  # the last step of which values are complete, as far as the host knows: it does not see a graph's replays

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy has: values are of an optimizer's own parameters."""
        return {**vars(self), "_counts": {}, "complete": _Rows(), "awaiting": _Rows()}

    def begin_step(self) -> Measuring | None:
        """Return what the step that begins measures; None for nothing."""
        step = self.steps + 1
        measures, carries = step % self.every == 0, self.steps > 0 and self.steps % self.every == 0
        return Measuring(self, measures, carries, self._assembles) if measures or carries else None

    def put(self, keys: Sequence[Key], values: torch.Tensor, step: int) -> None:
        """Keep the complete values of matrices that were measured in a step."""
        self.complete.put(keys, values)
        self.newest = step

    def end_step(self) -> None:
        """Count a step that has ended. One that raised an error does not count, on any rank."""
        self.steps += 1
        for count in self._counts.values():
            count += 1

    def step_on(self, device: torch.device) -> float | torch.Tensor:
        """Return the number of the step that has begun, as a tensor where it is counted on the device."""
        if not self.on_device:
            return float(self.steps + 1)
        if device not in self._counts:
            self._counts[device] = torch.full((), float(self.steps), device=device)
        return self._counts[device] + 1

    def keep(self, parameters: Collection[tuple[int, str]]) -> None:
        """Drop the values of all parameters but these."""
        self.complete.keep(parameters)
        self.awaiting.keep(parameters)

    def read(self) -> dict[Key, list[list[float]]]:
        """Return the values of each matrix: a list of them, of a stack one per matrix in it. This waits for the device."""
        tensors = {id(tensor): tensor for _, tensor, _ in self.complete.items()}
        on_host: dict[int, list[Any]] = {}
        for kind in {(tensor.device, tensor.dtype) for tensor in tensors.values()}:
            of_kind = {key: each for key, each in tensors.items() if (each.device, each.dtype) == kind}
            flat = torch.cat([each.reshape(-1) for each in of_kind.values()]).cpu()
            parts = torch.split(flat, [each.numel() for each in of_kind.values()])
            for (key, each), part in zip(of_kind.items(), parts, strict=True):
                on_host[key] = part.view(each.size(0), -1, len(VALUES)).tolist()
        return {key: on_host[id(tensor)][index] for key, tensor, index in self.complete.items()}


def make_store(every: int | None, mode: Mode | None, *, on_device: bool) -> Store | None:
    """Return the store of an optimizer, or None if it measures nothing.

    Args:
        every: How many steps there are from one that is measured to the next; None for no measures.
        mode: How matrices in shards are orthogonalized.
        on_device: Whether steps are counted on the device.
    """
    return None if every is None else Store(every, on_device=on_device, assembles=mode is None or mode.assembles)
