# SPDX-License-Identifier: Apache-2.0
"""Whatever the shards, every rank gets its part of the whole matrices' result: all ranks here in one process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_ranks import Ranks
from tilings import PINWHEEL, Tiling, alike, replicated, strips, tilings

from emerging_optimizers.adaptive_muon.exchange import Exchange, Mode, Orthogonalize, Shards, make_mode
from emerging_optimizers.adaptive_muon.exchange.layer_sharded import Relayed
from emerging_optimizers.adaptive_muon.exchange.messages import Part, all_gather, all_to_all
from emerging_optimizers.adaptive_muon.moment2 import sum_of_squares
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz
from emerging_optimizers.adaptive_muon.sharding.layout import Rectangle, ShardedLayout


KEPT_DIMS = [(), (-2,), (-1,), (-2, -1)]
DTYPES = [torch.float32, torch.float64]
RELAYED = Relayed()
CALLS = [("layer_sharded", {"all_to_all": 2}), ("duplicated", {"all_gather": 1})]
NEWTON_SCHULZ = NewtonSchulz("quintic", 5, False, "standard", "highest")

Result = tuple[torch.Tensor, list[torch.Tensor]]


@dataclass(frozen=True)
class Spec:
    """A batch of matrices, as a test draws it.

    Args:
        tiling: The shards of each matrix.
        owners: An owner for each member, modulo the number of ranks, and sorted.
        stack: The sizes of the stack that each member is, if it is one.
        dtype: The dtype of M' and of the sums.
        kept_dims: The dimensions that the sums of squares keep.
        sums: How many tensors' squares are observed before O.
        observes_result: Whether those of O are.
        scaled: Whether M' is scaled before it is orthogonalized.
        seed: The seed of the values.
    """

    tiling: Tiling
    owners: Sequence[int] = (0,)
    stack: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    kept_dims: tuple[int, ...] = ()
    sums: int = 1
    observes_result: bool = True
    scaled: bool = False
    seed: int = 0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """M' of the whole matrices, and then whose squares are observed."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.owners), *self.stack, *self.tiling.whole)
        return [torch.randn(shape, generator=generator, dtype=self.dtype) for _ in range(1 + self.sums)]

    def with_ranks(self, number: int) -> "Spec":
        """The same batch with more ranks, whose shards are empty."""
        whole, rectangles, replicas = self.tiling
        more = number - len(rectangles)
        tiling = Tiling(whole, rectangles + (Rectangle(0, 0, 0, 0),) * more, replicas and replicas + (0,) * more)
        return replace(self, tiling=tiling, owners=sorted(owner % number for owner in self.owners))

    def shards(self, rank: int, group: Any, function: Any) -> Shards:
        """What a rank has of the batch."""
        layout = ShardedLayout(group, rank, *self.tiling)
        momentum, *observed = map(layout.cut, self.tensors)
        squares = [sum_of_squares(shard, self.kept_dims) for shard in observed]
        scale = scale_of if self.scaled else None
        orthogonalize = Orthogonalize(function, self.kept_dims, self.observes_result, scale)
        return Shards(momentum, squares, layout, self.owners, orthogonalize)


def results_of(exchange: Exchange) -> list[Result]:
    """What a rank has when it has gone through all phases of a round."""
    exchange.assemble()
    exchange.orthogonalize()
    exchange.send_results()
    exchange.relay()
    return exchange.results()


def scale_of(squares: Sequence[torch.Tensor], members: Sequence[int]) -> torch.Tensor:
    """A scale that depends on the sums, their order and the member."""
    D = torch.tensor([1.0 + member for member in members]).view(-1, *[1] * (squares[0].ndim - 1))
    return sum((total.sqrt() / number for number, total in enumerate(squares, start=2)), D)


def elementwise(member: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A user's function of a matrix in the place of the iteration, another one for every member."""
    return lambda matrix: matrix * (2 + member) + member


def squares_of(whole: torch.Tensor, kept_dims: Sequence[int]) -> torch.Tensor:
    """The sums of squares of whole matrices, summed dimension by dimension."""
    squares = whole * whole
    for dim in {-2, -1} - {*kept_dims}:
        squares = squares.sum(dim, keepdim=True)
    return squares


@st.composite
def specs(draw: st.DrawFn, shards: st.SearchStrategy[Tiling]) -> Spec:
    sums, kept_dims = draw(st.integers(0, 2)), draw(st.sampled_from(KEPT_DIMS))
    return Spec(
        draw(shards),
        draw(st.lists(st.integers(0, 20), min_size=1, max_size=4)),
        draw(st.sampled_from([(), (), (3,)])),
        draw(st.sampled_from(DTYPES)),
        kept_dims,
        sums,
        draw(st.booleans()),
        sums > 0 and draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )


def exchanged(
    mode: str | Mode, batches: Sequence[Spec], function: Any = None
) -> tuple[Ranks, list[Spec], list[list[Result]]]:
    """The ranks, the batches with a shard for each, and for each rank its result of every batch."""
    number = max(len(spec.tiling.rectangles) for spec in batches)
    ranks, batches = Ranks(number), [spec.with_ranks(number) for spec in batches]
    exchange: Any = make_mode(mode) if isinstance(mode, str) else mode

    def of_rank(rank: int) -> list[Result]:
        functions = [function or [*map(elementwise, range(len(spec.owners)))] for spec in batches]
        shards = [spec.shards(rank, ranks, each) for spec, each in zip(batches, functions, strict=True)]
        return results_of(exchange.exchange(ranks, shards))

    return ranks, batches, ranks.run(of_rank)


def checked(batches: Sequence[Spec], results: Sequence[Sequence[Result]]) -> list[Result]:
    """Checks all sums of squares, and returns O of the whole matrices of each batch with the sums."""
    wholes = []
    for spec, of_ranks in zip(batches, zip(*results, strict=True), strict=True):
        momentum, *observed = spec.tensors
        O, (first, *others) = torch.full_like(momentum, torch.nan), [squares for _, squares in of_ranks]
        for rectangle, (shard, _) in zip(spec.tiling.rectangles, of_ranks, strict=True):
            assert shard.shape == rectangle.cut(O).shape
            rectangle.cut(O).copy_(shard)
        for rectangle, (shard, _) in zip(spec.tiling.rectangles, of_ranks, strict=True):
            assert torch.equal(shard, rectangle.cut(O)), "bits differ between replicas"
        for squares in others:
            assert len(squares) == len(first) and all(map(torch.equal, squares, first)), "bits differ between ranks"
        expected = [squares_of(whole, spec.kept_dims) for whole in [*observed, *[O] * spec.observes_result]]
        rtol = 1e-12 if spec.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(first, expected, rtol=rtol, atol=0)
        wholes.append((O, first))
    return wholes


# ------------------------------------------------------------------------------------- whole matrices at their owners

# Five ranks, of which none or some own a member; in the second also ranks without a shard.
ORDERS = [Spec(PINWHEEL, [3, 0, 3, 1], (2,), dtype, dims, 2) for dtype in DTYPES for dims in KEPT_DIMS]
EMPTY = Spec(Tiling((4, 2), (Rectangle(0, 4, 2, 2), Rectangle(0, 4, 0, 2), Rectangle(4, 4, 0, 2))), [2, 2, 0])
SCALED = [replace(spec, scaled=True, observes_result=False) for spec in ORDERS]


@pytest.mark.parametrize(("mode", "calls"), CALLS)
@settings(max_examples=80)
@example(ORDERS)
@example([EMPTY, *SCALED])
@given(st.lists(specs(tilings()), min_size=1, max_size=3))
def test_every_rank_gets_its_part_of_the_whole(mode: str, calls: dict[str, int], batches: list[Spec]) -> None:
    check_parts(mode, calls, batches)


@settings(max_examples=80)
@given(st.lists(specs(replicated()), min_size=1, max_size=3))
def test_every_replica_gets_its_part_of_one_result(batches: list[Spec]) -> None:
    """Sums over the shards of all replicas would be too large."""
    check_parts(*CALLS[0], batches)


@settings(max_examples=80)
@given(alike().flatmap(lambda tiling: st.lists(specs(st.just(tiling)), min_size=1, max_size=3)))
def test_replicas_hand_on_what_an_owner_has_sent_to_one(batches: list[Spec]) -> None:
    check_parts(RELAYED, {"all_to_all": 3}, batches)


def check_parts(mode: str | Mode, calls: dict[str, int], batches: Sequence[Spec]) -> None:
    ranks, batches, results = exchanged(mode, batches)
    for spec, (O, squares) in zip(batches, checked(batches, results), strict=True):
        M = spec.tensors[0].float()
        if spec.scaled:
            M = (M * scale_of(squares[: spec.sums], range(len(spec.owners)))).float()
        expected = [elementwise(member)(matrix) for member, matrix in enumerate(M)]
        assert torch.equal(O, torch.stack(expected).to(spec.dtype))
    assert all(called == calls for called in ranks.called)


@pytest.mark.parametrize("ends", [(0, 0, 4, 5), (0, 1, 5, 5), (0, 0, 4, 4)], ids=["first", "last", "all but one"])
@pytest.mark.parametrize(("mode", "calls"), CALLS)
def test_a_rank_that_has_nothing_takes_part(mode: str, calls: dict[str, int], ends: Sequence[int]) -> None:
    """No element of a matrix, and none to orthogonalize."""
    rectangles = tuple(Rectangle(*span, 0, 3) for span in pairwise(ends))
    spec = Spec(Tiling((ends[-1], 3), rectangles), [1, 1], kept_dims=(-2,))
    ranks, batches, results = exchanged(mode, [spec])
    checked(batches, results)
    assert all(called == calls for called in ranks.called)


def test_sums_are_added_in_the_order_of_the_ranks() -> None:
    """So that they are the same bits whoever adds them, in both modes."""
    batches = [replace(spec, dtype=torch.float32, tiling=PINWHEEL, owners=[1, 4]) for spec in ORDERS[:1]]
    sums = []
    for mode in ("layer_sharded", "duplicated"):
        _, specs_of_ranks, results = exchanged(mode, batches)
        sums.append(checked(specs_of_ranks, results)[0][1])
    assert all(map(torch.equal, *sums))
    [spec] = batches
    terms = [sum_of_squares(rectangle.cut(spec.tensors[1]), ()) for rectangle in PINWHEEL.rectangles]
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    assert torch.equal(sums[0][0], total)


# ------------------------------------------------------------------------------------------- shards that stay in place


@settings(max_examples=40)
@given(st.integers(1, 5).flatmap(lambda ranks: st.lists(specs(strips(ranks)), min_size=1, max_size=3)))
def test_the_distributed_mode_gives_the_wholes_result(batches: list[Spec]) -> None:
    ranks, batches, results = exchanged("distributed", batches, NEWTON_SCHULZ)
    for spec, (O, squares) in zip(batches, checked(batches, results), strict=True):
        M = spec.tensors[0]
        if spec.scaled:
            M = M * scale_of(squares[: spec.sums], range(len(spec.owners)))
        expected = NEWTON_SCHULZ(M.float()).to(spec.dtype)
        torch.testing.assert_close(O, expected, rtol=0, atol=5e-4)  # rounding, magnified up to 500 times
    number = 5 + 1 + any(spec.observes_result for spec in batches)
    assert all(called == {"all_reduce": number} for called in ranks.called)


# -------------------------------------------------------------------------------------------------------- the messages

PARTS = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)


def filled(shape: tuple[int, ...], dtype: torch.dtype, number: int) -> torch.Tensor:
    """A tensor to send, in another dtype, and not contiguous if it can be."""
    size = torch.Size(shape).numel()
    values = (torch.arange(size) * 7 + number) % 256  # exact in 8 bits
    return values.to(torch.float32).view(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))


def check_arrived(arrived: torch.Tensor, sent: torch.Tensor, dtype: torch.dtype) -> None:
    assert arrived.dtype == dtype and torch.equal(arrived, sent.to(dtype))
    assert arrived.data_ptr() % 16 == 0 or not arrived.numel(), "a part that is not aligned"


@settings(max_examples=50)
@example([[[((3,), torch.bfloat16), ((0,), torch.float64), ((1,), torch.float64)]]])
@example([[[], [((1,), torch.float16), ((2, 3), torch.float64)]], [[((5, 0), torch.float32)], []]])
@given(
    st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(st.lists(PARTS, max_size=3), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_all_to_all_brings_every_part_where_it_belongs(parts: list[Any]) -> None:
    """``parts[i][j]``: what rank i sends to rank j; also nothing, and tensors without elements."""
    ranks = Ranks(len(parts))

    def sent(source: int, target: int) -> list[tuple[torch.Tensor, torch.dtype]]:
        shapes = enumerate(parts[source][target])
        return [(filled(shape, dtype, 50 * source + 10 * target + i), dtype) for i, (shape, dtype) in shapes]

    def of_rank(rank: int) -> list[list[torch.Tensor]]:
        everyone = range(len(parts))
        outgoing = [sent(rank, target) for target in everyone]
        incoming = [[Part(*part) for part in parts[source][rank]] for source in everyone]
        group: Any = ranks
        return all_to_all(outgoing, incoming, group, torch.device("cpu")).wait()

    for rank, from_ranks in enumerate(ranks.run(of_rank)):
        for source, arrived in enumerate(from_ranks):
            for tensor, expected in zip(arrived, sent(source, rank), strict=True):
                check_arrived(tensor, *expected)


@settings(max_examples=40)
@example([[((3,), torch.bfloat16), ((1,), torch.float64)], []])
@given(st.lists(st.lists(PARTS, max_size=3), min_size=1, max_size=4))
def test_all_gather_brings_every_part_to_all(parts: list[Any]) -> None:
    """Of messages that differ in length."""
    ranks = Ranks(len(parts))

    def sent(source: int) -> list[tuple[torch.Tensor, torch.dtype]]:
        return [(filled(shape, dtype, 10 * source + i), dtype) for i, (shape, dtype) in enumerate(parts[source])]

    def of_rank(rank: int) -> list[list[torch.Tensor]]:
        incoming = [[Part(*part) for part in of_source] for of_source in parts]
        group: Any = ranks
        return all_gather(sent(rank), incoming, group, torch.device("cpu")).wait()

    for from_ranks in ranks.run(of_rank):
        for source, arrived in enumerate(from_ranks):
            for tensor, expected in zip(arrived, sent(source), strict=True):
                check_arrived(tensor, *expected)
