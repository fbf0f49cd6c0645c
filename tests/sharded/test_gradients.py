# SPDX-License-Identifier: Apache-2.0
"""Gradients that come and go in later steps: an error on all ranks where it is on some, and no rank waits for others.

On a CPU ranks read each other's flags when they arrive. On a GPU they do so at the beginning of the next step, which
these tests make a CPU do.
"""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from pieces import OPTIONS, Pair, collectives, difference, far_apart, gathered, options_of, set_gradients, strips
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon import AdaptiveMuon, Split
from emerging_optimizers.adaptive_muon.sharding import comparison


WAYS = ("layer_sharded", "duplicated", "distributed", "replicas")
ROUNDS = {"one round": 2**30, "rounds": 1}

each_way = pytest.mark.parametrize("way", WAYS)
each_reading = pytest.mark.parametrize("at_once", [True, False], ids=["read at once", "read later"], indirect=True)
in_rounds = pytest.mark.parametrize("most", ROUNDS.values(), ids=ROUNDS)
several = pytest.mark.skipif("os.environ['WORLD_SIZE'] == '1'", reason="one process cannot disagree")


@pytest.fixture(scope="module")
def quick() -> Iterator[ProcessGroup]:
    """A group of all processes, in which a rank that waits for others in vain gets an error soon."""
    group = dist.new_group(timeout=timedelta(minutes=3))
    assert isinstance(group, ProcessGroup)
    yield group


@pytest.fixture
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether flags are read when they arrive."""
    monkeypatch.setattr(comparison, "flags_are_read_at_once", lambda device: request.param)
    return bool(request.param)


def matrices(way: str) -> list[Pair]:
    """Of different shapes and costs, split by rows and by columns, or for replicas not at all."""
    pairs = strips([(24, 64), (32, 32), (30, 17)])
    dims = (-1,) if way == "replicas" else (0, 1)
    return [pair for pair in pairs if pair.piece.partition_dim in dims]  # type: ignore[attr-defined]


def named(pairs: Sequence[Pair]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", pair.piece) for i, pair in enumerate(pairs)]


def made(way: str, pairs: Sequence[Pair], group: ProcessGroup, **options: Any) -> AdaptiveMuon:
    place: dict[str, Any] = {"replica_group": group} if way == "replicas" else {"tp_group": group, "tp_mode": way}
    return AdaptiveMuon(named(pairs), **place, **{**options_of("namo_d"), "bias_correction": True, **options})


def give(pairs: Sequence[Pair], step: int, without: Sequence[int] = ()) -> None:
    """Gradients of all matrices but some."""
    set_gradients([*pairs], step)
    for index in without:
        pairs[index].whole.grad = pairs[index].piece.grad = None


def snapshot(optimizer: AdaptiveMuon, but: str = "") -> list[torch.Tensor]:
    """Copies of the weights and of the states, but for those with a name."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in params for key, value in optimizer.state[p].items() if key != but]
    return [tensor.detach().clone() for tensor in (*params, *states)]


def same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(map(torch.equal, before, after))


def refused(step: Callable[[], Any], match: str) -> None:
    """A step raises the same error on all ranks."""
    with pytest.raises(ValueError, match=match) as error:
        step()
    texts = gathered(str(error.value))
    assert len({*texts}) == 1, texts


# ------------------------------------------------------------------------------------------------------ on some ranks


@several
@in_rounds
@each_reading
@pytest.mark.parametrize("appears", [False, True], ids=["missing", "appearing"])
@each_way
def test_on_one_rank(way: str, appears: bool, at_once: bool, most: int, quick: ProcessGroup) -> None:
    """In the third step a gradient is missing on one rank, or is there on one rank only."""
    last, pairs = dist.get_rank() == dist.get_world_size() - 1, matrices(way)
    optimizer = made(way, pairs, quick, max_bytes_in_flight=most)
    usual = [1] if appears else []
    for step in range(2):
        give(pairs, step, without=usual)
        optimizer.step()
    others, one = ("no", "a") if appears else ("a", "no")
    match = rf"'p1' has {others} gradient on rank 0.*'p1' has {one} gradient on rank {dist.get_world_size() - 1}"
    for step in (2, 3):  # what is refused is so again
        before, with_momentum = snapshot(optimizer, but="momentum_buffer"), snapshot(optimizer)
        give(pairs, step, without=[1] if last != appears else [])
        if at_once:
            refused(optimizer.step, match)
            assert same(before, snapshot(optimizer, but="momentum_buffer"))
            assert not last or same(with_momentum, snapshot(optimizer))
        else:
            optimizer.step()
            assert not last or same(with_momentum, snapshot(optimizer))
            give(pairs, step, without=usual)
            refused(optimizer.step, rf"{match}.*Load a checkpoint from before the last step, which was wrong")
    for step in (4, 5):
        give(pairs, step, without=usual)
        optimizer.step()


@several
@each_reading
@each_way
def test_all_gradients_gone_on_one_rank(way: str, at_once: bool, quick: ProcessGroup) -> None:
    """It has no message of its own to send."""
    pairs = matrices(way)
    optimizer = made(way, pairs, quick, max_bytes_in_flight=1)
    give(pairs, 0)
    optimizer.step()
    give(pairs, 1, without=range(len(pairs)) if dist.get_rank() == 0 else ())
    if not at_once:
        optimizer.step()
        give(pairs, 2)
    refused(optimizer.step, r"'p0' has no gradient on rank 0.*'p0' has a gradient on rank 1")


@several
@each_reading
@each_way
def test_another_one_on_each_rank(way: str, at_once: bool, quick: ProcessGroup) -> None:
    """No rank is in its usual step, which all of them see at once."""
    pairs = matrices(way)
    optimizer = made(way, pairs, quick, max_bytes_in_flight=1)
    give(pairs, 0)
    optimizer.step()
    before = snapshot(optimizer)
    give(pairs, 1, without=[min(dist.get_rank(), 1)])
    refused(optimizer.step, r"'p0' has no gradient on rank 0.*'p0' has a gradient on rank 1")
    assert same(before, snapshot(optimizer))


@several
@each_reading
@each_way
def test_a_first_gradient_at_a_rate_of_zero_on_one_rank(way: str, at_once: bool, quick: ProcessGroup) -> None:
    """Whether it is to get state only is asked of the others later, when they agree that there is a gradient."""
    pairs = matrices(way)
    optimizer = made(way, pairs, quick, lr=0.0)
    give(pairs, 0, without=[1])
    optimizer.step()
    give(pairs, 1, without=[1] if dist.get_rank() else [])
    if not at_once:
        optimizer.step()
        give(pairs, 2, without=[1])
    refused(optimizer.step, r"'p1' has a gradient on rank 0.*'p1' has no gradient on rank 1")
    assert not optimizer.state[pairs[1].piece]


@several
@each_reading
@pytest.mark.parametrize("group_of_change", [0, 1])
def test_in_one_of_two_groups(group_of_change: int, at_once: bool, quick: ProcessGroup) -> None:
    """Messages of the other group come before, or after."""
    groups, pairs = (quick, dist.new_group(timeout=timedelta(minutes=3))), matrices("layer_sharded")
    of_group = {pair.piece: index % 2 for index, pair in enumerate(pairs)}
    dims = {pair.piece: pair.piece.partition_dim for pair in pairs}  # type: ignore[attr-defined]
    optimizer = AdaptiveMuon(
        named(pairs), layout_fn=lambda p: Split(groups[of_group[p]], dims[p]), max_bytes_in_flight=1, **OPTIONS
    )
    for step in range(2):
        give(pairs, step)
        optimizer.step()
    gone = [index for index, pair in enumerate(pairs) if of_group[pair.piece] == group_of_change]
    for without in (gone[:1], gone):
        give(pairs, 2, without=without if dist.get_rank() == 1 else ())
        if not at_once:
            optimizer.step()
            give(pairs, 3)
        name = f"'p{gone[0]}'"
        refused(optimizer.step, rf"{name} has a gradient on rank 0.*{name} has no gradient on rank 1")
        give(pairs, 4)
        optimizer.step()


@several
@each_reading
def test_in_a_closure(at_once: bool, quick: ProcessGroup) -> None:
    pairs = matrices("layer_sharded")
    optimizer = made("layer_sharded", pairs, quick)

    def closure(step: int, without: Sequence[int] = ()) -> float:
        give(pairs, step, without)
        return 2.0

    assert optimizer.step(lambda: closure(0)) == 2.0
    without = [2] if dist.get_rank() == 0 else []
    if not at_once:
        optimizer.step(lambda: closure(1, without))
        without = []
    refused(lambda: optimizer.step(lambda: closure(2, without)), "'p2' has no gradient on rank 0")


# ------------------------------------------------------------------------------------------------------- on all ranks


@in_rounds
@each_reading
@each_way
def test_all_ranks_change_alike(way: str, at_once: bool, most: int, quick: ProcessGroup) -> None:
    """They step as whole matrices do, also where none has a gradient, or a matrix gets its first one late."""
    pairs = matrices(way)
    every = range(len(pairs))
    pieces = made(way, pairs, quick, max_bytes_in_flight=most)
    whole = AdaptiveMuon([pair.whole for pair in pairs], **{**options_of("namo_d"), "bias_correction": True})
    for step, without in enumerate([[1], [1], [0], [0], [], every, every, [2], [], []]):
        give(pairs, step, without=without)
        whole.step()
        pieces.step()
    seen = {"W": max(difference(pair.piece, pair.cut(pair.whole)) for pair in pairs)}
    steps = [(float(whole.state[pair.whole]["step"]), float(pieces.state[pair.piece]["step"])) for pair in pairs]
    assert all(one == other for one, other in steps) and len({*steps}) > 1
    assert not far_apart(seen, "namo_d") if way != "distributed" else seen["W"] < 1e-4, seen


@each_reading
@each_way
def test_state_only_of_those_that_come(way: str, at_once: bool, quick: ProcessGroup) -> None:
    """At a learning rate of 0, matrices whose first gradients are zero get state, and nothing else of them changes."""
    pairs = matrices(way)
    optimizer = made(way, pairs, quick, weight_decay=0.1)
    give(pairs, 0, without=[0])
    optimizer.step()
    give(pairs, 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    pairs[0].piece.grad = torch.zeros_like(pairs[0].piece)
    optimizer.step()
    state, other = optimizer.state[pairs[0].piece], optimizer.state[pairs[1].piece]
    assert {"momentum_buffer", "moment2_buffer", "step"} <= state.keys()
    assert not any(value.any() for value in state.values()) and other["step"] == 2


@several
@each_way
def test_what_it_costs(way: str, quick: ProcessGroup) -> None:
    """Nothing in the usual step. In a step in which all ranks change, one message more, and the comparison."""
    pairs = matrices(way)
    optimizer = made(way, pairs, quick)
    counts = []
    for step, without in enumerate([[], [], [0], [0]]):
        give(pairs, step, without=without)
        counts.append(sum(collectives(optimizer.step).values()))
    number = {"layer_sharded": 2, "duplicated": 1, "distributed": 6, "replicas": 1}[way]
    assert counts[1] == counts[3] == number
    comparing = sum(collectives(lambda: gathered("a line")).values())
    assert counts[2] == number + 1 + comparing
