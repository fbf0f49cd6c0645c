# SPDX-License-Identifier: Apache-2.0
"""Which rectangles make up a matrix, and what a layout returns for them: all ranks here in one process."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tilings import PINWHEEL, Tiling, tilings

from emerging_optimizers.adaptive_muon.sharding.layout import Layout, Rectangle, ShardedLayout


def layouts(tiling: Tiling) -> list[ShardedLayout]:
    """The layout of each rank. No process group is needed to make one."""
    group: Any = None
    return [ShardedLayout(group, rank, *tiling) for rank in range(len(tiling.rectangles))]


def sums(whole: torch.Tensor, kept_dims: tuple[int, ...]) -> torch.Tensor:
    """The sums along the dimensions that are not kept."""
    for dim in {-2, -1} - {*kept_dims}:
        whole = whole.sum(dim, keepdim=True)
    return whole


# ------------------------------------------------------------------------------------------------------------- tilings


@settings(max_examples=120)
@example(PINWHEEL, ())
@given(tilings(), st.sampled_from([(), (3,), (1,)]))
def test_shards_make_up_the_whole(tiling: Tiling, stack: tuple[int, ...]) -> None:
    """Put together, the ranks' cuts of a matrix, of its rows' sums and of its columns' sums are those again."""
    whole = torch.arange(1, 1 + tiling.whole[0] * tiling.whole[1]).view(tiling.whole).expand(*stack, *tiling.whole)
    for dims in ((), (-2,), (-1,), (-2, -1)):
        reduced = sums(whole, dims)
        put_together = torch.zeros_like(reduced)
        for layout, rectangle in zip(layouts(tiling), tiling.rectangles, strict=True):
            rows = slice(rectangle.top, rectangle.bottom) if -2 in dims else slice(None)
            columns = slice(rectangle.left, rectangle.right) if -1 in dims else slice(None)
            shard = layout.cut(reduced, dims)
            assert torch.equal(shard, reduced[..., rows, columns])
            assert layout.shape(shard) == tiling.whole and layout.own == rectangle
            if rectangle.area:
                put_together[..., rows, columns] = shard
        assert torch.equal(put_together, reduced)


@settings(max_examples=60)
@example(PINWHEEL)
@given(tilings())
def test_a_dimension_is_split_where_a_rank_has_less_of_it(tiling: Tiling) -> None:
    for layout in layouts(tiling):
        for dim in (-2, -1):
            assert layout.split[dim] is any(r.shape[dim] != tiling.whole[dim] for r in tiling.rectangles)


def test_a_matrix_that_is_whole() -> None:
    whole = torch.ones(3, 4, 5)
    assert Layout().shape(whole) == (4, 5) and Layout().cut(whole) is whole


# ----------------------------------------------------------------------------------------------- no tiling, no layout


def spoiled(tiling: Tiling, how: str, index: int, by: tuple[int, int]) -> Tiling:
    """A tiling that is none any more."""
    whole, rectangles, _ = tiling
    full = [r for r in rectangles if r.area]
    one = full[index % len(full)]
    without = list(rectangles)
    without.remove(one)
    down, along = by
    moved = Rectangle(one.top + down, one.bottom + down, one.left + along, one.right + along)
    return {
        "gap": Tiling(whole, (*without,)),
        "overlap": Tiling(whole, (*rectangles, one)),
        "moved": Tiling(whole, (*without, moved)),
        "wider": Tiling((whole[0], whole[1] + 1), rectangles),
        "shorter": Tiling((whole[0] - 1, whole[1]), rectangles),
    }[how]


@settings(max_examples=120)
@given(
    tilings(),
    st.sampled_from(["gap", "overlap", "moved", "wider", "shorter"]),
    st.integers(0, 8),
    st.tuples(st.integers(-3, 3), st.integers(-3, 3)).filter(any),
)
def test_what_is_no_tiling_is_refused(tiling: Tiling, how: str, index: int, by: tuple[int, int]) -> None:
    whole, rectangles, _ = spoiled(tiling, how, index, by)
    group: Any = None
    message = rf"whole \({whole[0]}, {whole[1]}\) matrix, each element once"
    with pytest.raises(ValueError, match=message + ", got"):
        ShardedLayout(group, 0, whole, rectangles)
    if rectangles:  # beside a replica that is right
        replicas = (1,) * len(rectangles) + (0,) * len(tiling.rectangles)
        with pytest.raises(ValueError, match=message + ", in each of the replicas"):
            ShardedLayout(group, 0, whole, rectangles + tiling.rectangles, replicas)


def refused(rectangles: list[tuple[int, int, int, int]]) -> None:
    group: Any = None
    with pytest.raises(ValueError, match="each element once"):
        ShardedLayout(group, 0, (4, 4), tuple(Rectangle(*r) for r in rectangles))


# An empty shard has no element, but its part of a vector would be cut out beyond the end.
@pytest.mark.parametrize("empty", [(0, 4, 9, 9), (0, 9, 2, 2), (9, 9, 0, 2), (-1, -1, 0, 4)], ids=str)
def test_an_empty_shard_is_within_the_matrix(empty: tuple[int, int, int, int]) -> None:
    refused([(0, 2, 0, 2), (0, 2, 2, 4), (2, 4, 0, 4), empty])


@pytest.mark.parametrize(
    ("shard", "turned"),
    [((0, 4, 0, 4), (3, 1, 2, 2)), ((0, 4, 0, 4), (2, 2, 3, 1)), ((0, 3, 0, 4), (3, 1, 4, 2))],
    ids=str,
)
def test_a_shard_ends_after_it_begins(shard: tuple[int, int, int, int], turned: tuple[int, int, int, int]) -> None:
    """The area of one with both ends before its beginning would fill a gap."""
    refused([shard, turned])
