# SPDX-License-Identifier: Apache-2.0
"""Ways to cut a matrix into the shards of ranks, for hypothesis to draw."""

from itertools import pairwise
from typing import NamedTuple

from hypothesis import strategies as st

from emerging_optimizers.adaptive_muon.sharding.layout import Rectangle


class Tiling(NamedTuple):
    """The shape of a matrix, the rectangle of each rank, and the number of each rank's replica."""

    whole: tuple[int, int]
    rectangles: tuple[Rectangle, ...]
    replicas: tuple[int, ...] = ()


# No straight cut divides it.
PINWHEEL = Tiling(
    (3, 3),
    tuple(Rectangle(*r) for r in [(0, 1, 0, 2), (0, 2, 2, 3), (2, 3, 1, 3), (1, 3, 0, 1), (1, 2, 1, 2)]),
)


@st.composite
def cuts(draw: st.DrawFn, length: int, most: int) -> list[tuple[int, int]]:
    """A length in up to ``most`` parts; some may be empty."""
    inner = draw(st.lists(st.integers(0, length), max_size=most - 1))
    return list(pairwise([0, *sorted(inner), length]))


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    """A grid, or bands of rows or of columns with cuts of their own, and empty shards; in any order of the ranks."""
    whole = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    form = draw(st.sampled_from(["grid", "bands of rows", "bands of columns"]))
    first = 1 if form == "bands of columns" else 0
    same = draw(cuts(whole[1 - first], 3))
    rectangles = []
    for band in draw(cuts(whole[first], 3)):
        for part in same if form == "grid" else draw(cuts(whole[1 - first], 3)):
            rectangles.append(Rectangle(*part, *band) if first else Rectangle(*band, *part))
    empty = st.tuples(cuts(whole[0], 2), cuts(whole[1], 2), st.booleans())
    for rows, columns, along in draw(st.lists(empty, max_size=2)):
        (top, bottom), (left, right) = rows[0], columns[0]
        rectangles.append(Rectangle(top, top, left, right) if along else Rectangle(top, bottom, left, left))
    return Tiling(whole, tuple(draw(st.permutations(rectangles))))


@st.composite
def alike(draw: st.DrawFn) -> Tiling:
    """Two or three replicas, cut alike; a rank of each in turn, or one replica after the other."""
    whole, rectangles, _ = draw(tilings())
    number, in_turn = draw(st.integers(2, 3)), draw(st.booleans())
    holders = [(each, replica) for replica in range(number) for each in rectangles]
    if in_turn:
        holders = [(each, replica) for each in rectangles for replica in range(number)]
    return Tiling(whole, tuple(each for each, _ in holders), tuple(replica for _, replica in holders))


@st.composite
def replicated(draw: st.DrawFn) -> Tiling:
    """One to three replicas, cut alike or one of them whole, in any order of the ranks."""
    whole, rectangles, _ = draw(tilings())
    uncut = (Rectangle(0, whole[0], 0, whole[1]),)
    cut = [rectangles] * draw(st.integers(1, 3)) + [uncut] * draw(st.integers(0, 1))
    holders = draw(st.permutations([(each, replica) for replica, of_one in enumerate(cut) for each in of_one]))
    return Tiling(whole, tuple(each for each, _ in holders), tuple(replica for _, replica in holders))


@st.composite
def strips(draw: st.DrawFn, ranks: int) -> Tiling:
    """Strips of rows or of columns, one per rank; some may be empty."""
    whole = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    dim = draw(st.sampled_from([0, 1]))
    inner = draw(st.lists(st.integers(0, whole[dim]), min_size=ranks - 1, max_size=ranks - 1))
    spans = pairwise([0, *sorted(inner), whole[dim]])
    rectangles = [Rectangle(*span, 0, whole[1]) if dim == 0 else Rectangle(0, whole[0], *span) for span in spans]
    return Tiling(whole, tuple(draw(st.permutations(rectangles))))
