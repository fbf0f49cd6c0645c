# SPDX-License-Identifier: Apache-2.0
"""How many collectives a round takes, whatever the number of matrices and however they are sharded; and their groups."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import WAYS, local, models, tensor_parallel_and_fsdp
from pieces import OPTIONS, SHAPES, Pair, collectives, fused_layers, grid, set_gradients, stack, strips
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon import AdaptiveMuon, Layout
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.sharding.agreement import group_of


DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ITERATIONS = 5

each_method = pytest.mark.parametrize("method", METHODS)
each_mode = pytest.mark.parametrize("mode", ["layer_sharded", "duplicated", "distributed"])
each_exact_mode = pytest.mark.parametrize("mode", ["layer_sharded", "duplicated"])


def expected(mode: str, method: str, rounds: int = 1) -> dict[str, int]:
    """The last all-reduce of "distributed" has the sums of squares of O, where the method observes them."""
    if dist.get_world_size() == 1:
        return {}
    moment2 = METHODS[method]()
    sums_of_O = "orthogonalized" in moment2.observed and len(moment2.kept_dims(2, 1)) < 2
    name, number = {
        "layer_sharded": ("c10d::alltoall_base_", 2),
        "duplicated": ("c10d::_allgather_base_", 1),
        "distributed": ("c10d::allreduce_", ITERATIONS + 1 + sums_of_O),
    }[mode]
    return {name: rounds * number}


def of_second_step(pairs: Sequence[Pair], method: str, **options: Any) -> dict[str, int]:
    """The collectives of a step; the first compares the shards and has more."""
    options = {**OPTIONS, "num_ns_steps": ITERATIONS, "bias_correction": True, "weight_decay": 0.1, **options}
    optimizer = AdaptiveMuon([pair.piece for pair in pairs], moment2_method=method, **options)
    for step in range(2):
        set_gradients([*pairs], step)
        seen = collectives(optimizer.step)
    return seen


@pytest.mark.parametrize("count", [1, 3, 8])
@each_mode
@each_method
def test_strips_blocks_and_stacks(method: str, mode: str, count: int, group: ProcessGroup) -> None:
    """However many matrices, split either way, of mixed dtypes; and blocks and stacks of experts alone."""
    pairs = strips(SHAPES[:count], dtypes=DTYPES) + fused_layers(2) + [stack(dim) for dim in (1, 2)]
    assert of_second_step(pairs, method, tp_group=group, tp_mode=mode) == expected(mode, method)
    for alone in (fused_layers(count), [stack(1), stack(2)]):
        assert of_second_step(alone, method, tp_group=group, tp_mode=mode) == expected(mode, method)


@each_exact_mode
@each_method
def test_a_grid(method: str, mode: str, group: ProcessGroup) -> None:
    pairs, shards = zip(*(grid(shape, group) for shape in [(31, 18), (18, 31), (32, 32)]), strict=True)
    layouts = {pair.piece: shard for pair, shard in zip(pairs, shards, strict=True)}
    assert of_second_step(pairs, method, layout_fn=layouts.get, tp_mode=mode) == expected(mode, method)


@each_exact_mode
@pytest.mark.parametrize("way", WAYS)
@each_method
def test_models_of_dtensors(method: str, way: Callable[[nn.Module], None], mode: str) -> None:
    """A round for each process group; a model sharded in two dimensions has matrices that only one of them splits."""
    _, sharded, places = models(way)
    params = [p for p in sharded.parameters() if p.ndim == 2]
    optimizer = AdaptiveMuon(params, moment2_method=method, tp_mode=mode, **OPTIONS)
    for _ in range(2):
        for p in params:
            p.grad = p.detach().clone()
            local(p.grad).normal_()
        seen = collectives(optimizer.step)
    rounds = 2 if way is tensor_parallel_and_fsdp and dist.get_world_size() == 4 else 1
    assert seen == expected(mode, method, rounds)


@each_method
def test_more_rounds_of_the_same(method: str, group: ProcessGroup) -> None:
    """Where a matrix is beyond the bytes in flight, a round has one for every owner."""
    pairs = strips([(24, 64)] * 8)[::3]
    seen = of_second_step(pairs, method, tp_group=group, max_bytes_in_flight=1)
    assert seen == expected("layer_sharded", method, rounds=8 // dist.get_world_size())


@each_method
def test_nothing_where_matrices_are_whole(method: str, group: ProcessGroup) -> None:
    """As all are in the mode "blockwise", experts on their ranks, and what layout_fn says is whole."""
    assert not of_second_step(strips(), method, tp_group=group, tp_mode="blockwise")
    assert not of_second_step([stack(0)], method, tp_group=group)
    assert not of_second_step(strips()[2::3], method, tp_group=group)
    assert not of_second_step(strips(), method, layout_fn=lambda p: Layout())


@pytest.mark.skipif(int(os.environ["WORLD_SIZE"]) < 4, reason="two groups of several ranks")
def test_a_group_of_some_ranks_does_not_split_the_communicator_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """For that NCCL would wait for the other ranks, if init_process_group was given a device_id."""
    world, new_group, bound = dist.group.WORLD, dist.new_group, []
    assert world is not None
    monkeypatch.setattr(world, "bound_device_id", torch.device("cpu", 0))

    def noted(*args: Any, **options: Any) -> Any:
        bound.append(world.bound_device_id)
        return new_group(*args, **options)

    monkeypatch.setattr(dist, "new_group", noted)
    even = dist.get_rank() % 2 == 0
    group = group_of((0, 2) if even else (1, 3))
    assert bound == [None] and group.size() == 2 and world.bound_device_id == torch.device("cpu", 0)
    assert group_of((2, 0) if even else (3, 1)) is group
