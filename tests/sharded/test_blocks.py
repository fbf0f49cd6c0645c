# SPDX-License-Identifier: Apache-2.0
"""Fused matrices and stacks of matrices in pieces: every block and every expert is a matrix of its own."""

import pytest
import torch
from models import mesh as mesh_of
from pieces import (
    OPTIONS,
    Pair,
    difference,
    far_apart,
    gathered,
    options_of,
    set_gradients,
    stack,
    strip,
    strips,
    walk,
)
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.orthogonalize import newton_schulz


# Rows of the whole matrix and its blocks: two halves; three, once, where no rank's strip ends with a block; Megatron's
# query groups, here four of two heads of queries, a key and a value, tall and wide blocks among them.
# Then heads, some of which are whole on a rank and others cut. The same with columns.
Blocks = tuple[int, ...] | ColumnBlocks
FUSED: list[tuple[tuple[int, int], Blocks]] = [
    ((48, 20), (24, 24)),
    ((41, 16), (20, 11, 10)),
    ((64, 24), (8, 4, 4)),
    ((64, 48), (8, 4, 4)),
    ((54, 12), (6,) * 9),
]
FUSED += [((columns, rows), ColumnBlocks(sizes)) for (rows, columns), sizes in FUSED]  # type: ignore[arg-type]


def fused(shape: tuple[int, int], blocks: Blocks, dim: int) -> Pair:
    """A fused matrix and this rank's strip of it."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    # V of a block that has no entries a row is held apart, a row; the columns are split as the matrix's are.
    pair = Pair(
        nn.Parameter(whole),
        nn.Parameter(strip(whole, dim).clone()),
        lambda t: t if t.ndim == 1 or t.size(dim) != shape[dim] else strip(t, dim),
    )
    pair.piece.partition_dim = dim  # type: ignore[attr-defined]
    for p in (pair.whole, pair.piece):
        p.muon_blocks = blocks  # type: ignore[attr-defined]
    return pair


def apart(whole: torch.Tensor, blocks: Blocks) -> list[torch.Tensor]:
    """The blocks of a fused matrix, each as a matrix, by another road than the package's."""
    if isinstance(blocks, ColumnBlocks):
        return [part.mT for part in apart(whole.mT, tuple(blocks.sizes))]
    groups = whole.view(-1, sum(blocks), whole.size(-1))
    return [part.reshape(-1, whole.size(-1)) for part in groups.split(list(blocks), dim=1)]


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated", "distributed"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_in_pieces(method: str, dim: int, mode: str, group: ProcessGroup) -> None:
    """Go the way of the fused whole matrix, whose blocks go the way of separate matrices."""
    pairs = [fused(*each, dim) for each in FUSED]
    parts = [[nn.Parameter(part.clone()) for part in apart(p.whole.detach(), p.whole.muon_blocks)] for p in pairs]
    same = {"weight_decay": 0.1, "bias_correction": True}
    separate = AdaptiveMuon([part for each in parts for part in each], **options_of(method), **same)
    seen = walk(pairs, 3, {"moment2_method": method, **same}, tp_group=group, tp_mode=mode)
    if mode == "distributed":
        assert seen["W"] <= (1e-4 if method == "adamuon" else 1e-5) and max(seen.values()) <= 1e-4, seen
    else:
        assert not far_apart(seen, method)
    for step in range(3):
        set_gradients(pairs, step)
        for pair, each in zip(pairs, parts, strict=True):
            for part, grad in zip(each, apart(pair.whole.grad, pair.whole.muon_blocks), strict=True):
                part.grad = grad.clone()
        separate.step()
    for pair, each in zip(pairs, parts, strict=True):
        for part, other in zip(each, apart(pair.whole.detach(), pair.whole.muon_blocks), strict=True):
            assert not far_apart({"W": difference(part.detach(), other)}, method)


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_an_owner_iterates_on_equal_blocks_together(
    method: str, dim: int, mode: str, group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever ranks hold them."""
    taken: list[int] = []
    iterate = newton_schulz.iterate
    monkeypatch.setattr(
        newton_schulz, "iterate", lambda part, *rest: (taken.append(len(part)), iterate(part, *rest))[1]
    )
    pair = fused((54, 12), (6,) * 9, dim)
    set_gradients([pair], 0)
    AdaptiveMuon([pair.piece], tp_group=group, tp_mode=mode, **options_of(method)).step()
    assert len(taken) == 1
    assert sum(map(sum, gathered(taken))) == 9 * (group.size() if mode == "duplicated" else 1)


def test_blocks_fn_comes_before_the_attribute(group: ProcessGroup) -> None:
    pairs, others = [fused((64, 24), (8, 4, 4), 0)], [fused((64, 24), (16,), 0)]
    one = AdaptiveMuon([pairs[0].piece], tp_group=group, **OPTIONS)
    other = AdaptiveMuon([others[0].piece], tp_group=group, blocks_fn=lambda p: (8, 4, 4), **OPTIONS)
    for pair, optimizer in ((pairs, one), (others, other)):
        set_gradients(pair, 0)
        optimizer.step()
    assert torch.equal(pairs[0].piece, others[0].piece)


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated", "distributed"])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_stacks_in_pieces(method: str, dim: int, mode: str, group: ProcessGroup) -> None:
    pair = stack(dim)
    same = {"moment2_method": method, "weight_decay": 0.1, "bias_correction": True}
    seen = walk([pair], 3, same, tp_group=group, tp_mode=mode)
    if mode == "distributed" and dim > 0:
        assert max(seen.values()) <= 1e-4, seen
    else:
        assert not far_apart(seen, method)


def test_a_rank_without_experts_helps_to_sum_their_gradients() -> None:
    """One expert on all ranks but the first has no rows there; its gradient comes in partial sums."""
    size = dist.get_world_size()
    mesh, whole = mesh_of((size,), ("ep",)), torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(4))
    one, other = nn.Parameter(whole.clone()), nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    for p in (one, other):
        p.muon_stacked = True  # type: ignore[attr-defined]
    parts = torch.randn(size, 1, 6, 4, generator=torch.Generator().manual_seed(5))
    one.grad = parts.sum(0)
    other.grad = DTensor.from_local(parts[dist.get_rank()], mesh, [Partial()])
    for p in (one, other):
        AdaptiveMuon([p], moment2_method="namo_d", **OPTIONS).step()
    assert difference(other.detach().full_tensor(), one.detach()) <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_experts_as_dtensors(method: str) -> None:
    """Expert parallelism on a mesh, with the experts' state sharded as they are; alone and with strips of rows."""
    size = dist.get_world_size()
    mesh = mesh_of((max(size // 2, 1), min(size, 2)), ("ep", "tp"))
    whole = torch.randn(4, 12, 20, generator=torch.Generator().manual_seed(3))
    options = options_of(method)
    for placements in ([Shard(0), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Shard(2)]):
        expected = nn.Parameter(whole.clone())
        sharded = nn.Parameter(distribute_tensor(whole, mesh, placements))
        for p in (expected, sharded):
            p.muon_stacked = True  # type: ignore[attr-defined]
        optimizers = AdaptiveMuon([expected], **options), AdaptiveMuon([sharded], **options)
        for step in range(2):
            expected.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(step))
            sharded.grad = distribute_tensor(expected.grad, mesh, placements)
            for optimizer in optimizers:
                optimizer.step()
        seen = {"W": difference(sharded.full_tensor(), expected.detach())}
        for key, value in optimizers[0].state[expected].items():
            other = optimizers[1].state[sharded][key]
            seen[key] = difference(other.full_tensor() if isinstance(other, DTensor) else other, value)
        assert not far_apart(seen, method)


def test_strips_hold_no_stack_without_the_tag() -> None:
    p = nn.Parameter(torch.randn(3, 4, 5))
    with pytest.raises(ValueError, match="muon_stacked"):
        AdaptiveMuon([p])
    assert strips([(3, 4)])
