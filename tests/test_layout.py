# SPDX-License-Identifier: Apache-2.0
"""What a layout answers about a matrix in pieces is what it would about the whole: all ranks here in one process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emerging_optimizers.adaptive_muon.exchange.collectives import Sum
from emerging_optimizers.adaptive_muon.exchange.together import run, together
from emerging_optimizers.adaptive_muon.sharding.layout import Layout, Rectangle, ShardedLayout


class Group:
    """Stands for the process group of simulated ranks; also counts what they ask."""

    def __init__(self, size: int):
        self.ranks, self.summed = size, []

    def size(self) -> int:
        return self.ranks


@contextmanager
def simulated() -> Iterator[None]:
    """Sums over simulated ranks, which all ask in the order of their ranks, for the same number of the same shapes."""

    def answer_group(cls: Any, group: Group, requests: Sequence[Sum]) -> list[Any]:
        assert len(requests) % group.size() == 0, "a rank waits for others that do not ask"
        each = len(requests) // group.size()
        by_rank = [requests[start : start + each] for start in range(0, len(requests), each)]
        sums = [
            [torch.stack(terms).sum(0) for terms in zip(*(request.terms for request in same), strict=True)]
            for same in zip(*by_rank, strict=True)
        ]
        group.summed += [sum(term.numel() for request in sums for term in request)]
        return sums * group.size()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sum, "answer_group", classmethod(answer_group))
        yield


def of_ranks(
    whole: tuple[int, int], rectangles: Sequence[tuple[int, ...]], ask: Callable[[int, Layout], Any]
) -> tuple[list[Any], list[int]]:
    """What each rank's coroutine returns, and the number of elements of each sum over the ranks."""
    group, pieces = Group(len(rectangles)), tuple(Rectangle(*each) for each in rectangles)
    layouts = [ShardedLayout(group, rank, whole, pieces) for rank in range(len(pieces))]
    with simulated():
        return run(ask(rank, layout) for rank, layout in enumerate(layouts)), group.summed


# -------------------------------------------------------------------------------------------------------------- tilings


@st.composite
def cuts(draw: st.DrawFn, length: int, most: int) -> list[tuple[int, int]]:
    """A length in up to ``most`` parts; some may be empty."""
    inner = draw(st.lists(st.integers(0, length), max_size=most - 1))
    return list(pairwise([0, *sorted(inner), length]))


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, int], list[tuple[int, int, int, int]]]:
    """A shape and its pieces: a grid, or bands of rows or of columns each with cuts of its own; in any order."""
    whole = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    kind = draw(st.sampled_from(["grid", "bands of rows", "bands of columns"]))
    first = 1 if kind == "bands of columns" else 0
    same = draw(cuts(whole[1 - first], 3))
    pieces = []
    for band in draw(cuts(whole[first], 3)):
        for part in same if kind == "grid" else draw(cuts(whole[1 - first], 3)):
            pieces.append((*part, *band) if first else (*band, *part))
    empty = st.tuples(cuts(whole[0], 2), cuts(whole[1], 2), st.booleans())
    for rows, columns, along in draw(st.lists(empty, max_size=2)):  # held by ranks that have nothing
        (top, bottom), (left, right) = rows[0], columns[0]
        pieces.append((top, top, left, right) if along else (top, bottom, left, left))
    return whole, draw(st.permutations(pieces))


def cut(tensor: torch.Tensor, rectangle: Rectangle, dims: tuple[int, ...] = (-2, -1)) -> torch.Tensor:
    """What a rank holds of a tensor that lies along ``dims`` as the whole matrix does."""
    for dim in dims:
        start, stop = rectangle[2 * dim + 4 : 2 * dim + 6]
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def values(stack: tuple[int, ...], whole: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(*stack, *whole, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Along which dimensions each of these answers lies as the matrix does.
LIE = ((), (), (-2,), (-2,), (-1,), (-1,), (), (), (), ())


async def everything(layout: Layout, one: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    """Norms of two tensors, and totals of what the norms along the other dimension are."""
    norms = await layout.norms(one, other)
    of_rows = await layout.norms(one, other, dim=-1)
    of_columns = await layout.norms(one, other, dim=-2)
    totals = [await layout.totals(*of_rows, dim=-2), await layout.totals(*of_columns, dim=-1)]
    return [*norms, *of_rows, *of_columns, *totals[0], *totals[1]]


PINWHEEL = ((3, 3), [(0, 1, 0, 2), (0, 2, 2, 3), (2, 3, 1, 3), (1, 3, 0, 1), (1, 2, 1, 2)])  # no cut goes through


@settings(deadline=None, max_examples=120, derandomize=True)
@example(PINWHEEL, (), 0)
@given(tilings(), st.sampled_from([(), (3,), (1,)]), st.integers(0, 2**16))
def test_reductions_are_those_of_the_whole(tiling: Any, stack: tuple[int, ...], seed: int) -> None:
    whole, rectangles = tiling
    one, other = values(stack, whole, seed), 1e3 * values(stack, whole, seed + 1)
    [expected] = run([everything(Layout(), one, other)])

    async def ask(rank: int, layout: ShardedLayout) -> list[torch.Tensor]:
        assert layout.own == rectangles[rank] and layout.shape(cut(one, layout.own)) == whole
        return await everything(layout, cut(one, layout.own), cut(other, layout.own))

    answers, _ = of_ranks(whole, rectangles, ask)
    for rectangle, answer in zip(rectangles, answers, strict=True):
        pieces = [cut(each, Rectangle(*rectangle), dims) for each, dims in zip(expected, LIE, strict=True)]
        torch.testing.assert_close(answer, pieces, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=50, derandomize=True)
@example(PINWHEEL, (2,), 1.0, 0)
@given(tilings(), st.sampled_from([(), (2,)]), st.sampled_from([0.0, -1e-30, float("nan")]), st.integers(0, 2**16))
def test_nonzero_is_of_the_whole(tiling: Any, stack: tuple[int, ...], element: float, place: int) -> None:
    whole, rectangles = tiling
    tensor = torch.zeros(*stack, *whole, dtype=torch.float64)
    tensor.view(-1)[place % tensor.numel()] = element

    async def ask(rank: int, layout: ShardedLayout) -> bool:
        return await layout.nonzero(cut(tensor, layout.own))

    [expected] = run([Layout().nonzero(tensor)])
    answers, _ = of_ranks(whole, rectangles, ask)
    assert expected is (element != 0) and answers == [expected] * len(rectangles)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(tilings(), min_size=2, max_size=3), st.integers(0, 2**16))
def test_matrices_side_by_side_keep_their_answers(drawn: list[Any], seed: int) -> None:
    """Of one group, whose ranks ask for all matrices at once, and of two groups at the same time."""
    ranks = max(len(pieces) for _, pieces in drawn)
    matrices = [(whole, [*pieces, *[(0, 0, 0, 0)] * (ranks - len(pieces))]) for whole, pieces in drawn]
    groups = {Group(ranks): 0, Group(ranks): 1}
    tensors = [[values((), whole, seed + i + 9 * of) for i, (whole, _) in enumerate(matrices)] for of in (0, 1)]
    expected = [run(everything(Layout(), tensor, -tensor) for tensor in each) for each in tensors]

    async def ask(group: Group, rank: int) -> list[list[torch.Tensor]]:
        layouts = [
            ShardedLayout(group, rank, whole, tuple(Rectangle(*r) for r in pieces)) for whole, pieces in matrices
        ]
        pieces = [cut(tensor, layout.own) for tensor, layout in zip(tensors[groups[group]], layouts, strict=True)]
        return await together(everything(*each, -each[1]) for each in zip(layouts, pieces, strict=True))

    with simulated():
        answers = run(ask(group, rank) for rank in range(ranks) for group in groups)
    for index, answer in enumerate(answers):
        for each, whole, (_, pieces) in zip(answer, expected[index % 2], matrices, strict=True):
            own = Rectangle(*pieces[index // 2])
            parts = [cut(part, own, dims) for part, dims in zip(whole, LIE, strict=True)]
            torch.testing.assert_close(each, parts, rtol=1e-12, atol=0)
    one, other = (group.summed for group in groups)
    assert one == other and len(one) <= 5


# How many elements are summed over the ranks by norms (of all, along rows, along columns) and by totals (along a column,
# along a row) of a 6 x 4 matrix.
ASKED = {
    "rows": ([(0, 1, 0, 4), (1, 6, 0, 4)], ([1], [], [4]), ([1], [])),
    "columns": ([(0, 6, 0, 3), (0, 6, 3, 4)], ([1], [6], []), ([], [1])),
    "grid": ([(0, 2, 0, 3), (0, 2, 3, 4), (2, 6, 0, 3), (2, 6, 3, 4)], ([1], [6], [4]), ([1], [1])),
    "whole": ([(0, 6, 0, 4)], ([], [], []), ([], [])),
}


@pytest.mark.parametrize(("rectangles", "of_norms", "of_totals"), ASKED.values(), ids=ASKED)
def test_only_what_is_elsewhere_is_asked_for(rectangles: Any, of_norms: Any, of_totals: Any) -> None:
    """And of several tensors in one sum."""
    for dim, expected in zip((None, -1, -2), of_norms, strict=True):
        for count in (1, 2):

            async def norms(rank: int, layout: ShardedLayout, dim: Any = dim, count: int = count) -> Any:
                return await layout.norms(*[torch.ones(layout.own.shape)] * count, dim=dim)

            assert of_ranks((6, 4), rectangles, norms)[1] == [count * each for each in expected]
    for dim, expected in zip((-2, -1), of_totals, strict=True):

        async def totals(rank: int, layout: ShardedLayout, dim: int = dim) -> Any:
            rows, columns = layout.own.shape
            vectors = torch.ones((rows, 1) if dim == -2 else (1, columns))
            return await layout.totals(vectors, vectors.double(), dim=dim)

        answers, summed = of_ranks((6, 4), rectangles, totals)
        assert summed == [2 * each for each in expected]
        assert all(one.item() == other.item() == (6, 4)[dim] for one, other in answers)
        assert all((one.dtype, other.dtype) == (torch.float32, torch.float64) for one, other in answers)


# --------------------------------------------------------------------------------------------------- no tiling, no layout


def spoiled(tiling: Any, how: str, index: int, by: tuple[int, int]) -> tuple[tuple[int, int], list[Any]]:
    """A tiling that is none any more."""
    whole, pieces = tiling
    full = [each for each in pieces if each[0] < each[1] and each[2] < each[3]]
    top, bottom, left, right = full[index % len(full)]
    without = list(pieces)
    without.remove((top, bottom, left, right))
    down, along = by
    return {
        "gap": (whole, without),
        "overlap": (whole, [*pieces, (top, bottom, left, right)]),
        "moved": (whole, [*without, (top + down, bottom + down, left + along, right + along)]),
        "wider": ((whole[0], whole[1] + 1), pieces),
        "shorter": ((whole[0] - 1, whole[1]), pieces),
    }[how]


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    tilings(),
    st.sampled_from(["gap", "overlap", "moved", "wider", "shorter"]),
    st.integers(0, 8),
    st.tuples(st.integers(-3, 3), st.integers(-3, 3)).filter(any),
)
def test_what_is_no_tiling_is_refused(tiling: Any, how: str, index: int, by: tuple[int, int]) -> None:
    whole, pieces = spoiled(tiling, how, index, by)
    with pytest.raises(ValueError, match=rf"whole \({whole[0]}, {whole[1]}\) matrix, each element once, got"):
        ShardedLayout(Group(len(pieces)), 0, whole, tuple(Rectangle(*each) for each in pieces))


# Nothing is held there, but a part of a sum would be looked for there, too late for an error that changes nothing.
@pytest.mark.parametrize("nothing", [(0, 4, 9, 9), (0, 9, 2, 2), (9, 9, 0, 2), (-1, -1, 0, 4)], ids=str)
def test_an_empty_piece_is_within_the_matrix(nothing: tuple[int, int, int, int]) -> None:
    pieces = (0, 2, 0, 2), (0, 2, 2, 4), (2, 4, 0, 4), nothing
    with pytest.raises(ValueError, match="each element once"):
        ShardedLayout(Group(4), 0, (4, 4), tuple(Rectangle(*each) for each in pieces))


@pytest.mark.parametrize(
    ("piece", "turned"),
    [((0, 4, 0, 4), (3, 1, 2, 2)), ((0, 4, 0, 4), (2, 2, 3, 1)), ((0, 3, 0, 4), (3, 1, 4, 2))],
    ids=str,
)
def test_a_piece_ends_after_it_begins(piece: tuple[int, int, int, int], turned: tuple[int, int, int, int]) -> None:
    """The area of one with both ends before its beginning would fill a gap."""
    with pytest.raises(ValueError, match="each element once"):
        ShardedLayout(Group(2), 0, (4, 4), (Rectangle(*piece), Rectangle(*turned)))
