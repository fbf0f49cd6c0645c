# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored (in, out), in pieces: each rank's piece is that of the whole, worked on as its transpose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import full
from models import mesh as mesh_of
from pieces import OPTIONS, difference, strip
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import fully_shard

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, Piece, Split
from emerging_optimizers.adaptive_muon.moment2 import METHODS


# As they are stored, and blocks of the transpose.
STORED: list[tuple[tuple[int, ...], Any]] = [((24, 40), None), ((40, 24), None), ((17, 30), None), ((24, 36), (8, 4))]
STORED += [((36, 24), ColumnBlocks((8, 4))), ((36, 20), ColumnBlocks((9,) * 4))]
MODES = ["layer_sharded", "duplicated", "distributed"]
# Of adamuon so large that rounding turns no element near zero to the other side.
EPS = {"adamuon": 1e-2, "normuon": 1e-8}


def walk(wholes: list[nn.Parameter], pieces: list[nn.Parameter], cut: Callable[..., torch.Tensor], **of_pieces: Any):
    """Optimizes whole matrices (out, in) and pieces of what is stored (in, out), and checks weights and state."""
    method = of_pieces.pop("moment2_method")
    options = {**OPTIONS, "weight_decay": 0.1, "moment2_method": method, "eps": EPS.get(method, 1e-8)}
    one, other = AdaptiveMuon(wholes, **options), AdaptiveMuon(pieces, **options, **of_pieces)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for whole, piece in zip(wholes, pieces, strict=True):
            whole.grad = torch.randn(whole.shape, generator=generator)
            piece.grad = cut(whole.grad, piece)
        one.step()
        other.step()
    within = 1e-4 if method == "adamuon" else 1e-5
    for whole, piece in zip(wholes, pieces, strict=True):
        assert difference(full(piece), full(cut(whole.detach(), piece))) <= within
        for key, value in one.state[whole].items():
            here = other.state[piece][key]
            vector = value.mT if value.ndim == 2 else value  # which every rank keeps whole
            expected = full(cut(value, piece)) if value.shape == whole.shape else vector
            assert difference(full(here), expected) <= within, key


def made(shape: tuple[int, ...], blocks: Any, seed: int) -> nn.Parameter:
    whole = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mT.contiguous())
    whole.muon_blocks = blocks  # type: ignore[attr-defined]
    return whole


@pytest.mark.parametrize("tell", ["partition_dim", "split", "piece"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_strips(method: str, mode: str, dim: int, tell: str, group: ProcessGroup) -> None:
    """Along either stored dimension, which is the other one of the matrix, however the optimizer is told."""
    wholes = [made(*each, seed) for seed, each in enumerate(STORED)]

    def cut(t: torch.Tensor, _: Any) -> torch.Tensor:
        return strip(t, 1 - dim).mT.clone()

    pieces, layouts = [], {}
    for whole in wholes:
        piece = nn.Parameter(cut(whole.detach(), None))
        piece.muon_transposed, piece.muon_blocks = True, whole.muon_blocks
        stored = whole.mT.shape
        starts = torch.arange(stored[dim]).tensor_split(group.size())[group.rank()]
        start, stop = (int(starts[0]), int(starts[-1]) + 1) if len(starts) else (0, 0)
        rectangle = (start, stop, 0, stored[1]) if dim == 0 else (0, stored[0], start, stop)
        layouts[piece] = Split(group, dim) if tell == "split" else Piece(group, tuple(stored), rectangle)
        if tell == "partition_dim":
            piece.partition_dim = dim
        pieces.append(piece)
    how = {"tp_group": group} if tell == "partition_dim" else {"layout_fn": layouts.__getitem__}
    walk(wholes, pieces, cut, moment2_method=method, tp_mode=mode, **how)


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated"])
@pytest.mark.parametrize("method", METHODS)
def test_fsdp2(method: str, mode: str, group: ProcessGroup) -> None:
    """Whose DTensors the momentum is sharded as."""
    wholes = [made(*each, seed) for seed, each in enumerate(STORED)]
    model = nn.ParameterList([nn.Parameter(whole.detach().mT.contiguous()) for whole in wholes])
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    pieces = [*model.parameters()]
    for piece, whole in zip(pieces, wholes, strict=True):
        piece.muon_transposed, piece.muon_blocks = True, whole.muon_blocks  # type: ignore[attr-defined]

    def cut(t: torch.Tensor, piece: Any) -> torch.Tensor:
        if t.shape != piece.shape[::-1]:
            return t.mT
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(t.mT.contiguous(), piece.device_mesh, piece.placements)

    walk(wholes, pieces, cut, moment2_method=method, tp_mode=mode)


def test_padding_is_refused(group: ProcessGroup) -> None:
    p = nn.Parameter(torch.ones(5, 3))
    p.muon_transposed = True  # type: ignore[attr-defined]
    size, rank = group.size(), group.rank()
    piece = Piece(group, (4 * size, 3), (4 * rank, 4 * rank + 4, 0, 3), padding=1)
    with pytest.raises(
        ValueError, match=r"muon_transposed must not be padded; the padding of parameter 'w' is, got 1"
    ):
        AdaptiveMuon([("w", p)], layout_fn=lambda _: piece)


@pytest.mark.parametrize("scale", [1e-6, 1e-12], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_the_gradients_does_not_matter(method: str, mode: str, scale: float, group: ProcessGroup) -> None:
    """Every mode divides by the same least norm, so that a clipped loss spike stalls no matrix in any."""

    def walked(scale: float) -> torch.Tensor:
        p = nn.Parameter(strip(torch.zeros(24, 40), 0).clone())
        p.partition_dim = 0  # type: ignore[attr-defined]
        options = {**OPTIONS, "moment2_method": method, "eps": EPS.get(method, 1e-30)}
        optimizer = AdaptiveMuon([p], weight_decay=0.0, tp_group=group, tp_mode=mode, **options)
        for step in range(3):
            grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step)) * scale
            p.grad = strip(grad, 0).clone()
            optimizer.step()
        return p.detach()

    assert difference(walked(scale), walked(1.0)) <= (1e-2 if method == "adamuon" else 1e-4)
