# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding and cautious decay do not depend on how a matrix is sharded, and replicas stay the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import WAYS, full, models, step_both
from models import mesh as mesh_of
from pieces import Pair, fused_layers, gathered, grid, options_of, set_gradients, stack, strips
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard, distribute_tensor

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, HybridAdaptiveMuon, Piece, adamw
from emerging_optimizers.adaptive_muon.moment2 import METHODS


LESS: dict[str, Any] = {"stochastic_rounding": True, "momentum_dtype": "bfloat16", "weight_decay": 0.1}


def pairs_of(kind: str, group: ProcessGroup) -> tuple[list[Pair], dict[torch.Tensor, Piece]]:
    """Whole matrices and shards of them in bfloat16, and the layouts that the shards do not show."""
    pieces: dict[torch.Tensor, Piece] = {}
    if kind == "grid":
        pair, piece = grid((30, 22), group)
        pairs, pieces = [pair], {pair.piece: piece}
    elif kind == "fused":
        torch.manual_seed(0)
        pairs = fused_layers(2)
    else:
        pairs = [stack(0), stack(1), stack(2)] if kind == "stacks" else strips()
    for pair in pairs:
        for p in (pair.whole, pair.piece):
            p.data = p.data.bfloat16()
    return pairs, pieces


@pytest.mark.parametrize("kind", ["strips", "grid", "fused", "stacks"])
@pytest.mark.parametrize("method", METHODS)
def test_shards_are_rounded_as_the_whole(method: str, kind: str, group: ProcessGroup) -> None:
    """The momentum to the bit. The weights but where D or O differ by a rounding, which noise of another place would not."""
    pairs, pieces = pairs_of(kind, group)
    options = {**options_of(method), **LESS, "weight_decay_method": "cautious", "ns_algorithm": "standard"}
    one = AdaptiveMuon([pair.whole for pair in pairs], **options)
    other = AdaptiveMuon([pair.piece for pair in pairs], tp_group=group, layout_fn=pieces.get, **options)
    for step in range(2):
        set_gradients(pairs, step)
        one.step()
        other.step()
        differing = total = 0
        for pair in pairs:
            M, expected = other.state[pair.piece]["momentum_buffer"], one.state[pair.whole]["momentum_buffer"]
            assert torch.equal(M, pair.cut(expected)) and M.dtype == torch.bfloat16
            differing += int((pair.piece != pair.cut(pair.whole.detach())).sum())
            total += pair.piece.numel()
        assert differing <= (0.02 if method == "adamuon" else 0.005) * (step + 1) * total


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_equal_blocks_have_noise_of_their_own(dim: int, group: ProcessGroup) -> None:
    """Blocks of the same numbers, which are one batch. Without gradients they only decay: whole as sharded, to the bit."""
    torch.manual_seed(0)
    [pair] = fused_layers(dim + 1)[dim:]
    block = torch.randn(4, 40).bfloat16()
    whole = block.repeat(6, 1) if dim == 0 else block.mT.repeat(1, 6)
    for p, value in ((pair.whole, whole), (pair.piece, pair.cut(whole))):
        p.data = value.clone()
        p.muon_blocks = ColumnBlocks((4,) * 6) if dim else (4,) * 6  # type: ignore[attr-defined]
        p.grad = torch.zeros_like(p)
    for p, options in ((pair.whole, {}), (pair.piece, {"tp_group": group})):
        AdaptiveMuon([p], **options_of("namo"), **LESS, **options).step()
    assert torch.equal(pair.piece, pair.cut(pair.whole.detach()))
    blocks = pair.whole.detach().split(4, dim)
    decayed = block.float() * (1 - options_of()["lr"] * LESS["weight_decay"])
    for index, one in enumerate(blocks):
        moved = (one.mT if dim else one).float() != decayed.bfloat16().float()
        assert 0.05 < moved.double().mean() < 0.5
        assert all(0.1 < (one != other).double().mean() < 0.7 for other in blocks[:index])


def test_stacks_of_one_batch_have_noise_of_their_own_experts(group: ProcessGroup) -> None:
    """One holds some experts of more, the other all of its own, on every rank: replicas, which must stay the same."""
    size, mesh = dist.get_world_size(), mesh_of((dist.get_world_size(),), ("dp",))
    sharded, whole = (
        torch.randn(n, 6, 8, generator=torch.Generator().manual_seed(1)).bfloat16() for n in (2 * size, 2)
    )
    params = [nn.Parameter(distribute_tensor(sharded, mesh, [Shard(0)])), nn.Parameter(whole)]
    for p in params:
        p.muon_stacked = True  # type: ignore[attr-defined]
        p.grad = torch.ones_like(p)
    optimizer = AdaptiveMuon(params, **options_of("namo"), **LESS)
    optimizer.step()
    own = [tensor.detach().float() for tensor in (params[1], optimizer.state[params[1]]["momentum_buffer"])]
    assert all(torch.equal(one, other) for of_rank in gathered(own) for one, other in zip(of_rank, own, strict=True))


def test_the_noise_of_another_place_would_be_seen(group: ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would find if rows and columns were counted from the shard's own first."""
    from emerging_optimizers.adaptive_muon import noise

    at = noise.Noise.at
    pairs, _ = pairs_of("strips", group)
    one, other = (
        AdaptiveMuon([getattr(pair, name) for pair in pairs], tp_group=group, **options_of("namo"), **LESS)
        for name in ("whole", "piece")
    )
    set_gradients(pairs, 0)
    one.step()
    own = lambda self, *where: at(noise.Noise(self.keys), *where)  # noqa: E731
    monkeypatch.setattr(noise.Noise, "at", own)
    other.step()
    seen = [
        torch.equal(other.state[pair.piece]["momentum_buffer"], pair.cut(one.state[pair.whole]["momentum_buffer"]))
        for pair in pairs
    ]
    assert all(seen) is (dist.get_world_size() == 1 or dist.get_rank() == 0)


@pytest.mark.parametrize("at_once", [2**24, 20], ids=["", "by rows"])
@pytest.mark.parametrize("way", WAYS)
def test_dtensors(way: Callable[[nn.Module], None], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's part too, which is elementwise: to the bit, also a few rows at a time."""
    monkeypatch.setattr(adamw, "AT_ONCE", at_once)
    whole, sharded, places = models(way, hidden=14, dtype=torch.bfloat16)
    options = {**options_of("namo"), **LESS, "scalar_lr": 1e-2}
    optimizers = [HybridAdaptiveMuon.from_model(model, **options) for model in (whole, sharded)]
    pairs = [*zip(whole.parameters(), sharded.parameters(), strict=True)]
    step_both(optimizers, pairs, places, 3)
    scalars = {p for group in optimizers[0].param_groups if not group["use_muon"] for p in group["params"]}
    for p, q in pairs:
        assert q.dtype == torch.bfloat16
        if p in scalars:
            assert torch.equal(full(q), p.detach())
        else:
            assert torch.equal(
                full(optimizers[1].state[q]["momentum_buffer"]), optimizers[0].state[p]["momentum_buffer"]
            )
            assert (full(q) != p.detach()).double().mean() < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_replicas_stay_the_same(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in [(24, 16)] * 3 + [(16, 40)]
    ]
    optimizer = AdaptiveMuon(params, replica_group=dist.group.WORLD, **options_of(method), **LESS)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()
    for p in params:
        states = gathered([p.detach().float(), *(value.float() for value in optimizer.state[p].values())])
        assert all(torch.equal(one, two) for each in states for one, two in zip(states[0], each, strict=True))
