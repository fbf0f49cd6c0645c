# SPDX-License-Identifier: Apache-2.0
"""Replicas of sharded matrices share the work: along a mesh's dimensions that replicate, and in replica_group."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from models import local
from models import mesh as mesh_of
from pieces import OPTIONS, Pair, collectives, far_apart, gathered, options_of, walk
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, Piece
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.sharding.layout import ReplicaPiece


SHAPES = [(24, 64), (64, 24), (32, 32), (33, 40), (40, 33), (3, 18), (18, 3)]
each_method = pytest.mark.parametrize("method", METHODS)
needs_replicas = pytest.mark.skipif(int(os.environ["WORLD_SIZE"]) < 4, reason="two replicas of two shards")


@cache
def groups() -> tuple[ProcessGroup, ProcessGroup]:
    """The ranks with other shards, and those with the same: two replicas of two strips on four ranks."""
    size = dist.get_world_size()
    both = mesh_of((max(size // 2, 1), min(size, 2)), ("dp", "tp"))
    return both.get_group("tp"), both.get_group("dp")


@cache
def unnamed() -> DeviceMesh:
    size = dist.get_world_size()
    return init_device_mesh("cpu", (max(size // 2, 1), min(size, 2)))


@cache
def cube() -> DeviceMesh:
    """Three dimensions, of which the first has one rank on any number of ranks."""
    size = dist.get_world_size()
    return init_device_mesh("cpu", (1, max(size // 2, 1), min(size, 2)), mesh_dim_names=("pp", "dp", "cp"))


PLACEMENTS: list[tuple[str, tuple[Placement, ...]]] = [
    ("unnamed", (Replicate(), Shard(0))),
    ("unnamed", (Shard(1), Replicate())),
    ("unnamed", (Replicate(), Replicate())),
    ("cube", (Replicate(), Replicate(), Shard(1))),
    ("cube", (Replicate(), Replicate(), Replicate())),
]


def distributed(whole: torch.Tensor, mesh: str, placements: tuple[Placement, ...]) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(whole.clone(), unnamed() if mesh == "unnamed" else cube(), placements))


def same_on_replicas(optimizer: AdaptiveMuon, replica_group: ProcessGroup) -> bool:
    """Whether weights and states have the same bits on the ranks with the same shards."""

    def local(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()

    for p in optimizer.param_groups[0]["params"]:
        for tensor in map(local, (p, *optimizer.state[p].values())):
            others = [torch.empty_like(tensor) for _ in range(replica_group.size())]
            dist.all_gather(others, tensor, group=replica_group)
            if not all(torch.equal(other, tensor) for other in others):
                return False
    return True


# ------------------------------------------------------------------------------------------------------------- DTensors


def walked(method: str, steps: int, placed: tuple[str, tuple[Placement, ...]], **options: Any) -> list[AdaptiveMuon]:
    """Whole matrices and a stack, and the same as DTensors with and without sharing, after some steps.

    Of some, one rank of each replica holds all.
    """
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, generator=generator) for shape in [*SHAPES, (1, 18), (18, 1), (3, 12, 8)]]
    made: list[list[nn.Parameter]] = [[nn.Parameter(whole.clone()) for whole in wholes]]
    for _ in range(2):
        of_stack = (placed[0], tuple(Shard(each.dim + 1) if isinstance(each, Shard) else each for each in placed[1]))
        made.append([distributed(whole, *(of_stack if whole.ndim == 3 else placed)) for whole in wholes])
    for params in made:
        params[-1].muon_stacked = True  # type: ignore[attr-defined]
        params[0].muon_blocks, params[1].muon_blocks = (4, 2), ColumnBlocks((6,) * 4)  # type: ignore[attr-defined]
    options = {**options_of(method), "weight_decay": 0.1, "bias_correction": True, **options}
    optimizers = [AdaptiveMuon(params, share_replicas=i != 2, **options) for i, params in enumerate(made)]
    for _ in range(steps):
        gradients = [torch.randn(whole.shape, generator=generator) for whole in wholes]
        for params in made:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
                if isinstance(p, DTensor):
                    p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
        for optimizer in optimizers:
            optimizer.step()
    return optimizers


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated", "distributed"])
@pytest.mark.parametrize("placed", PLACEMENTS, ids=str)
@each_method
def test_dtensors_step_as_the_whole(method: str, placed: tuple[str, tuple[Placement, ...]], mode: str) -> None:
    whole, shared, unshared = walked(method, 3, placed, tp_mode=mode)
    within = 1e-4 if method == "adamuon" else 2e-6
    for p, *others in zip(*(each.param_groups[0]["params"] for each in (whole, shared, unshared)), strict=True):
        for q in others:
            torch.testing.assert_close(q.full_tensor().detach(), p.detach(), atol=within, rtol=within)
    _, replica_group = groups()
    if placed[0] == "unnamed" and isinstance(placed[1][0], Replicate):
        assert same_on_replicas(shared, replica_group)


@pytest.mark.parametrize("most", [2**30, 1], ids=["copies", "relayed"])
@pytest.mark.parametrize("placed", PLACEMENTS[:3], ids=str)
@each_method
def test_one_matrix_at_a_time_has_the_same_bits(
    method: str, placed: tuple[str, tuple[Placement, ...]], most: int
) -> None:
    """ "standard" takes one matrix at a time, so that any owner meets the same operations."""
    _, shared, unshared = walked(method, 2, placed, ns_algorithm="standard", max_bytes_in_flight=most)
    for p, q in zip(*(each.param_groups[0]["params"] for each in (shared, unshared)), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        for key, value in unshared.state[q].items():
            assert torch.equal(*(t.to_local() if isinstance(t, DTensor) else t for t in (value, shared.state[p][key])))


@needs_replicas
@pytest.mark.parametrize(("share", "most", "seen"), [(True, 2**30, 2), (True, 1000, 3), (False, 2**30, 2)])
def test_two_messages(share: bool, most: int, seen: int) -> None:
    """One all-to-all there, one back, and one between replicas where an owner's copies of O are beyond the cap."""
    params = [distributed(torch.randn(24, 16), "unnamed", (Replicate(), Shard(0))) for _ in range(4)]
    for p in params:  # the same on all ranks
        p.to_local().detach().fill_(1.0)
    optimizer = AdaptiveMuon(params, share_replicas=share, max_bytes_in_flight=most, **OPTIONS)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        counted = collectives(optimizer.step)
    assert counted == {"c10d::alltoall_base_": seen}


@needs_replicas
@each_method
def test_each_rank_does_a_quarter(method: str) -> None:
    """Counted by torch, with one all-to-all more than the sharded matrix alone costs: none."""
    work = []
    for placed in ((Replicate(), Shard(0)), None):
        wholes = [torch.randn(48, 40, generator=torch.Generator().manual_seed(i)) for i in range(24)]
        made = [nn.Parameter(whole) if placed is None else distributed(whole, "unnamed", placed) for whole in wholes]
        optimizer = AdaptiveMuon(made, moment2_method=method, **OPTIONS)
        for _ in range(2):
            for p in made:
                p.grad = torch.ones_like(p)
                local(p.grad)[..., 0] *= 3
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
        work.append(counter.get_total_flops())
    assert 0.2499 <= work[0] / work[1] <= 0.28


@needs_replicas
def test_replicas_of_shards_that_differ_are_told() -> None:
    whole = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    p = distributed(whole, "unnamed", (Replicate(), Shard(0)))
    with torch.no_grad():
        p.to_local()[0, 0] += float(dist.get_rank() == 3)
    optimizer = AdaptiveMuon([("w", p)], **OPTIONS)
    p.grad = torch.ones_like(p)
    before = p.to_local().detach().clone()
    with pytest.raises(ValueError, match=r"'w' differ on the ranks of a process group, got \[1, 3\]"):
        optimizer.step()
    assert torch.equal(before, p.to_local().detach())
    AdaptiveMuon([p], share_replicas=False, **OPTIONS).step()


# ------------------------------------------------------------------------------------ tensor parallelism, plain replicas


def of_tp(whole: torch.Tensor, dim: int) -> torch.Tensor:
    """The strip of this rank's place in its tensor-parallel group."""
    tp, _ = groups()
    return whole if whole.size(dim) == 1 else whole.tensor_split(tp.size(), dim)[tp.rank()]


def pairs() -> list[Pair]:
    """Matrices split by rows, by columns and not at all, a fused layer, and stacks."""
    generator, made = torch.Generator().manual_seed(0), []
    for shape, dim in [*((shape, dim) for shape in SHAPES for dim in (0, 1, -1)), ((5, 12, 20), 1), ((5, 12, 20), 2)]:
        whole = torch.randn(shape, generator=generator)
        cut: Callable[[torch.Tensor], torch.Tensor] = lambda t: t  # noqa: E731
        if dim != -1:
            cut = lambda t, dim=dim, least=2 + (dim == 2): t if t.ndim < least else of_tp(t, dim)  # noqa: E731
        pair = Pair(nn.Parameter(whole), nn.Parameter(cut(whole).clone()), cut)
        pair.piece.partition_dim = dim  # type: ignore[attr-defined]
        for p in (pair.whole, pair.piece):
            if len(shape) == 3:
                p.muon_stacked = True  # type: ignore[attr-defined]
            elif shape == (24, 64):
                p.muon_blocks = (2, 1, 1)  # type: ignore[attr-defined]
            elif shape == (64, 24):
                p.muon_blocks = ColumnBlocks((3, 1))  # type: ignore[attr-defined]
        made.append(pair)
    return made


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated", "distributed"])
@each_method
def test_strips_of_replicas(method: str, mode: str) -> None:
    tp, replicas = groups()
    made = pairs()
    seen = walk(made, same={"moment2_method": method}, tp_group=tp, replica_group=replicas, tp_mode=mode)
    assert not far_apart(seen, method)
    of_ranks = gathered([bits_of(pair.piece) for pair in made])
    for rank in dist.get_process_group_ranks(replicas):
        assert of_ranks[rank] == of_ranks[dist.get_rank()]


@needs_replicas
@pytest.mark.parametrize("blocks", [(3, 6), ColumnBlocks((3, 6))], ids=str)
def test_shards_without_a_row_of_the_first_block_are_not_the_same(blocks: Any, group: ProcessGroup) -> None:
    """Two ranks of a replica have equal, empty parts of it, and different shards of the parameter."""
    rank, dim = dist.get_rank(), int(isinstance(blocks, ColumnBlocks))
    whole = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    start, stop = [(0, 3), (3, 6), (6, 9), (0, 9)][rank]
    rectangle = (0, 9, start, stop) if dim else (start, stop, 0, 9)
    p, q = nn.Parameter(whole.narrow(dim, start, stop - start).clone()), nn.Parameter(whole.clone())
    p.muon_blocks = q.muon_blocks = blocks  # type: ignore[attr-defined]
    piece = ReplicaPiece(group, (9, 9), rectangle, replica=int(rank == 3), replicas=2)
    q.grad = whole.mT.contiguous()
    p.grad = q.grad.narrow(dim, start, stop - start).clone()
    AdaptiveMuon([p], layout_fn=lambda _: piece, **OPTIONS).step()
    AdaptiveMuon([q], **OPTIONS).step()
    torch.testing.assert_close(p.detach(), q.detach().narrow(dim, start, stop - start), atol=1e-4, rtol=1e-4)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("mode", ["layer_sharded", "blockwise"])
@each_method
def test_sharing_changes_no_bit(method: str, mode: str) -> None:
    """Also where each strip is a matrix of its own."""
    tp, replicas = groups()
    options = {**options_of(method), "tp_mode": mode, "ns_algorithm": "standard", "tp_group": tp}
    made = [[pair.piece for pair in pairs()] for _ in range(2)]
    shared, unshared = (
        AdaptiveMuon(params, replica_group=group, **options)
        for params, group in zip(made, (replicas, None), strict=True)
    )
    for step in range(2):
        for params in made:
            generator = torch.Generator().manual_seed(10 * step + tp.rank())
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
                if p.partition_dim == -1:  # whole, so the same on all ranks
                    p.grad.copy_(torch.linspace(-1, step + 2, p.numel()).view(p.shape).sin())
        shared.step()
        unshared.step()
    assert all(map(torch.equal, *made))


@needs_replicas
@pytest.mark.parametrize("mode", ["layer_sharded", "blockwise"])
def test_the_work_on_strips_is_shared(mode: str) -> None:
    tp, replicas = groups()
    work = []
    for group in (replicas, None):
        made = [nn.Parameter(torch.ones(24, 40)) for _ in range(24)]
        for p in made:
            p.partition_dim = 0  # type: ignore[attr-defined]
        optimizer = AdaptiveMuon(made, tp_group=tp, replica_group=group, tp_mode=mode, **OPTIONS)
        for _ in range(2):
            for p in made:
                p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(tp.rank()))
            with FlopCounterMode(display=False) as counter:
                optimizer.step()
        work.append(counter.get_total_flops())
    assert work[0] * 2 == work[1]


def test_padded_pieces_of_replicas() -> None:
    """As Megatron's GTP has: rectangles that layout_fn tells, with rows at the end that belong to no matrix."""
    tp, replicas = groups()
    whole = torch.randn(6 * tp.size() - 1, 5, generator=torch.Generator().manual_seed(1))
    top, last = 6 * tp.rank(), tp.rank() == tp.size() - 1
    strip = nn.functional.pad(whole[top : top + 6], (0, 0, 0, int(last)))
    piece = Piece(tp, tuple(whole.shape), (top, min(top + 6, len(whole)), 0, 5), padding=int(last))  # type: ignore[arg-type]
    p, q = nn.Parameter(whole.clone()), nn.Parameter(strip)
    one = AdaptiveMuon([p], **options_of("namo_d"))
    other = AdaptiveMuon([q], layout_fn=lambda _: piece, replica_group=replicas, **options_of("namo_d"))
    for step in range(3):
        p.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(step))
        q.grad = nn.functional.pad(p.grad[top : top + 6], (0, 0, 0, int(last)))
        one.step()
        other.step()
    torch.testing.assert_close(q[: 6 - int(last)], p[top : top + 6], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated", "distributed"])
def test_one_rank_of_a_replica_holds_all(mode: str) -> None:
    """Of pieces, as of the DTensors with one row above: the others must not take it for a whole matrix."""
    tp, replicas = groups()
    whole = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    rows = 6 if tp.rank() == tp.size() - 1 else 0
    p, q = nn.Parameter(whole.clone()), nn.Parameter(whole[:rows].clone())
    piece = Piece(tp, (6, 5), (0, rows, 0, 5))
    one = AdaptiveMuon([p], **options_of("namo"))
    other = AdaptiveMuon(
        [q],
        layout_fn=lambda _: piece,
        replica_group=replicas,
        tp_mode=mode,
        **options_of("namo"),  # type: ignore[arg-type]
    )
    for step in range(2):
        p.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(step))
        q.grad = p.grad[:rows].clone()
        one.step()
        other.step()
    torch.testing.assert_close(q, p[:rows], atol=1e-6, rtol=1e-5)


@pytest.mark.skipif("os.environ['WORLD_SIZE'] == '1'", reason="one process has no replicas")
def test_a_group_is_not_for_both(group: ProcessGroup) -> None:
    """Ranks with other shards are no replicas: said at construction."""
    p = nn.Parameter(torch.ones(4, 6))
    p.partition_dim = 0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="must have this rank in common only"):
        AdaptiveMuon([p], tp_group=group, replica_group=group, **OPTIONS)


@needs_replicas
def test_a_strip_for_one_replica_and_whole_for_the_other_is_told() -> None:
    tp, replicas = groups()
    p = nn.Parameter(torch.ones(4, 6))
    p.partition_dim = 0 if replicas.rank() else -1  # type: ignore[attr-defined]
    optimizer = AdaptiveMuon([p], tp_group=tp, replica_group=replicas, **OPTIONS)
    p.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match="parameters, in their order, and their shapes"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 6))


@needs_replicas
@pytest.mark.parametrize("plain", [False, True], ids=["DTensor", "plain"])
@pytest.mark.parametrize(
    ("option", "values"),
    [("nesterov", (True, False)), ("share_replicas", (True, False)), ("tp_mode", ("layer_sharded", "duplicated"))],
    ids=str,
)
def test_replicas_that_disagree_about_options_are_told(option: str, values: tuple[Any, Any], plain: bool) -> None:
    """Also about the option that says whether they exchange anything at all."""
    tp, replicas = groups()
    p = distributed(torch.ones(16, 24), "unnamed", (Replicate(), Shard(0)))
    options: dict[str, Any] = {**OPTIONS, option: values[dist.get_rank() == 3]}
    if plain:
        p = nn.Parameter(torch.ones(8, 24))
        p.partition_dim = 0  # type: ignore[attr-defined]
        options |= {"tp_group": tp, "replica_group": replicas}
    optimizer = AdaptiveMuon([p], **options)
    p.grad = torch.ones_like(p)
    with pytest.raises((ValueError, RuntimeError), match=option) as raised:
        optimizer.step()
    assert isinstance(raised.value, ValueError)
    assert torch.equal(p.to_local() if isinstance(p, DTensor) else p, torch.ones(8, 24))
