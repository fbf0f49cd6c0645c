# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads of one process, which meet at a barrier where the package calls a collective."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Ranks:
    """Stands for a process group, and counts the collectives that every rank has called."""

    def __init__(self, size: int) -> None:
        self.called = [Counter[str]() for _ in range(size)]
        self._barrier = threading.Barrier(size, timeout=60)
        self._posted: list[Any] = [None] * size
        self._own = threading.local()

    def size(self) -> int:
        return len(self.called)

    def rank(self) -> int:
        rank: int = self._own.rank
        return rank

    def everyones(self, collective: str, value: Any) -> list[Any]:
        """Returns what all ranks pass to a collective, in the order of the ranks."""
        self.called[self.rank()][collective] += 1
        return self._met(collective, value)

    def _met(self, collective: str, value: Any) -> list[Any]:
        """Returns what all ranks come with, which must be in the same collective."""
        self._posted[self.rank()] = collective, value
        self._barrier.wait()
        names, values = zip(*self._posted, strict=True)
        self._barrier.wait()
        assert set(names) == {collective}, f"ranks are in different collectives: {names}"
        return list(values)

    def run[T](self, of_rank: Callable[[int], T]) -> list[T]:
        """Returns what a function returns on every rank."""
        results: list[Any] = [None] * self.size()
        errors: list[BaseException] = []

        def run(rank: int) -> None:
            self._own.rank = rank
            try:
                results[rank] = of_rank(rank)
                self._met("none: they have returned", None)
            except BaseException as error:  # the others must not wait
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=run, args=[rank]) for rank in range(self.size())]
        with simulated_collectives():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return results


class Work:
    """A collective on its way: what it brings is in place when it has been waited for, and not before."""

    def __init__(self, arrived: torch.Tensor, bring: Callable[[], torch.Tensor]) -> None:
        self._arrived, self._bring = arrived, bring
        arrived.fill_(0xA5)

    def wait(self) -> None:
        self._arrived.copy_(self._bring())


@contextmanager
def simulated_collectives() -> Iterator[None]:
    """Has :class:`Ranks` take the place of process groups in the collectives that a step calls."""

    def all_to_all(
        arrived: torch.Tensor,
        sent: torch.Tensor,
        received: Sequence[int],
        splits: Sequence[int],
        *,
        group: Ranks,
        async_op: bool,
    ) -> Work:
        assert async_op
        assert not any(size % 16 for size in (*received, *splits)), "bytes of a message that are not aligned"
        of_ranks = group.everyones("all_to_all", torch.split(sent, list(splits)))
        to_this_rank = [parts[group.rank()] for parts in of_ranks]
        assert [len(part) for part in to_this_rank] == list(received), "another size arrives than is expected"
        return Work(arrived, lambda: torch.cat(to_this_rank))

    def all_gather(arrived: torch.Tensor, sent: torch.Tensor, *, group: Ranks, async_op: bool) -> Work:
        assert async_op
        assert len(sent) % 16 == 0, "bytes of a message that are not aligned"
        of_ranks = group.everyones("all_gather", sent)
        return Work(arrived, lambda: torch.cat(of_ranks))

    def all_reduce(tensor: torch.Tensor, *, group: Ranks) -> None:
        first, *others = group.everyones("all_reduce", tensor.clone())
        tensor.copy_(sum(others, first))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.all_to_all_single", all_to_all)
        patch.setattr("torch.distributed.all_reduce", all_reduce)
        patch.setattr("torch.distributed.all_gather_single", all_gather, raising=False)
        yield
