# SPDX-License-Identifier: Apache-2.0
"""Coroutines side by side: each gets its own answers, and what is asked at the same time is answered at once."""

import gc
import sys
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emerging_optimizers.adaptive_muon.exchange.together import Request, run, together


pytestmark = pytest.mark.filterwarnings("error")  # also of a coroutine that was never awaited

Path = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Asked(Request[tuple[str, Path]]):
    """Answered by its kind and its own place in the tree of coroutines."""

    log: "Log"
    path: Path

    @classmethod
    def answer_all(cls, requests: Sequence["Asked"]) -> list[tuple[str, Path]]:
        log = requests[0].log
        log.calls.append((cls.__name__, [request.path for request in requests]))
        if len(log.calls) == log.fails:
            raise Broken(("answering",))
        answers = [(cls.__name__, request.path) for request in requests]
        return answers[: len(answers) + log.too_many] + answers[:1] * log.too_many


class One(Asked):
    pass


class Other(Asked):
    pass


class Broken(Exception):
    pass


@dataclass
class Log:
    """What happened: calls of answer_all, and coroutines that began and ended. And which call is to fail, and how."""

    fails: int | None = None
    too_many: int = 0
    calls: list[tuple[str, list[Path]]] = field(default_factory=list)
    began: list[Path] = field(default_factory=list)
    ended: list[Path] = field(default_factory=list)


# A coroutine as a list of what it does in turn: ask, raise, or run a list of coroutines together.
Program = list[Any]
KINDS = {"one": One, "other": Other}
asking = st.sampled_from(["one", "other"])
raising = st.sampled_from(["one", "other"] * 6 + ["raise"])


def programs(action: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Program]]:
    program = st.recursive(
        st.lists(action, max_size=3),
        lambda inner: st.lists(action | st.lists(inner, max_size=3), max_size=3),
        max_leaves=12,
    )
    return st.lists(program, max_size=4)


async def play(program: Program, log: Log, path: Path) -> list[Any]:
    log.began.append(path)
    try:
        results: list[Any] = []
        for index, action in enumerate(program):
            at = (*path, index)
            if action == "raise":
                raise Broken(at)
            if isinstance(action, str):
                results.append(await KINDS[action](log, at))
            else:
                results.append(await together(play(inner, log, (*at, i)) for i, inner in enumerate(action)))
        return results
    finally:
        log.ended.append(path)


def played(tree: list[Program], log: Log) -> list[list[Any]]:
    return run(play(program, log, (i,)) for i, program in enumerate(tree))


def expected(program: Program, path: Path) -> list[Any]:
    """What a coroutine returns: everyone's own answers."""
    return [
        (KINDS[action].__name__, (*path, index))
        if isinstance(action, str)
        else [expected(inner, (*path, index, i)) for i, inner in enumerate(action)]
        for index, action in enumerate(program)
    ]


def times(program: Program, path: Path, start: int, seen: list[tuple[int, Path, str]]) -> int:
    """Enters when each action happens, in answers waited for; returns when the coroutine ends."""
    for index, action in enumerate(program):
        at = (*path, index)
        if isinstance(action, str):
            seen.append((start, at, action))
            start += action != "raise"
        else:
            start = max([start, *(times(inner, (*at, i), start, seen) for i, inner in enumerate(action))])
    return start


def schedule(tree: list[Program]) -> tuple[list[tuple[str, list[Path]]], Path | None]:
    """The calls of answer_all that there must be, up to the first raise, and who raises it.

    At any time one call for each kind that somebody asks for, in the order of the tree.
    """
    seen: list[tuple[int, Path, str]] = []
    for i, program in enumerate(tree):
        times(program, (i,), 0, seen)
    seen.sort()
    end = next(((time, path) for time, path, action in seen if action == "raise"), (sys.maxsize, None))
    calls: dict[tuple[int, str], list[Path]] = {}
    for time, path, action in seen:
        if time < end[0]:
            calls.setdefault((time, action), []).append(path)
    return [(KINDS[kind].__name__, paths) for (_, kind), paths in calls.items()], end[1]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(programs(asking))
def test_everyone_gets_the_own_answers_and_few_calls_are_made(tree: list[Program]) -> None:
    log = Log()
    assert played(tree, log) == [expected(program, (i,)) for i, program in enumerate(tree)]
    assert (log.calls, None) == schedule(tree)
    assert sorted(log.began) == sorted(log.ended)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(programs(raising))
def test_the_first_exception_comes_out_and_all_are_closed(tree: list[Program]) -> None:
    log, (calls, raises) = Log(), schedule(tree)
    if raises is None:
        played(tree, log)
    else:
        with pytest.raises(Broken) as broken:
            played(tree, log)
        assert broken.value.args == (raises,)
    assert log.calls == calls
    assert sorted(log.began) == sorted(log.ended)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(programs(asking), st.integers(1, 4))
def test_an_answer_that_fails_closes_all(tree: list[Program], fails: int) -> None:
    """At once, and not when nobody holds the exception with its frames any more."""
    log, (calls, _) = Log(fails), schedule(tree)
    if len(calls) < fails:
        played(tree, log)
    else:
        with pytest.raises(Broken) as broken:
            played(tree, log)
        assert broken.value.args == (("answering",),)
        assert log.calls == calls[:fails]
    assert sorted(log.began) == sorted(log.ended)


@pytest.mark.parametrize("too_many", [-1, 1])
def test_as_many_answers_as_requests(too_many: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        played([["one"], ["one"]], Log(too_many=too_many))


def test_nothing_to_do() -> None:
    log = Log()
    assert run([]) == [] and played([[], [[]], [[[], [[]]]]], log) == [[], [[]], [[[], [[]]]]]
    assert not log.calls


def test_an_exception_may_be_caught_on_the_way() -> None:
    """The others of its together are closed by then, and everyone else goes on."""
    log = Log()

    async def catches() -> Any:
        try:
            await together(play(program, log, (i,)) for i, program in enumerate([["one", "one"], ["one", "raise"]]))
        except Broken as broken:
            assert log.ended == [(1,), (0,)]
            return broken.args, await One(log, (9,))

    assert run([catches(), play(["one", "other"], log, (2,))]) == [
        (((1, 1),), ("One", (9,))),
        [("One", (2, 0)), ("Other", (2, 1))],
    ]
    assert log.calls == [
        ("One", [(0, 0), (1, 0), (2, 0)]),
        ("One", [(9,)]),
        ("Other", [(2, 1)]),
    ]


@pytest.mark.parametrize("nested", [False, True], ids=["run", "together"])
def test_no_coroutine_is_left_where_making_one_raises(nested: bool) -> None:
    log = Log()

    def made() -> Iterator[Coroutine[Any, Any, Any]]:
        yield play(["one"], log, (0,))
        raise Broken(("making",))

    async def outer() -> Any:
        return await together(made())

    with pytest.raises(Broken):
        run([outer()] if nested else made())
    gc.collect()
    assert not log.calls
