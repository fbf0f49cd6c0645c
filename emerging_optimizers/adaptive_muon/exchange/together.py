# SPDX-License-Identifier: Apache-2.0
"""Many matrices side by side: what they wait for at the same time is done for all of them at once.

A formula that needs a whole matrix of which this process holds a piece has to wait for the others. It is a coroutine
that awaits a :class:`Request`; :func:`run` lets every matrix go on to its next request, answers all requests of a kind
together, which is where many small collectives become one, and goes on until all are done. There is no event loop, no
thread and no order left to chance: processes that start with the same matrices make the same collectives.
"""

from abc import ABC, abstractmethod
from collections.abc import Coroutine, Generator, Iterable, Sequence
from types import coroutine
from typing import Any, Self


__all__ = ["Request", "run", "together"]


class Request[Answer](ABC):
    """Something to wait for: ``await request`` gives its answer."""

    @classmethod
    @abstractmethod
    def answer_all(cls, requests: Sequence[Self]) -> Sequence[Answer]:
        """Returns the answers to requests of this class, in their order."""

    def __await__(self) -> "Generator[list[Request[Any]], list[Any], Answer]":
        """Asks, and returns the answer."""
        answer: Answer
        [answer] = yield [self]
        return answer


@coroutine
def together[T](coroutines: Iterable[Coroutine[Any, Any, T]]) -> Generator[list[Request[Any]], list[Any], list[T]]:
    """Runs coroutines side by side, so that they wait together.

    Args:
        coroutines: The coroutines; they are started in this order.

    Returns:
        What each of them returned, in their order.
    """
    tasks: list[Coroutine[Any, Any, T]] = []
    results: dict[int, T] = {}
    try:
        tasks.extend(coroutines)
        replies: dict[int, list[Any] | None] = dict.fromkeys(range(len(tasks)))
        while replies:
            asked: dict[int, list[Request[Any]]] = {}
            for index, reply in replies.items():
                try:
                    asked[index] = tasks[index].send(reply)
                except StopIteration as stop:
                    results[index] = stop.value
            answers = iter((yield [request for requests in asked.values() for request in requests]) if asked else ())
            replies = {index: [next(answers) for _ in requests] for index, requests in asked.items()}
    finally:
        for task in tasks:
            task.close()
    return [results[index] for index in range(len(tasks))]


def run[T](coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs coroutines side by side to their end, and returns what each of them returned."""
    asking = together(coroutines)
    try:
        requests = next(asking)
        while True:
            requests = asking.send(_answers(requests))
    except StopIteration as stop:
        results: list[T] = stop.value
        return results
    finally:
        asking.close()


def _answers(requests: list[Request[Any]]) -> list[Any]:
    """The answers to requests of several kinds, those of one kind together; kinds in the order they first appear."""
    kinds: dict[type[Request[Any]], list[int]] = {}
    for index, request in enumerate(requests):
        kinds.setdefault(type(request), []).append(index)
    answers: list[Any] = [None] * len(requests)
    for kind, indices in kinds.items():
        for index, answer in zip(indices, kind.answer_all([requests[i] for i in indices]), strict=True):
            answers[index] = answer
    return answers
