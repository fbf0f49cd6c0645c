# SPDX-License-Identifier: Apache-2.0
"""How far AdaptiveMuon, as released, is from the whole matrix's path on strips: the table of PULL_REQUEST.md.

torchrun --nproc_per_node 4 tools/upstream/strip_errors.py

Strips are orthogonalized by upstream's newton_schulz_tp, which gives the whole matrix's; statistics and shape factors
are the released class's own. Gradients are noise whose size differs by row and column, and in a quarter of the rows
and columns a constant part.
"""

from typing import Any, override

import torch
from torch import distributed as dist

from emerging_optimizers.orthogonalized_optimizers import muon_utils
from emerging_optimizers.orthogonalized_optimizers.adaptive_muon import AdaptiveMuon


class OrthogonalizedWhole(AdaptiveMuon):
    """The released class, with strips orthogonalized as the whole matrix."""

    @override
    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        dim = getattr(p, "partition_dim", None)
        if dim is None:
            return super().orthogonalize(p, grad, **kwargs)
        return muon_utils.newton_schulz_tp(grad, 5, "quintic", dist.group.WORLD, dim, "duplicated")


def moved(start: torch.Tensor, gradients: list[torch.Tensor], method: Any, dim: int | None = None) -> torch.Tensor:
    """Returns where a matrix, or a strip of it, has gone after these gradients."""
    p = torch.nn.Parameter(start.clone())
    if dim is not None:
        p.partition_dim = dim
    options = {"moment2_method": method, "nesterov": True, "fp32_matmul_prec": "highest"}
    optimizer = OrthogonalizedWhole([p], lr=0.01, momentum=0.9, weight_decay=0.0, **options)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach() - start


def main() -> None:
    """Prints a line for each shape, split and method."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    for rows, columns in ((512, 512), (512, 2048)):
        size = torch.logspace(-1, 1, rows)[:, None] * torch.logspace(-0.5, 0.5, columns)
        some = (torch.arange(rows) < rows // 4)[:, None] * (torch.arange(columns) < columns // 4)
        start, constant = torch.randn(rows, columns), torch.randn(rows, columns) * size * some
        gradients = [0.3 * torch.randn(rows, columns) * size + constant for _ in range(10)]
        for dim in (0, 1):
            for method in ("adamuon", "normuon", "namo"):
                whole = moved(start, gradients, method)
                strips = [each.chunk(ranks, dim)[rank].contiguous() for each in (start, *gradients)]
                off = moved(strips[0], strips[1:], method, dim) - whole.chunk(ranks, dim)[rank]
                square = off.square().sum()
                dist.all_reduce(square)
                if rank == 0:
                    split = "rows" if dim == 0 else "columns"
                    print(
                        f"{rows} x {columns}, {ranks} ranks, {split:8} {method:8} {square.sqrt() / whole.norm():.2f}"
                    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
