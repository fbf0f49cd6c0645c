# SPDX-License-Identifier: Apache-2.0
"""The plan of a step: who orthogonalizes what, fairly, and how much travels at a time."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import batched, pairwise, product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emerging_optimizers.adaptive_muon.exchange import Mode, make_mode
from emerging_optimizers.adaptive_muon.exchange.plan import Ready, make_plan
from emerging_optimizers.adaptive_muon.orthogonalize import batches
from emerging_optimizers.adaptive_muon.sharding.layout import Layout, Rectangle, ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.matrices import Matrix, ShardShapes


LAYER_SHARDED, DUPLICATED, DISTRIBUTED = MODES = tuple(map(make_mode, ("layer_sharded", "duplicated", "distributed")))
NO_LIMIT = 2**40

Matrices = dict[torch.Tensor, list[Matrix]]


class Group:
    """Stands for a process group of this many ranks."""

    def __init__(self, size: int):
        self.ranks = size

    def size(self) -> int:
        return self.ranks


def strips(whole: tuple[int, int], dim: int, sizes: Sequence[int]) -> tuple[Rectangle, ...]:
    """A matrix split along a dimension in strips, in proportion to these sizes."""
    cuts = [whole[dim] * sum(sizes[:i]) // max(sum(sizes), 1) for i in range(len(sizes))] + [whole[dim]]
    return tuple(
        Rectangle(start, stop, 0, whole[1]) if dim == 0 else Rectangle(0, whole[0], start, stop)
        for start, stop in pairwise(cuts)
    )


def parameter(
    group: Group, shapes: Sequence[tuple[int, int]], dim: int, sizes: Sequence[int], stack: tuple[int, ...], rank: int
) -> tuple[torch.Tensor, list[Matrix]]:
    """A parameter as one rank holds it, a matrix or the blocks of one."""
    layouts = [ShardedLayout(group, rank, shape, strips(shape, dim, sizes)) for shape in shapes]
    pieces = tuple(
        (sum(layout.rectangles[each].shape[0] for layout in layouts), layouts[0].rectangles[each].shape[1])
        for each in range(group.size())
    )
    shapes_of_shards = ShardShapes(tuple(rows for rows, _ in shapes), pieces)
    # As with blocks that repeat, the rows at hand may be adjacent on one rank and not on another.
    rows: Any = slice(0) if rank % 2 else torch.tensor([0, 2])
    return torch.empty(*stack, *pieces[rank]), [
        Matrix(each, i, rows, shard_shapes=shapes_of_shards) for i, each in enumerate(layouts)
    ]


@st.composite
def specs(draw: st.DrawFn, ranks: int, params: int = 7, blocks: int = 3) -> list[Any]:
    """What makes parameters, the same for all ranks."""
    size = st.integers(1, 12)
    return draw(
        st.lists(
            st.builds(
                lambda columns, rows, *rest: ([(each, columns) for each in rows], *rest),
                size,
                st.lists(size, min_size=1, max_size=blocks),
                st.integers(0, 1),
                st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks),
                st.sampled_from([(), (), (3,)]),
            ),
            min_size=1,
            max_size=params,
        )
    )


def made(group: Group, of: list[Any], rank: int = 0) -> Matrices:
    return dict(parameter(group, *each, rank) for each in of)


class Laid(NamedTuple):
    """A plan whose stacks are laid out."""

    rounds: list[list[torch.Tensor]]
    owners: dict[Matrix, int]


def plan_of(matrices: Matrices, mode: Mode | None, most: int) -> "Laid":
    """The rounds, their stacks laid out, and the homes."""
    rounds, params = make_plan(ready(matrices), mode, most), [*matrices]
    owners = {
        matrix: owner
        for one in rounds
        for batch in one.batches
        for equal in batch.matrices
        for matrix, owner in zip(equal.matrices, equal.owners, strict=True)
        if one.process_group is not None
    }
    return Laid([[params[i] for batch in each.batches for i in batch.members] for each in rounds], owners)


def ready(matrices: Matrices) -> list[Ready]:
    return [Ready(tuple(of), 0, p.dtype, p.device, p.shape) for p, of in matrices.items()]


def told(plan: Laid, matrices: Matrices) -> tuple[list[list[int]], list[int | None]]:
    """A plan in words that fit on every rank: numbers of parameters, and a home or None for every matrix."""
    numbers = {p: i for i, p in enumerate(matrices)}
    return [[numbers[p] for p in each] for each in plan.rounds], [
        plan.owners.get(matrix) for of in matrices.values() for matrix in of
    ]


def bytes_of(p: torch.Tensor, matrices: list[Matrix], plan: Laid, mode: Mode, rank: int) -> int:
    """What a rank sends, its shard, and receives, the whole matrix where it owns it.

    In "distributed", a rank copies its shard, and sends and receives Gram matrices.
    """
    total = 0
    for matrix in matrices:
        rows, columns = matrix.layout.rectangles[rank].shape
        total += rows * columns
        if mode is DISTRIBUTED:
            total += 2 * matrix.layout.whole[1 if matrix.layout.split[-2] else 0] ** 2
        elif mode is DUPLICATED or plan.owners[matrix] == rank:
            total += math.prod(matrix.layout.whole)
    return 4 * math.prod(p.shape[:-2]) * total


def bytes_alone(p: torch.Tensor, matrices: list[Matrix], mode: Mode) -> int:
    """What a rank sends and receives, or less, of a parameter that is in a round alone, or of one for every owner."""
    loads = []
    for matrix in matrices:
        largest, ranks = max(each.area for each in matrix.layout.rectangles), matrix.layout.group.size()
        if mode is DISTRIBUTED:
            load = largest + 2 * matrix.layout.whole[1 if matrix.layout.split[-2] else 0] ** 2
        else:
            load = largest * (2 * ranks if mode is LAYER_SHARDED else 1 + ranks)
        loads.append(4 * math.prod(p.shape[:-2]) * load)
    each_has_an_owner = mode is LAYER_SHARDED and len(matrices) <= matrices[0].layout.group.size()
    return max(loads) if each_has_an_owner else sum(loads)


ranks_and_specs = st.integers(1, 4).flatmap(lambda ranks: st.tuples(st.just(ranks), specs(ranks)))
modes = st.sampled_from(MODES)


TALL = (2, [([(400, 4)], 0, [1, 1], ())] * 6)  # the shards are larger than the Gram matrices


@settings(deadline=None, max_examples=100, derandomize=True)
@example(TALL, DISTRIBUTED, 5000)
@given(ranks_and_specs, modes, st.sampled_from([1, 100, 1000, 5000, NO_LIMIT]))
def test_rounds(drawn: tuple[int, list[Any]], mode: Mode, most: int) -> None:
    """Every parameter once, and no more than allowed; a round with more has one parameter for every owner at most."""
    ranks, of = drawn
    matrices = made(Group(ranks), of)
    plan = plan_of(matrices, mode, most)
    assert sorted(id(p) for each in plan.rounds for p in each) == sorted(map(id, matrices)) and all(plan.rounds)
    for params in plan.rounds:
        worst = max(sum(bytes_of(p, matrices[p], plan, mode, rank) for p in params) for rank in range(ranks))
        assert worst <= max(most, *(bytes_alone(p, matrices[p], mode) for p in params))
    assert most != NO_LIMIT or len(plan.rounds) == 1


@settings(deadline=None, max_examples=60, derandomize=True)
@example(LAYER_SHARDED, 16, 4, 0)
@given(modes, st.integers(1, 40), st.integers(1, 6), st.integers(0, 3))
def test_owners_work_side_by_side_in_every_round(mode: Mode, number: int, ranks: int, fit: int) -> None:
    """On equal matrices, of which this many are within the cap for each owner; where none is, an owner has one."""
    [(shape, dim, sizes, stack)] = [([(12, 5)], 0, [1] * ranks, ())]
    matrices = made(Group(ranks), [(shape, dim, sizes, stack)] * number)
    [(p, one), *_] = matrices.items()
    plan = plan_of(matrices, mode, max(fit * bytes_alone(p, one, mode), 1))
    together = max(fit, 1) * (ranks if mode is LAYER_SHARDED else 1)
    assert [len(each) for each in plan.rounds] == [len(each) for each in batched(range(number), together)]
    for params in plan.rounds if mode is LAYER_SHARDED else ():
        shares = Counter(plan.owners[matrix] for p in params for matrix in matrices[p])
        assert max(shares.values()) == math.ceil(len(params) / ranks)


def test_blocks_of_one_owner_are_adjacent() -> None:
    """In their batch, so that a slice of it is sent."""
    matrices = made(Group(3), [([(4, 6)] * 8, 1, [1, 1, 1], ())] * 2)
    [one] = make_plan(ready(matrices), LAYER_SHARDED, NO_LIMIT)
    [batch] = one.batches[0].matrices
    assert len(batch.owners) == 16 and {*batch.owners} == {0, 1, 2} and [*batch.owners] == sorted(batch.owners)
    assert {(place, matrix.block) for place, matrix in zip(batch.places, batch.matrices, strict=True)} == {
        *product(range(2), range(8))
    }


def test_smaller_matrices_fill_the_round_of_a_larger() -> None:
    """Up to the larger one's bytes."""
    large, small, thin = ([([shape], 0, [1, 1], ())] for shape in ((64, 64), (32, 32), (2, 1500)))
    matrices = made(Group(2), [*thin, *small * 3, *large, *small * 2])
    rounds, owners = told(plan_of(matrices, LAYER_SHARDED, 1), matrices)
    assert [sorted(each) for each in rounds] == [[1, 2, 3, 4, 5], [0, 6]]
    assert [owners[index] for index in (4, 1, 2, 3, 5)] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(("sides", "rounds"), [((32, 20), [[0, 1, 2, 3]]), ((32, 32), [[0, 1, 2], [3]])])
def test_an_owner_without_room_is_passed_over(sides: Sequence[int], rounds: list[list[int]]) -> None:
    """If the next, which has more work, does not become the busiest by it."""
    shapes = [(side, side) for side in sides] + [(2, 1500), (2, 800)]
    matrices = made(Group(3), [([shape], 1, [1, 1, 1], ()) for shape in shapes])
    planned, owners = told(plan_of(matrices, LAYER_SHARDED, 1), matrices)
    assert [sorted(each) for each in planned] == rounds and owners[:3] == [0, 1, 2] and owners[3] == (2 - len(rounds))


@pytest.mark.parametrize(("thin", "most", "busiest"), [(False, NO_LIMIT, 9), (True, NO_LIMIT, 9), (True, 40_000, 11)])
def test_owners_fit_together_better_than_by_the_least_work(thin: bool, most: int, busiest: int) -> None:
    """That would be 5 + 3 + 3, 5 + 3 and 4 + 4, which stays where three thin matrices of 3 are too much for one owner."""
    ranks, square = 3, [(12, 12)]
    of: list[Any] = [(square, 0, [1] * ranks, (cost,)) for cost in (5, 5, 4, 4)]
    of += [([(3, 576)], 0, [1] * ranks, ()) if thin else (square, 0, [1] * ranks, (3,))] * 3
    matrices = made(Group(ranks), of)
    rounds, owners = told(plan_of(matrices, LAYER_SHARDED, most), matrices)
    shares = Counter[int | None]()
    for cost, owner in zip((5, 5, 4, 4, 3, 3, 3), owners, strict=True):
        shares[owner] += cost
    assert len(rounds) == 1 and max(shares.values()) == busiest


def replicated(group: Group, shapes: Sequence[tuple[int, int]], shards: int, rank: int = 0) -> list[Ready]:
    """Matrices in replicas of some strips of rows each, one replica after the other; whole where that is one strip."""
    made = []
    for shape in shapes:
        of_replica = strips(shape, 0, [1] * shards)
        rectangles = of_replica * (group.size() // shards)
        layout = ShardedLayout(group, rank, shape, rectangles, tuple(each // shards for each in range(group.size())))
        shapes_of_shards = ShardShapes(None, tuple(each.shape for each in rectangles))
        made.append(Ready((Matrix(layout, shard_shapes=shapes_of_shards),), 0, *ANY, torch.Size(layout.own.shape)))
    return made


ANY = torch.float32, torch.device("cpu")
LARGE, SMALL = (400, 400), (8, 8)


@pytest.mark.parametrize(("shards", "owners"), [(2, [0, 2, 4, 1]), (1, [0, 1, 2, 3]), (3, [0, 3, 1, 4])])
def test_owners_are_of_all_replicas_in_turn(shards: int, owners: list[int]) -> None:
    """So that no replica has to send on more than the others."""
    [one] = make_plan(replicated(Group(6), [(48, 24)] * 4, shards), LAYER_SHARDED, NO_LIMIT)
    found = {
        batch.members[place]: owner
        for batch in one.batches
        for equal in batch.matrices
        for place, owner in zip(equal.places, equal.owners, strict=True)
    }
    assert [found[member] for member in range(4)] == owners


@pytest.mark.parametrize(
    ("shapes", "most", "kinds"),
    [
        ([SMALL, SMALL], NO_LIMIT, ["LayerSharded"]),
        ([SMALL, LARGE], 2 * 4 * 160_000, ["LayerSharded"]),  # two copies in float32
        ([SMALL, LARGE], 2 * 4 * 160_000 - 1, ["Relayed"]),  # the small one too: a round holds both
    ],
)
def test_results_are_relayed_where_copies_are_beyond_the_cap(
    shapes: list[tuple[int, int]], most: int, kinds: list[str]
) -> None:
    for rank in range(4):
        rounds = make_plan(replicated(Group(4), shapes, 2, rank), LAYER_SHARDED, most)
        assert [type(each.mode).__name__ for each in rounds] == kinds


def test_replicas_that_are_cut_differently_are_not_relayed() -> None:
    """Nobody there has just the shard of a rank here."""
    halves, whole = strips(LARGE, 0, [1, 1]), strips(LARGE, 0, [1])
    layout = ShardedLayout(Group(3), 0, LARGE, halves + whole, (0, 0, 1))
    shapes = ShardShapes(None, tuple(each.shape for each in layout.rectangles))
    matrix = Ready((Matrix(layout, shard_shapes=shapes),), 0, *ANY, torch.Size(layout.own.shape))
    [one] = make_plan([matrix], LAYER_SHARDED, 1)
    assert one.mode is LAYER_SHARDED


@pytest.mark.parametrize("mode", MODES)
def test_replicas_of_whole_matrices_have_a_round_of_their_own(mode: Mode) -> None:
    group = Group(2)
    sharded = ready(made(group, [([(6, 4)], 0, [1, 1], ())]))
    rounds = make_plan([*sharded, *replicated(group, [(6, 4)], 1)], mode, NO_LIMIT)
    assert [type(each.mode).__name__ for each in rounds] == [type(mode).__name__, "Replicas"]
    assert all(each.process_group is group for each in rounds)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(ranks_and_specs, modes, st.sampled_from([1000, NO_LIMIT]))
def test_the_same_on_all_ranks_and_every_time(drawn: tuple[int, list[Any]], mode: Mode, most: int) -> None:
    ranks, of = drawn
    plans = []
    for rank in [*range(ranks), 0]:
        matrices = made(Group(ranks), of, rank)
        plans.append(told(plan_of(matrices, mode, most), matrices))
    assert all(plan == plans[0] for plan in plans)
    assert all(home in range(ranks) for home in plans[0][1])


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    ranks_and_specs,
    modes,
    st.integers(0, 12),
    st.sampled_from([40, 400, 4000]),
    st.integers(1, 3),
    st.sampled_from([1000, NO_LIMIT]),
)
def test_the_same_stacks_on_all_ranks(
    drawn: tuple[int, list[Any]], mode: Mode, longest: int, most: int, layers: int, in_flight: int
) -> None:
    """Whatever the sizes of the pieces at hand, and wherever the threshold is below which matrices are stacked."""
    ranks, of = drawn
    plans = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "LIMITS", {"cpu": (longest, most)})
        for rank in range(ranks):
            matrices = made(Group(ranks), of * layers, rank)
            plan = make_plan(ready(matrices), mode, in_flight)
            plans.append([[batch.members for batch in each.batches] for each in plan])
    assert all(plan == plans[0] for plan in plans)


# The costs are 1, 1 and 2: in this order they would go to two ranks as 1 + 2 and 1.
UNFORTUNATE = (2, [([(1, 1)], 0, [1, 1], stack) for stack in ((), (), (2,))])
THIN = (2, [([shape], 0, [1, 1], ()) for shape in ((1, 300), (12, 12), (12, 12))])  # large, and little work


@settings(deadline=None, max_examples=60, derandomize=True)
@example(UNFORTUNATE)
@example(THIN)
@given(st.integers(1, 3).flatmap(lambda ranks: st.tuples(st.just(ranks), specs(ranks, 3, 2))))
def test_work_is_shared_fairly(drawn: tuple[int, list[Any]]) -> None:
    """The greatest share is within 4/3 of the least that there could be; where parameters have blocks, within 2."""
    ranks, of = drawn
    matrices = made(Group(ranks), of)
    plan = plan_of(matrices, LAYER_SHARDED, NO_LIMIT)
    costs = {
        matrix: math.prod(p.shape[:-2]) * math.prod(matrix.layout.whole) * min(matrix.layout.whole)
        for p, each in matrices.items()
        for matrix in each
    }
    assert plan.owners.keys() == costs.keys()

    def greatest(homes: Sequence[int]) -> int:
        shares = [0] * ranks
        for home, cost in zip(homes, costs.values(), strict=True):
            shares[home] += cost
        return max(shares)

    least = min(map(greatest, product(range(ranks), repeat=len(costs))))
    bound = 4 / 3 if all(len(each) == 1 for each in matrices.values()) else 2
    assert greatest([plan.owners[matrix] for matrix in costs]) <= bound * least


def test_a_hundred_matrices_on_eight_ranks() -> None:
    """Layers as they are: no rank has more than a few percent above its share."""
    group, layers = (
        Group(8),
        [([(64, 64), (16, 64), (16, 64)], 0), ([(64, 64)], 1), ([(256, 64)], 0), ([(64, 256)], 1)],
    )
    matrices = made(group, [(shapes, dim, [1] * 8, ()) for shapes, dim in layers] * 16)
    plan = plan_of(matrices, LAYER_SHARDED, NO_LIMIT)
    shares = [0] * 8
    for each in matrices.values():
        for matrix in each:
            shares[plan.owners[matrix]] += math.prod(matrix.layout.whole) * min(matrix.layout.whole)
    assert max(shares) <= 1.02 * sum(shares) / 8


@pytest.mark.parametrize("mode", [*MODES, None])
@pytest.mark.parametrize("most", [1, NO_LIMIT])
def test_whole_parameters_go_one_by_one(mode: Any, most: int) -> None:
    whole = {torch.empty(4, 6): [Matrix(Layout())], torch.empty(8, 6): [Matrix(Layout(), i, slice(0)) for i in (0, 1)]}
    plan = plan_of(whole, mode, most)
    assert [[id(p) for p in each] for each in plan.rounds] == [[id(p)] for p in whole] and plan.owners == {}
    assert plan_of({}, mode, most) == ([], {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("most", [1, 400, NO_LIMIT])
def test_groups_are_kept_apart(mode: Mode, most: int) -> None:
    """Whatever lies between them: no round has parameters of two groups, and each group shares its own work."""
    groups = [Group(2), Group(3), None]
    matrices: Matrices = {}
    owner: dict[torch.Tensor, Group | None] = {}
    for index in range(12):
        group = groups[index % 3]
        if group is None:
            p, of = torch.empty(6, 6), [Matrix(Layout())]
        else:
            p, of = parameter(group, [(6, 6)], index % 2, [1] * group.ranks, (), 1)
        matrices[p], owner[p] = of, group
    plan = plan_of(matrices, mode, most)
    assert all(len({owner[p] for p in each}) == 1 for each in plan.rounds)
    assert [len(each) for each in plan.rounds if owner[each[0]] is None] == [4]  # one stack
    if most == NO_LIMIT:
        assert len(plan.rounds) == 1 + 2
    for group in groups[:2]:
        homes = [plan.owners[matrices[p][0]] for p in matrices if owner[p] is group]
        shared = mode is LAYER_SHARDED
        assert sorted(homes) == ({2: [0, 0, 1, 1], 3: [0, 0, 1, 2]}[group.ranks] if shared else [0] * 4)
        alone = plan_of({p: of for p, of in matrices.items() if owner[p] is group}, mode, most)
        assert [[id(p) for p in each] for each in alone.rounds] == [
            [id(p) for p in each] for each in plan.rounds if owner[each[0]] is group
        ]
