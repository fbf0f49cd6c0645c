# SPDX-License-Identifier: Apache-2.0
"""Parameters that are DTensors: FSDP2, HSDP, tensor parallelism on a mesh, and both at once."""

from collections.abc import Callable

import pytest
import torch
from models import WAYS, fsdp, full, hsdp, local, models, step_both, train
from models import mesh as mesh_of
from pieces import OPTIONS, difference, far_apart, gathered, options_of
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_given_the_same_gradients(method: str, way: Callable[[nn.Module], None], mode: str) -> None:
    """Weights and state of the sharded model are the whole model's, with the layout read off the DTensors.

    Of 14 rows four ranks hold 4, 4, 4 and 2, or as strips of strips 4, 3, 4 and 3.
    """
    whole, sharded, places = models(way, hidden=14)
    pairs = [(p, q) for p, q in zip(whole.parameters(), sharded.parameters(), strict=True) if p.ndim == 2]
    options = {**options_of(method), "weight_decay": 0.1}
    optimizers = (
        AdaptiveMuon([p for p, _ in pairs], **options),
        AdaptiveMuon([q for _, q in pairs], tp_mode=mode, **options),
    )
    step_both(optimizers, pairs, places, 4)
    for p, q in pairs:
        seen = {"W": difference(full(q), p.detach())}
        state, other = optimizers[0].state[p], optimizers[1].state[q]
        assert state.keys() == other.keys()
        for key, value in state.items():
            seen[key] = difference(full(other[key]), value)
            if isinstance(q, DTensor) and value.shape == p.shape:
                assert isinstance(other[key], DTensor) and other[key].placements == q.placements
        assert not far_apart(seen, method)


@pytest.mark.parametrize("shape", [(9, 1), (3, 9, 1), (3, 1, 9)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_what_tensor_parallelism_leaves_empty(method: str, shape: tuple[int, ...]) -> None:
    """FSDP2 makes 0 x 0 of an empty shard of 9 x 0, and no experts of three with one dimension empty.

    The gradients are the same for all elements: torch cannot put such a DTensor together, nor say who has which rows.
    """
    size = dist.get_world_size()
    both = mesh_of((max(size // 2, 1), min(size, 2)), ("dp", "tp"))
    p, holder = nn.Parameter(torch.ones(shape)), nn.Module()
    along = [Shard(shape.index(1))]
    holder.register_parameter("p", nn.Parameter(distribute_tensor(p.detach().clone(), both["tp"], along)))
    try:
        fully_shard(holder, mesh=both["dp"])
    except NotImplementedError as error:  # torch 2.6 has no uneven strips of strips
        pytest.skip(str(error))
    q = holder.p
    p.muon_stacked = q.muon_stacked = p.ndim == 3  # type: ignore[attr-defined]
    optimizers = [AdaptiveMuon([each], **options_of(method), weight_decay=0.1) for each in (p, q)]
    for _ in range(3):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        for optimizer in optimizers:
            optimizer.step()
    assert sum(gathered(local(q).numel())) == p.numel()
    if local(q).numel():
        assert not far_apart({"W": difference(local(q), p.detach().flatten()[0].expand(local(q).shape))}, method)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_training_of_a_model(method: str, way: Callable[[nn.Module], None]) -> None:
    """With its own gradients too; where the model's own products are split, rounding differs before the optimizer."""
    whole, sharded, _ = models(way)
    options = {**options_of(method), "scalar_lr": 1e-3}
    losses = [train(model, HybridAdaptiveMuon.from_model(model, **options), range(6)) for model in (whole, sharded)]
    assert losses[0][-1] < losses[0][0]
    within = 1e-2 if way not in (fsdp, hsdp) else 1e-4 if method == "adamuon" else 1e-5  # adamuon: see far_apart
    assert losses[1] == pytest.approx(losses[0], rel=within)
    assert all(
        difference(full(q), p.detach()) <= within
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True)
    )


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_adamw_with_kernels_for_many_tensors(way: Callable[[nn.Module], None], rounds: bool) -> None:
    """As on a GPU. They take no DTensors beside plain tensors, as the norms of a tensor-parallel model are."""
    whole, sharded, places = models(way, dtype=torch.bfloat16 if rounds else torch.float32)
    options = {**options_of("namo"), "scalar_lr": 1e-2, "stochastic_rounding": rounds}
    optimizers = [
        HybridAdaptiveMuon.from_model(model, params=[{"params": model.parameters(), "foreach": True}], **options)
        for model in (whole, sharded)
    ]
    pairs = [*zip(whole.parameters(), sharded.parameters(), strict=True)]
    step_both(optimizers, pairs, places, 3)
    scalars = {p for group in optimizers[0].param_groups if not group["use_muon"] for p in group["params"]}
    assert all(difference(full(q), p.detach()) <= 1e-6 for p, q in pairs if p in scalars)


@pytest.mark.parametrize("way", WAYS)
def test_frozen_first(way: Callable[[nn.Module], None]) -> None:
    """A layer that is frozen is passed over on all ranks, decay included, and trained once it is not."""
    whole, sharded, _ = models(way)
    for model in (whole, sharded):
        frozen = [model.up.weight, model.up.bias]
        start = [full(p).clone() for p in frozen]
        model.up.requires_grad_(False)
        optimizer = HybridAdaptiveMuon.from_model(model, **OPTIONS, moment2_method="namo_d", scalar_lr=1e-3)
        train(model, optimizer, range(3))
        assert all(p.equal(full(q)) for p, q in zip(start, frozen, strict=True))
        assert not optimizer.state.keys() & set(frozen)
        model.up.requires_grad_(True)
        train(model, optimizer, range(3, 6))
        assert not any(p.equal(full(q)) for p, q in zip(start, frozen, strict=True))
    within = 1e-5 if way in (fsdp, hsdp) else 1e-2
    assert all(
        difference(full(q), p.detach()) <= within
        for p, q in zip(whole.parameters(), sharded.parameters(), strict=True)
    )


def test_pieces_of_dtensors_are_no_matrices_of_their_own(group: ProcessGroup) -> None:
    """But what every rank holds all of is one."""
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    whole, pieces = (nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [how])) for how in (Replicate(), Shard(0)))
    AdaptiveMuon([whole], tp_mode="blockwise")
    if dist.get_world_size() > 1:
        with pytest.raises(ValueError, match=r"parameter 'w' is one, with tp_mode, got 'blockwise'.*layer_sharded"):
            AdaptiveMuon([("w", pieces)], tp_mode="blockwise")


def test_partial_sums_are_refused_as_parameters_and_summed_as_gradients(group: ProcessGroup) -> None:
    mesh, size = mesh_of((dist.get_world_size(),), ("dp",)), dist.get_world_size()
    with pytest.raises(ValueError, match=r"'p' has the placements.*Partial"):
        AdaptiveMuon([("p", nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])))])
    p, q = nn.Parameter(torch.ones(4, 3)), nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    p.grad = torch.arange(12.0).view(4, 3)
    first = p.grad - (size - 1) * torch.eye(4, 3)  # terms that differ in more than a factor, which O would not see
    q.grad = DTensor.from_local(torch.eye(4, 3) if dist.get_rank() else first, mesh, [Partial()])
    for each in (p, q):
        AdaptiveMuon([each], **options_of()).step()
    assert not far_apart({"W": difference(full(q), p)}, "adamuon")


@pytest.mark.parametrize("method", METHODS)
def test_hooks_see_dtensors(method: str) -> None:
    """What upstream calls before and after the update gets the update as the parameter is."""
    seen = []

    class Hooked(AdaptiveMuon):
        def pre_weight_update_fn_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
            seen.append(full(update).clone())
            update.mul_(0.5)

        def post_weight_update_fn_inplace(self, p: torch.Tensor) -> None:
            p.mul_(2)

    whole, sharded, _ = models(fsdp)
    for model in (whole, sharded):
        p = model.down.weight
        p.grad = torch.ones_like(p)
        Hooked([p], **options_of(method)).step()
    within = 1e-4 if method == "adamuon" else 2e-5  # see far_apart: the update is D times O
    assert difference(seen[1], seen[0]) <= within
    assert difference(full(sharded.down.weight), whole.down.weight) <= within


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_what_fsdp1_has_flattened_is_refused(use_orig_params):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    model = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="flattened by FullyShardedDataParallel.. Use FSDP2"):
        HybridAdaptiveMuon.from_model(model)
    with pytest.raises(ValueError, match="Use FSDP2"):
        HybridAdaptiveMuon(list(model.parameters()))
