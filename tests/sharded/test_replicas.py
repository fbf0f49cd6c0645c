# SPDX-License-Identifier: Apache-2.0
"""Replicas that hold the same whole matrices share the work, and step as one that does all of it."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pieces import OPTIONS, collectives, options_of
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import FlopCounterMode

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.state.full_shape import expand_v, reduce_v


SHAPES = [(24, 64), (64, 24), (32, 32), (32, 32), (48, 40), (30, 17), (3, 18), (18, 3)]
each_method = pytest.mark.parametrize("method", METHODS)


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Matrices, a stack of experts, a fused layer in adjacent blocks, and one whose blocks repeat down its rows."""
    generator = torch.Generator().manual_seed(0)
    made = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in [*SHAPES, (3, 12, 8), (9, 20), (20, 9), (20, 9)]
    ]
    made[-4].muon_stacked = True  # type: ignore[attr-defined]
    made[-3].muon_blocks = ColumnBlocks((3, 2))  # type: ignore[attr-defined]
    made[-2].muon_blocks = (8, 12)  # type: ignore[attr-defined]
    made[-1].muon_blocks = (3, 2)  # type: ignore[attr-defined]
    return made


def give_gradients(to: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in to:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def walked(alone: AdaptiveMuon, shared: AdaptiveMuon, steps: int = 3) -> None:
    for step in range(steps):
        for optimizer in (alone, shared):
            give_gradients(optimizer.param_groups[0]["params"], step)
            optimizer.step()


def gathered(tensor: torch.Tensor, group: ProcessGroup) -> list[torch.Tensor]:
    """What each rank has of a tensor."""
    found = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(found, tensor.detach().contiguous(), group=group)
    return found


def check_same(alone: AdaptiveMuon, shared: AdaptiveMuon, group: ProcessGroup, exact: bool = False) -> None:
    """Weights and states are those of the optimizer alone, and have the same bits on all replicas."""
    for p, q in zip(alone.param_groups[0]["params"], shared.param_groups[0]["params"], strict=True):
        pairs = [(p, q), *((value, shared.state[q][key]) for key, value in alone.state[p].items())]
        assert alone.state[p].keys() == shared.state[q].keys()
        for mine, ours in pairs:
            torch.testing.assert_close(ours, mine, atol=0 if exact else 1e-6, rtol=0 if exact else 1e-5)
            assert all(torch.equal(other, ours) for other in gathered(ours, group))


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_steps_as_one_that_does_all(method: str, dtype: torch.dtype, group: ProcessGroup) -> None:
    """A bfloat16 weight may fall on the other side of a rounding, as batches are others."""
    options = {**options_of(method), "bias_correction": True, "weight_decay": 0.1}
    alone, shared = AdaptiveMuon(params(dtype), **options), AdaptiveMuon(params(dtype), replica_group=group, **options)
    if dtype != torch.bfloat16:
        walked(alone, shared)
        check_same(alone, shared, group)
        return
    walked(alone, shared, 1)
    for p, q in zip(alone.param_groups[0]["params"], shared.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(q, p, atol=2**-6, rtol=2**-6)
        assert all(torch.equal(other, q) for other in gathered(q, group))


def test_one_matrix_at_a_time_has_the_same_bits(group: ProcessGroup) -> None:
    """ "standard" takes one matrix at a time, so that the owner meets the operations of the optimizer alone."""
    options: dict[str, Any] = {**OPTIONS, "ns_algorithm": "standard"}
    alone, shared = AdaptiveMuon(params(), **options), AdaptiveMuon(params(), replica_group=group, **options)
    walked(alone, shared, 2)
    check_same(alone, shared, group, exact=True)


@each_method
def test_one_collective_a_round(method: str, group: ProcessGroup) -> None:
    optimizer = AdaptiveMuon(params(), replica_group=group, moment2_method=method, **OPTIONS)
    for step in range(2):
        give_gradients(optimizer.param_groups[0]["params"], step)
        seen = collectives(optimizer.step)
    assert seen == ({} if group.size() == 1 else {"c10d::_allgather_base_": 1})


def flops(step: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@each_method
def test_the_work_is_shared(method: str, group: ProcessGroup) -> None:
    """Counted by torch: each replica does its share, within a tenth."""
    work = []
    for replicas in (None, group):
        matrices = [nn.Parameter(torch.randn(48, 40)) for _ in range(24)]
        optimizer = AdaptiveMuon(matrices, replica_group=replicas, moment2_method=method, **OPTIONS)
        for step in range(2):
            give_gradients(matrices, step)
            done = flops(optimizer.step)
        work.append(done)
    alone, shared = work
    assert 1 / group.size() <= shared / alone * 1.0001 and shared / alone <= 1.1 / group.size()


def test_gradients_that_differ_leave_the_weights_equal(group: ProcessGroup) -> None:
    """What an all-reduce rounds differently on some ranks does not drive replicas apart: owners decide."""
    optimizer = AdaptiveMuon(params(), replica_group=group, moment2_method="namo_d", weight_decay=0.1, **OPTIONS)
    for step in range(3):
        give_gradients(optimizer.param_groups[0]["params"], step)
        for p in optimizer.param_groups[0]["params"]:
            p.grad *= 1 + 1e-3 * dist.get_rank()
        optimizer.step()
    for p in optimizer.param_groups[0]["params"]:
        assert all(torch.equal(other, p) for other in gathered(p, group))


@pytest.mark.parametrize("shared_first", [True, False])
def test_a_checkpoint_goes_on_with_and_without(shared_first: bool, group: ProcessGroup) -> None:
    replicas = {True: group, False: None}
    options = {**options_of("namo_d"), "bias_correction": True}
    alone, first = (
        AdaptiveMuon(params(), **options),
        AdaptiveMuon(params(), replica_group=replicas[shared_first], **options),
    )
    walked(alone, first)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    weights = [p.detach().clone() for p in first.param_groups[0]["params"]]
    others = params()
    for p, weight in zip(others, weights, strict=True):
        p.data.copy_(weight)
    second = AdaptiveMuon(others, replica_group=replicas[not shared_first], **options)
    second.load_state_dict(torch.load(buffer))
    walked(alone, second)
    check_same(alone, second, group)


def test_hooks_and_users_functions(group: ProcessGroup) -> None:
    """A user's function is called by owners; the hook on all replicas, with the whole update."""
    made = []
    for replicas in (None, group):
        optimizer = AdaptiveMuon(params(), replica_group=replicas, **OPTIONS)
        optimizer.scaled_orthogonalize_fn = lambda momentum: momentum.mul_(2).tanh()
        optimizer.pre_weight_update_fn_inplace = lambda p, update: update.clamp_(-0.1, 0.1)
        made.append(optimizer)
    walked(made[0], made[1])
    check_same(made[0], made[1], group)


@each_method
def test_state_in_the_parameters_shape(method: str, group: ProcessGroup) -> None:
    """Each replica has all of V: reduced again it is the same, not that of all replicas added up."""
    optimizer = AdaptiveMuon(params(), replica_group=group, **options_of(method))
    give_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    matrices = optimizer.param_groups[0]["params"]
    full = [expand_v(optimizer.state[p], p, optimizer.state_format) for p in matrices]
    for p, reduced in zip(matrices, reduce_v(full, matrices, optimizer.state_format), strict=True):
        assert reduced.keys() == optimizer.state[p].keys()
        assert all(torch.equal(value, optimizer.state[p][key]) for key, value in reduced.items())


@pytest.mark.skipif("os.environ['WORLD_SIZE'] == '1'", reason="one process has no replicas")
def test_replicas_that_disagree_are_told_before_anything_changes(group: ProcessGroup) -> None:
    last = dist.get_rank() == group.size() - 1
    shapes = [(6, 4), (4, 5 if last else 6)]
    for optimizer, message in (
        (AdaptiveMuon([nn.Parameter(torch.ones(s)) for s in shapes], replica_group=group, **OPTIONS), "shapes"),
        (AdaptiveMuon(params(), replica_group=group, **{**OPTIONS, "nesterov": not last}), "nesterov"),
    ):
        give_gradients(optimizer.param_groups[0]["params"], 0)
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))
    optimizer = AdaptiveMuon(params(), replica_group=group, **OPTIONS)
    give_gradients(optimizer.param_groups[0]["params"], 0)
    if last:
        optimizer.param_groups[0]["params"][1].grad = None
    with pytest.raises(ValueError, match="which parameters have a gradient"):
        optimizer.step()


@pytest.mark.skipif("os.environ['WORLD_SIZE'] == '1'", reason="one process has no replicas")
def test_ranks_with_other_weights_are_no_replicas(group: ProcessGroup) -> None:
    """Such as expert parallelism's: they would all get the update of one. Nothing has changed when they are told."""
    made = params()
    with torch.no_grad():
        made[3][1, 2] += float(dist.get_rank() == group.size() - 1)
    optimizer = AdaptiveMuon(list(zip("abcdefghijkl", made, strict=True)), replica_group=group, **OPTIONS)
    give_gradients(made, 0)
    before = [p.detach().clone() for p in made]
    last = group.size() - 1
    with pytest.raises(ValueError, match=rf"'d' differ on the ranks of a process group, got \[0, {last}\]. Broadcast"):
        optimizer.step()
    assert all(map(torch.equal, before, made)) and not any(optimizer.state.values())


def test_a_function_tells_the_group_of_each(group: ProcessGroup) -> None:
    """Here every second parameter is a rank's own."""
    of_alone, made = params(), params()
    with torch.no_grad():
        for p in (*of_alone[1::2], *made[1::2]):
            p += dist.get_rank()
    shared = {id(p) for p in made[::2]}
    alone = AdaptiveMuon(of_alone, **OPTIONS)
    optimizer = AdaptiveMuon(made, replica_group=lambda p: group if id(p) in shared else None, **OPTIONS)
    walked(alone, optimizer)
    for p, q in zip(of_alone, made, strict=True):
        torch.testing.assert_close(q, p, atol=1e-6, rtol=1e-5)
    assert collectives(optimizer.step) == ({} if group.size() == 1 else {"c10d::_allgather_base_": 1})


def test_what_such_a_function_returns_is_a_group() -> None:
    wrong: Any = lambda p: "dp"  # noqa: E731
    with pytest.raises(ValueError, match="replica_group must return a process group or None; for parameter 0"):
        AdaptiveMuon([nn.Parameter(torch.ones(3, 4))], replica_group=wrong, **OPTIONS)


@each_method
def test_sharing_is_switched_off(method: str, group: ProcessGroup) -> None:
    optimizer = AdaptiveMuon(params(), replica_group=group, share_replicas=False, moment2_method=method, **OPTIONS)
    for step in range(2):
        give_gradients(optimizer.param_groups[0]["params"], step)
        seen = collectives(optimizer.step)
    assert not seen
