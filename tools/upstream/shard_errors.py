# SPDX-License-Identifier: Apache-2.0
"""Prints the table of PULL_REQUEST.md: how far the released AdaptiveMuon is from the whole matrix's path on shards.

torchrun --nproc_per_node 4 tools/upstream/shard_errors.py

Upstream's newton_schulz_tp orthogonalizes the shards as the whole matrix. Statistics and shape factors are those of
the released class. Gradients are noise of a size that differs by row and column, plus a constant in a quarter of both.
"""

from typing import Any

import torch
from torch import distributed as dist

from emerging_optimizers.orthogonalized_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz_tp


def moved(start: torch.Tensor, gradients: list[torch.Tensor], method: Any, dim: int | None = None) -> torch.Tensor:
    """Return how far these gradients move a matrix, or a shard of it."""
    p = torch.nn.Parameter(start.clone())
    options = {"moment2_method": method, "nesterov": True, "fp32_matmul_prec": "highest"}
    optimizer = AdaptiveMuon([p], lr=0.01, momentum=0.9, weight_decay=0.0, **options)
    if dim is not None:
        optimizer.scaled_orthogonalize_fn = lambda grad: newton_schulz_tp(grad, 5, "quintic", dist.group.WORLD, dim)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach() - start


def main() -> None:
    """Print a line for each shape, split and method."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    for rows, columns in ((512, 512), (512, 2048)):
        size = torch.logspace(-1, 1, rows)[:, None] * torch.logspace(-0.5, 0.5, columns)
        quarter = (torch.arange(rows) < rows // 4)[:, None] * (torch.arange(columns) < columns // 4)
        start, constant = torch.randn(rows, columns), torch.randn(rows, columns) * size * quarter
        gradients = [0.3 * torch.randn(rows, columns) * size + constant for _ in range(10)]
        for dim, split in enumerate(("rows", "columns")):
            shards = [matrix.chunk(ranks, dim)[rank].contiguous() for matrix in (start, *gradients)]
            for method in ("adamuon", "normuon", "namo"):
                whole = moved(start, gradients, method)
                square = (moved(shards[0], shards[1:], method, dim) - whole.chunk(ranks, dim)[rank]).square().sum()
                dist.all_reduce(square)
                if rank == 0:
                    print(f"{rows} x {columns} {ranks} ranks {split:8} {method:8} {square.sqrt() / whole.norm():.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
