# SPDX-License-Identifier: Apache-2.0
"""A matrix of which every rank holds a piece goes the way of the whole matrix."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mesh as mesh_of
from pieces import (
    OPTIONS,
    Recording,
    collectives,
    difference,
    far_apart,
    fused_layers,
    grid,
    options_of,
    set_gradients,
    strips,
    walk,
)
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon import AdaptiveMuon, Layout, Piece, Split
from emerging_optimizers.adaptive_muon.exchange import Shards
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.orthogonalize import batches


EXACT = ("layer_sharded", "duplicated")
# The paper's options where there are some.
SAME: dict[str, dict[str, Any]] = {
    method: {"moment2_method": method, "weight_decay": 0.1, "bias_correction": True} for method in METHODS
}
for _method in ("namo", "namo_d"):
    SAME[_method]["weight_decay_method"] = "adaptive"


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("method", METHODS)
def test_exact_modes(method: str, mode: str, group: ProcessGroup) -> None:
    assert not far_apart(walk(strips(), same=SAME[method], tp_group=group, tp_mode=mode), method)


@pytest.mark.parametrize("mode", EXACT)
def test_given_the_same_momentum_the_standard_iteration_gives_the_same_bits(mode: str, group: ProcessGroup) -> None:
    """The first momentum is a multiple of the gradient, and "standard" takes one matrix at a time.

    So that the whole matrices and the assembled ones meet the same operations, in the same shapes and strides.
    """
    same = {"ns_algorithm": "standard", "nesterov": False}
    seen = walk(strips(), 1, same, tp_group=group, tp_mode=mode)
    assert seen["O"] == seen["momentum_buffer"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_distributed_mode(method: str, group: ProcessGroup) -> None:
    """Sums of Gram matrices in another order, which the iteration magnifies by up to the product of its slopes."""
    assert not far_apart(walk(strips(), 2, SAME[method], tp_group=group, tp_mode="distributed"), method)


@pytest.mark.parametrize("mode", [*EXACT, "distributed", "blockwise"])
def test_a_rate_on_the_cpu_is_its_number(mode: str, group: ProcessGroup) -> None:
    """Also as a scheduler changes it in place."""
    weights = []
    for lr in (0.05, torch.tensor([0.05], dtype=torch.float64)):
        pairs = strips()
        options = {**options_of("namo_d"), **SAME["namo_d"], "lr": lr}
        optimizer = AdaptiveMuon([pair.piece for pair in pairs], **options, tp_group=group, tp_mode=mode)
        for step in range(2):
            set_gradients(pairs, step)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
        weights.append([pair.piece for pair in pairs])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


@pytest.mark.parametrize("mode", EXACT)
def test_the_iteration_in_bfloat16(mode: str, group: ProcessGroup) -> None:
    same = {"moment2_method": "namo_d", "fp32_matmul_prec": "medium"}
    assert not far_apart(walk(strips(), 2, same, tp_group=group, tp_mode=mode), "namo_d")


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("method", METHODS)
def test_mixed_dtypes(method: str, mode: str, group: ProcessGroup) -> None:
    """Side by side in one step; a bfloat16 weight can fall on the other side of a rounding."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    seen = walk(strips(dtypes=dtypes), same=SAME[method], tp_group=group, tp_mode=mode)
    assert seen.pop("W") <= 2**-7
    assert not far_apart(seen, method)


@pytest.mark.parametrize("mode", [*EXACT, "distributed"])
@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_stack_the_same_matrices(
    method: str, mode: str, group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pieces differ in size or in how they lie, a rank must not work on as a stack what another takes one by one.

    Their requests would come in another order, and messages of the right size would hold the wrong matrices.
    """
    torch.manual_seed(0)
    size = dist.get_world_size()
    monkeypatch.setattr(batches, "LIMITS", {"cpu": (5, 2**20)})
    pairs = strips([(5 * size + 1, 20)] * 3)  # the first rank has six rows of each, the others five
    seen = walk(pairs + fused_layers(3), 2, SAME[method], tp_group=group, tp_mode=mode)
    assert not far_apart(seen, method) if mode in EXACT else max(seen.values()) <= 1e-3, seen


@pytest.mark.parametrize("method", ["namo", "namo_d"])
def test_statistics_of_the_piece_would_be_far_off(
    method: str, group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would see if partial sums of squares were not added: what others do."""
    whole, me = Shards.whole, dist.get_rank()

    def of_owner_only(self: Shards, members: Any, arrived: Any) -> Any:
        arrived = [
            [shards, *(partial if rank == me else map(torch.zeros_like, partial))]
            for rank, (shards, *partial) in enumerate(arrived)
        ]
        return whole(self, members, arrived)

    monkeypatch.setattr(Shards, "whole", of_owner_only)
    seen = walk(strips(), same=SAME[method], tp_group=group)
    if dist.get_world_size() > 1:
        assert seen["W"] > 2e-3 and seen["moment2_buffer"] > 0.2, seen


@pytest.mark.parametrize("method", METHODS)
def test_blockwise_takes_pieces_for_matrices(method: str, group: ProcessGroup) -> None:
    """Every piece alone, with no word to the others after the first step: another result, by definition."""
    pairs = strips([(24, 64), (64, 24), (30, 17)])
    for pair in pairs:
        pair.whole = nn.Parameter(pair.piece.detach().clone())
        pair.cut = lambda tensor: tensor
    assert not far_apart(walk(pairs, same=SAME[method], tp_group=group, tp_mode="blockwise"), method)
    optimizer = AdaptiveMuon(
        [pair.piece for pair in pairs], tp_group=group, tp_mode="blockwise", moment2_method=method
    )
    optimizer.step()
    assert not collectives(optimizer.step)


def test_blockwise_pieces_of_one_shape_lie_apart(group: ProcessGroup) -> None:
    """Of blocks: what one rank holds of two matrices of one shape may be other rows, or have padding."""
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(rank)
    rows = 6 * size
    tops = [6 * rank, 6 * (size - 1 - rank), 6 * rank]
    last = rank == size - 1
    pieces = [Piece(group, (rows, 5), (top, top + 6, 0, 5)) for top in tops[:2]]
    pieces.append(Piece(group, (rows - 1, 5), (tops[2], tops[2] + 6 - last, 0, 5), padding=int(last)))
    blocks = [(4, rows - 4), (4, rows - 4), (4, rows - 5)]

    def stepped(together: bool) -> list[torch.Tensor]:
        torch.manual_seed(rank)
        params = [nn.Parameter(torch.randn(6, 5)) for _ in pieces]
        for p, each in zip(params, blocks, strict=True):
            p.grad, p.muon_blocks = torch.randn(6, 5), each  # type: ignore[attr-defined]
        layouts = dict(zip(params, pieces, strict=True))
        for some in [params] if together else [[p] for p in params]:
            AdaptiveMuon(some, layout_fn=layouts.get, tp_mode="blockwise", **options_of()).step()
        return params

    for p, q in zip(stepped(True), stepped(False), strict=True):
        assert not far_apart({"W": difference(p.detach(), q.detach())}, "adamuon")


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("method", METHODS)
def test_layout_fn_says_any_rectangles(method: str, mode: str, group: ProcessGroup) -> None:
    pairs, pieces = zip(*(grid(shape, group) for shape in [(31, 18), (18, 31), (32, 32)]), strict=True)
    layouts = {pair.piece: piece for pair, piece in zip(pairs, pieces, strict=True)}
    assert not far_apart(walk(list(pairs), same=SAME[method], layout_fn=layouts.get, tp_mode=mode), method)


def test_layout_fn_comes_before_partition_dim(group: ProcessGroup) -> None:
    """Also to say whole; and None leaves the usual rules."""
    pairs = strips([(24, 64)])
    said = {pairs[0].piece: Split(group, 0), pairs[1].piece: Split(group, 1), pairs[2].piece: Layout()}
    for pair in pairs:
        pair.piece.partition_dim = 0  # type: ignore[attr-defined]
    assert not far_apart(walk(pairs, layout_fn=said.get, tp_group=group), "adamuon")
    pairs = strips([(24, 64)])
    assert not far_apart(walk(pairs, layout_fn=lambda p: None, tp_group=group), "adamuon")


def test_distributed_mode_refuses_a_grid(group: ProcessGroup) -> None:
    pair, piece = grid((32, 32), group)
    optimizer = AdaptiveMuon([pair.piece], layout_fn=lambda p: piece, tp_mode="distributed")
    set_gradients([pair], 0)
    if dist.get_world_size() == 4:
        with pytest.raises(ValueError, match=r"must be split along one dimension.*layer_sharded"):
            optimizer.step()
        assert not optimizer.state
    else:
        optimizer.step()


@pytest.mark.parametrize("mode", EXACT)
def test_cap_on_what_is_in_flight(mode: str, group: ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """No message of a round is larger, and there are more rounds of the same, in stacks of other sizes."""
    cap, sizes = 3 * 64 * 24 * 4, []  # three of the larger matrices

    def watch(collective: Callable[..., Any]) -> Any:
        def watched(out: torch.Tensor, sent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(out.nbytes + sent.nbytes)
            return collective(out, sent, *args, **kwargs)

        return watched

    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    monkeypatch.setattr(dist, "all_to_all_single", watch(dist.all_to_all_single))
    monkeypatch.setattr(dist, "all_gather_single", watch(all_gather), raising=False)
    runs = []
    for most in (2**30, cap):
        pairs = strips()
        optimizer = Recording(
            [p.piece for p in pairs], tp_group=group, tp_mode=mode, max_bytes_in_flight=most, **options_of()
        )
        sizes.clear()
        for step in range(2):
            set_gradients(pairs, step)
            optimizer.step()
        runs.append(([p.piece.detach() for p in pairs], list(sizes)))
    seen = {"W": max(difference(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))}
    assert not far_apart(seen, "adamuon")
    if dist.get_world_size() > 1:
        assert max(runs[0][1]) > cap >= max(runs[1][1])
        assert len(runs[1][1]) > len(runs[0][1])


def test_every_matrix_is_orthogonalized_once(group: ProcessGroup) -> None:
    """And every rank has its share of the work."""
    count, size = 6, dist.get_world_size()
    pairs = strips([(24, 64)] * count)
    pairs = [pair for pair in pairs if pair.piece.partition_dim == 0]  # type: ignore[attr-defined]
    optimizer = AdaptiveMuon([p.piece for p in pairs], tp_group=group, **OPTIONS)
    orthogonalized = []
    plain = optimizer.scaled_orthogonalize_fn
    optimizer.scaled_orthogonalize_fn = lambda matrix: orthogonalized.append(matrix.shape) or plain(matrix)
    set_gradients(pairs, 0)
    optimizer.step()
    counts: list[Any] = [None] * size
    dist.all_gather_object(counts, len(orthogonalized))
    assert set(orthogonalized) <= {(24, 64)}
    assert sum(counts) == count and max(counts) - min(counts) <= 1


def test_gradients_of_others_may_come_and_go_on_some_ranks(group: ProcessGroup) -> None:
    """Of a rank's own matrices, and of those that another group holds: as experts without tokens."""
    size = dist.get_world_size()
    mesh = mesh_of((size // 2, 2) if size > 1 else (1, 1), ("dense", "experts"))
    dense, experts = strips([(24, 10)])[0], nn.Parameter(torch.randn(6, 5))
    own = nn.Parameter(torch.randn(4, 3))
    groups = {dense.piece: group, experts: mesh.get_group("experts")}
    optimizer = AdaptiveMuon(
        [dense.piece, experts, own],
        layout_fn=lambda p: Split(groups[p], 0) if p in groups else Layout(),
        moment2_method="namo",
        **OPTIONS,
    )
    whole = AdaptiveMuon([dense.whole], moment2_method="namo", **OPTIONS)
    first_group, first_rank = dist.get_rank() < 2, dist.get_rank() == 0
    for step, (has_experts, has_own) in enumerate(
        [(True, True), (not first_group, True), (True, not first_rank), (first_group, first_rank), (True, True)]
    ):
        set_gradients([dense], step)
        experts.grad = torch.randn(6, 5) if has_experts else None
        own.grad = torch.randn(4, 3) if has_own else None
        before = [experts.detach().clone(), own.detach().clone()]
        optimizer.step()
        whole.step()
        moved = [not torch.equal(p, q) for p, q in zip((experts, own), before, strict=True)]
        assert moved == [has_experts, has_own]
    assert difference(dense.piece.detach(), dense.cut(dense.whole.detach())) <= 1e-6

    # A parameter that is added and has no gradient on any rank yet is no reason to ask later, on one rank alone.
    frozen = nn.Parameter(torch.randn(3, 4))
    groups[frozen] = group
    optimizer.add_param_group({"params": [frozen]})
    for has_own in (True, not first_rank, True):
        own.grad = torch.randn(4, 3) if has_own else None
        optimizer.step()
    frozen.grad = torch.randn(3, 4)
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    of_copy = copied.param_groups[0]["params"][0]
    of_copy.grad = None if first_rank else torch.ones_like(of_copy)
    if size > 1:
        with pytest.raises(ValueError, match="has no gradient on rank 0"):
            copied.step()


def test_another_shape_is_another_plan(group: ProcessGroup) -> None:
    """A parameter may be given other data between steps; its state is then the user's to renew."""
    pairs = strips([(24, 64), (30, 17)])
    optimizer = AdaptiveMuon([p.piece for p in pairs], tp_group=group, **options_of())
    for shapes in ([(24, 64), (30, 17)], [(16, 8), (30, 17)]):
        for pair, other in zip(pairs, strips(shapes), strict=True):
            pair.whole, pair.piece.data = other.whole, other.piece.data
        optimizer.state.clear()
        set_gradients(pairs, 0)
        optimizer.step()
        whole = AdaptiveMuon([p.whole for p in pairs], **options_of())
        whole.step()
        assert not far_apart({"W": max(difference(p.piece, p.cut(p.whole)) for p in pairs)}, "adamuon")


def test_matrices_beyond_the_cap(group: ProcessGroup) -> None:
    assert not far_apart(walk(strips(), 2, max_bytes_in_flight=1, tp_group=group), "adamuon")


def test_fewer_matrices_than_ranks(group: ProcessGroup) -> None:
    assert not far_apart(walk(strips([(24, 64)])[:1], tp_group=group), "adamuon")


def test_gradients_that_come_and_go(group: ProcessGroup) -> None:
    """A step takes the matrices that have a gradient, and a new plan where these change."""
    pairs, other = strips([(24, 64), (30, 17)]), strips([(24, 64), (30, 17)])
    optimizers = [AdaptiveMuon([p.piece for p in each], tp_group=group, **OPTIONS) for each in (pairs, other)]
    for step in range(4):
        for each, optimizer in zip((pairs, other), optimizers, strict=True):
            set_gradients(each, step)
            kept = each if each is other else each[step % 2 :: 2]
            for pair in each:
                pair.piece.grad = pair.piece.grad if pair in kept else None
            optimizer.step()
    assert {int(optimizers[0].state[p.piece]["momentum_buffer"].any()) for p in pairs if p.piece.numel()} == {1}
    assert walk(pairs, 1, tp_group=group)  # and the pieces still fit together


def test_lr_of_zero_asks_the_whole_matrix(group: ProcessGroup) -> None:
    """A gradient that is zero in one rank's piece only is no reason for that rank to stand aside."""
    pairs = strips([(24, 64)])
    set_gradients(pairs, 0)
    for pair in pairs:
        pair.whole.grad[: 24 // dist.get_world_size()] = 0  # type: ignore[index]
        pair.whole.grad[:, : 64 // dist.get_world_size()] = 0  # type: ignore[index]
        pair.piece.grad = pair.cut(pair.whole.grad).clone()  # type: ignore[arg-type]
    optimizer = AdaptiveMuon([p.piece for p in pairs], tp_group=group, **{**OPTIONS, "lr": 0.0})
    optimizer.step()
    assert all(torch.equal(p.piece, p.cut(p.whole)) for p in pairs)
    buffers = [optimizer.state[p.piece]["momentum_buffer"] for p in pairs]
    assert all(torch.equal(b, 0.05 * p.piece.grad) for b, p in zip(buffers, pairs, strict=True))  # type: ignore[operator]
    assert dist.get_world_size() == 1 or any(buffer.any() for buffer in buffers) or dist.get_rank() == 0
    for pair in pairs:
        pair.piece.grad.zero_()  # type: ignore[union-attr]
    made = AdaptiveMuon([p.piece for p in pairs], tp_group=group, **{**OPTIONS, "lr": 0.0}, bias_correction=True)
    made.step()  # as torch.distributed.checkpoint does to make the state
    assert not any(value.any() for p in pairs for value in made.state[p.piece].values())


def test_copies_share_the_group(group: ProcessGroup) -> None:
    pairs = strips([(24, 64)])
    optimizer = AdaptiveMuon([p.piece for p in pairs], tp_group=group, **OPTIONS)
    set_gradients(pairs, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    set_gradients(pairs, 1)
    copies = [p for g in twin.param_groups for p in g["params"]]
    for pair, q in zip(pairs, copies, strict=True):
        q.grad = pair.piece.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    twin.step()
    assert all(torch.equal(p.piece, q) for p, q in zip(pairs, copies, strict=True))
