# SPDX-License-Identifier: Apache-2.0
"""Whole matrices, their pieces, and the comparison of what two optimizers made of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist

from emerging_optimizers.adaptive_muon import AdaptiveMuon


# Wide, tall, square, tall as a whole but wide in four strips of rows, the reverse, pieces that differ in size, and
# more ranks than rows or columns.
SHAPES = [(24, 64), (64, 24), (32, 32), (48, 40), (40, 48), (30, 17), (3, 18), (18, 3)]
OPTIONS: dict[str, Any] = {"lr": 0.05, "fp32_matmul_prec": "highest", "nesterov": True, "extra_scale_factor": 0.2}


class Recording(AdaptiveMuon):
    """Keeps the last orthogonalized momentum of every matrix."""

    async def _adapted(self, p: torch.Tensor, matrix: Any, *args: Any) -> Any:
        D, O = await super()._adapted(p, matrix, *args)
        self.__dict__.setdefault("orthogonalized", {})[p, matrix.block] = O.clone()
        return D, O


def cut(whole: torch.Tensor, dim: int, rank: int | None = None, size: int | None = None) -> torch.Tensor:
    """A rank's strip of a tensor, by torch's own rule; all of it where dim is -1."""
    if dim == -1:
        return whole
    size, rank = size or dist.get_world_size(), dist.get_rank() if rank is None else rank
    return whole.tensor_split(size, dim)[rank]


def pieces(
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter, int]]:
    """Whole matrices, this rank's pieces of them, and the dimension they are split along, or -1."""
    generator = torch.Generator().manual_seed(0)
    for index, (shape, dim) in enumerate((shape, dim) for shape in SHAPES for dim in (0, 1, -1)):
        whole = torch.randn(shape, generator=generator).to(dtypes[index % len(dtypes)])
        piece = torch.nn.Parameter(cut(whole, dim).clone())
        piece.partition_dim = dim  # type: ignore[attr-defined]
        yield torch.nn.Parameter(whole), piece, dim


def set_gradients(triples: list[tuple[torch.nn.Parameter, torch.nn.Parameter, int]], step: int) -> None:
    """Random gradients for the whole matrices, and the pieces of them for the pieces: of low rank, some columns large."""
    generator = torch.Generator().manual_seed(100 + step)
    for whole, piece, dim in triples:
        rows, columns = whole.shape
        grad = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
        grad += 0.1 * torch.randn(rows, columns, generator=generator)
        grad *= torch.linspace(0.1, 3, columns)
        whole.grad = grad.to(whole.dtype)
        piece.grad = cut(whole.grad, dim).clone()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest element; 0 where there are none."""
    assert one.shape == other.shape, (one.shape, other.shape)
    if other.numel() == 0:
        return 0.0
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30))
