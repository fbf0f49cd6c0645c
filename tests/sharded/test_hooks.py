# SPDX-License-Identifier: Apache-2.0
"""``weight_update_hook`` where parameters are in shards: norms of whole matrices, or an error before anything changes."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hooks import HOOKS, Restrained
from models import WAYS, full, mesh, models, step_both
from pieces import difference, grid, options_of
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from emerging_optimizers.adaptive_muon import AdaptiveMuon, TensorParallelModeT, hooks
from emerging_optimizers.adaptive_muon.moment2 import METHODS


REFUSED = (
    r"with weight_update_hook, which takes norms of whole matrices, parameter 'w' must be held whole .*got .*None"
)


@pytest.fixture(autouse=True)
def upstream_has_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed release may have none."""
    monkeypatch.setattr(hooks, "find_spec", lambda name: True)


def needs_ranks() -> None:
    if dist.get_world_size() == 1:
        pytest.skip("one process holds matrices whole")


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_dtensors_go_the_way_of_whole_matrices(method: str, way: Callable[[nn.Module], None], name: str) -> None:
    """With shards that differ in size, empty ones, and blocks; in some ways on two dimensions of a mesh."""
    whole, sharded, places = models(way, hidden=14)
    pairs = [(p, q) for p, q in zip(whole.parameters(), sharded.parameters(), strict=True) if p.ndim == 2]
    options = {**options_of(method), "weight_decay": 0.1, "weight_update_hook": HOOKS[name]}
    optimizers = [AdaptiveMuon(list(params), **options) for params in zip(*pairs, strict=True)]
    step_both(optimizers, pairs, places, 3)
    for p, q in pairs:
        assert difference(full(q), p.detach()) <= 1e-4


@pytest.mark.parametrize("name", HOOKS)
def test_whole_dtensors_and_stacks_of_whole_matrices(name: str) -> None:
    """Replicas of a matrix; and experts of which every rank has its own."""
    size = dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 5), (5, 6, 8))]
    cut = [
        nn.Parameter(distribute_tensor(p.detach().clone(), mesh((size,), ("dp",)), [how]))
        for p, how in zip(whole, (Replicate(), Shard(0)), strict=True)
    ]
    for params in (whole, cut):
        params[1].muon_stacked = True  # type: ignore[attr-defined]
    optimizers = [AdaptiveMuon(params, **options_of(), weight_update_hook=HOOKS[name]) for params in (whole, cut)]
    for _ in range(3):
        for p, q in zip(whole, cut, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = distribute_tensor(p.grad.clone(), q.device_mesh, q.placements)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(whole, cut, strict=True):
        assert difference(full(q), p.detach()) <= 1e-4


@pytest.mark.parametrize("name", HOOKS)
def test_replicas_step_as_one(name: str, group: ProcessGroup) -> None:
    generator, results = torch.Generator().manual_seed(0), []
    initial, *gradients = torch.randn(4, 12, 8, generator=generator)
    for replicas in (None, group):
        p = nn.Parameter(initial.clone())
        optimizer = AdaptiveMuon([p], **options_of(), weight_update_hook=HOOKS[name], replica_group=replicas)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        results.append(p.detach())
    assert difference(*results) <= 1e-5


@pytest.mark.parametrize("mode", get_args(TensorParallelModeT))
def test_shards_that_are_no_dtensors_are_refused_at_construction(mode: Any, group: ProcessGroup) -> None:
    needs_ranks()
    options = {"tp_group": group, "tp_mode": mode, "weight_update_hook": Restrained()}
    p, q = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    q.partition_dim = 1  # type: ignore[attr-defined]
    optimizer = AdaptiveMuon([("v", p)], **options)  # whole
    with pytest.raises(ValueError, match=REFUSED):
        AdaptiveMuon([("v", p), ("w", q)], **options)
    with pytest.raises(ValueError, match=REFUSED):
        optimizer.add_param_group({"params": [("w", q)]})
    assert len(optimizer.param_groups) == 1
    AdaptiveMuon([("v", p), ("w", q)], **options | {"weight_update_hook": None})


def test_rectangles_and_stacks_of_split_matrices_are_refused(group: ProcessGroup) -> None:
    needs_ranks()
    pair, piece = grid((8, 6), group)
    with pytest.raises(ValueError, match=REFUSED):
        AdaptiveMuon([("w", pair.piece)], layout_fn=lambda p: piece, weight_update_hook=Restrained())
    dp = mesh((dist.get_world_size(),), ("dp",))
    experts = nn.Parameter(distribute_tensor(torch.ones(3, 4, 5), dp, [Shard(1)]))
    experts.muon_stacked = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=REFUSED):
        AdaptiveMuon([("w", experts)], weight_update_hook=Restrained())


def test_shards_found_at_the_first_step_are_refused_there(group: ProcessGroup) -> None:
    """On every rank, and nothing has changed."""
    needs_ranks()
    p, q = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = AdaptiveMuon([("v", p), ("w", q)], tp_group=group, weight_update_hook=Restrained())
    q.partition_dim = 0  # type: ignore[attr-defined]
    for each in (p, q):
        each.grad = torch.ones_like(each)
    for _ in range(2):
        with pytest.raises(ValueError, match=REFUSED):
            optimizer.step()
        assert not optimizer.state and all(bool((each == 1).all()) for each in (p, q))
    del q.partition_dim
    optimizer.step()
    assert not any(bool((each == 1).any()) for each in (p, q))


def test_ranks_with_other_hooks_are_refused(group: ProcessGroup) -> None:
    """Of DTensors, whose hooks communicate, and of replicas, which would drift apart."""
    needs_ranks()
    dp = mesh((dist.get_world_size(),), ("dp",))
    hook = None if dist.get_rank() else Restrained()
    for p, replicas in (
        (nn.Parameter(distribute_tensor(torch.ones(4, 3), dp, [Shard(0)])), None),
        (nn.Parameter(torch.ones(4, 3)), group),
    ):
        optimizer = AdaptiveMuon([p], weight_update_hook=hook, replica_group=replicas)
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="options of the optimizer.*weight_update_hook='Restrained'"):
            optimizer.step()
