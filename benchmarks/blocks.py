# SPDX-License-Identifier: Apache-2.0
"""What blocks of one size cost: a step of fused heads against one of a stack of as many matrices, by turns.

``python benchmarks/blocks.py`` steps whole parameters. ``torchrun --nproc_per_node 2 benchmarks/blocks.py`` splits them
over the ranks: the heads' fused parameter by rows or columns, and for each rank a stack, so that both have the same products at
their owners, and the same bytes to send.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import by_turns, circumstances, ratio, save, table
from torch import distributed as dist
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks


def parameter(shape: Sequence[int], **tags: Any) -> nn.Parameter:
    """A parameter, or this rank's shard of one, with a gradient."""
    p = nn.Parameter(torch.randn(*shape))
    p.grad = torch.randn(*shape)
    for name, value in tags.items():
        setattr(p, name, value)
    return p


def contestants(heads: int, rows: int, columns: int, group: dist.ProcessGroup | None) -> dict[str, list[nn.Parameter]]:
    """Heads in stacks, wide and tall ones, below one another, and side by side."""
    ranks = 1 if group is None else group.size()
    sizes, found = (rows,) * heads, {}
    for name, *shape in (("rows", rows, columns // ranks), ("columns", columns // ranks, rows)):
        split = {} if group is None else {"partition_dim": 2 if name == "rows" else 1}
        found[f"{name}, stack"] = [
            parameter((heads // ranks, *shape), muon_stacked=True, **split) for _ in range(ranks)
        ]
    for dim in (0,) if group is None else (0, 1):
        split, cut = ({}, "whole") if group is None else ({"partition_dim": dim}, f"split along {dim}")
        along = [1, 1]
        along[dim] = ranks
        below, beside = (
            (rows * heads // along[0], columns // along[1]),
            (columns // along[0], rows * heads // along[1]),
        )
        found[f"rows, {cut}"] = [parameter(below, muon_blocks=sizes, **split)]
        found[f"columns, {cut}"] = [parameter(beside, muon_blocks=ColumnBlocks(sizes), **split)]
    return found


def steps_of(
    params: dict[str, list[nn.Parameter]], group: dist.ProcessGroup | None, method: str
) -> dict[str, Callable[[], object]]:
    """A step of each contestant. All ranks begin and end it together."""
    steps: dict[str, Callable[[], object]] = {}
    for name, of in params.items():
        optimizer = AdaptiveMuon(of, lr=1e-3, moment2_method=method, tp_group=group)

        def step(optimizer: AdaptiveMuon = optimizer) -> None:
            optimizer.step()
            if group is not None:
                dist.barrier(group)

        steps[name] = step
    return steps


def main() -> None:
    """Measures, prints a table and saves what was measured."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--shape", type=int, nargs=3, default=(64, 128, 4096), metavar=("HEADS", "ROWS", "COLUMNS"))
    arguments.add_argument("--method", default="normuon")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--threads", type=int)
    options = arguments.parse_args()
    group = None
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    steps = steps_of(contestants(*options.shape, group), group, options.method)
    seconds = by_turns(steps, options.rounds, torch.device("cpu"))
    rows = {
        name: {
            "median_ms": 1e3 * statistics.median(each),
            "against_stack": ratio(each, seconds[f"{name.split(',')[0]}, stack"]),
        }
        for name, each in seconds.items()
    }
    if rank == 0:
        print(f"{options.method}, heads x rows x columns: {options.shape}, ranks: {ranks}")
        cells = [
            (
                name,
                f"{row['median_ms']:.0f}",
                *(f"{row['against_stack'][key]:.2f}" for key in ("median", "min", "max")),
            )
            for name, row in rows.items()
        ]
        print(table(("", "ms", "x stack", "least", "most"), cells))
        setting = {"shape": [*options.shape], "method": options.method, "ranks": ranks, "rounds": options.rounds}
        setting["load_average"] = os.getloadavg()[0]
        save(f"cpu-blocks-{ranks}", {**setting, **circumstances(torch.device("cpu")), "contestants": rows})
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
