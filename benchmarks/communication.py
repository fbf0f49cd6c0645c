# SPDX-License-Identifier: Apache-2.0
"""What a step on tensor-parallel pieces sends: ``torchrun --nproc_per_node 4 benchmarks/communication.py``.

Every mode of ours, and Megatron-Core's two ways to orthogonalize, which are upstream's ``newton_schulz_tp`` for one
matrix after the other. These do nothing but orthogonalize; ours are whole steps, statistics of the whole matrices
included.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, by_turns, circumstances, ratio, save, table
from shapes import SETS
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz_tp
from emerging_optimizers.utils import fp32_matmul_precision


MODES = ("layer_sharded", "duplicated", "distributed")


class Traffic(TorchDispatchMode):
    """Counts the collectives of this rank, and the bytes it sends to others, in a ring where all take part."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            self.collectives[name] += 1
            self.bytes += self._sent(name, args)
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> float:
        size, rank = dist.get_world_size(), dist.get_rank()
        if name.startswith("allreduce"):
            return 2 * (size - 1) / size * sum(each.nbytes for each in args[0])
        if name.startswith("alltoall"):
            sent, splits = args[1], args[4]
            own = splits[rank] if splits else sent.size(0) // size
            return sent.nbytes * (1 - own / max(sent.size(0), 1))
        inputs = args[1] if isinstance(args[1], list) else [args[1]]  # an all-gather
        return (size - 1) * sum(each.nbytes for each in inputs)


def pieces(shapes: tuple[tuple[int, int], ...], device: torch.device) -> list[torch.Tensor]:
    """Returns this rank's strips of the matrices, of rows and of columns in turn, with gradients."""
    size, params = dist.get_world_size(), []
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    for index, shape in enumerate(shapes):
        dim = index % 2
        local = [length // size if d == dim else length for d, length in enumerate(shape)]
        p = torch.nn.Parameter(torch.randn(local, device=device, generator=generator))
        p.grad = torch.randn(local, device=device, generator=generator)
        p.partition_dim = dim  # type: ignore[attr-defined]
        params.append(p)
    return params


def contestants(
    params: list[torch.Tensor], modes: list[str], methods: list[str], precision: Any, algorithm: Any
) -> dict[str, Callable]:
    """Returns a step of every contestant, by name."""
    group = dist.group.WORLD
    steps: dict[str, Callable] = {}
    for mode in modes:
        for method in methods:
            optimizer = AdaptiveMuon(
                params,
                moment2_method=method,
                tp_group=group,
                tp_mode=mode,
                fp32_matmul_prec=precision,
                ns_algorithm=algorithm,
            )
            steps[f"{mode}, {method}"] = optimizer.step

    def theirs(mode: Any) -> None:
        with fp32_matmul_precision(precision):
            for p in params:
                newton_schulz_tp(p.grad, 5, "quintic", group, p.partition_dim, mode)

    return steps | {f"Megatron's {mode}": lambda mode=mode: theirs(mode) for mode in ("duplicated", "distributed")}


def main() -> None:
    """Measures, and on the first rank prints and writes."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="llama8b-layer" if cuda else "48x256")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["namo_d"])
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="medium")
    parser.add_argument("--algorithm", choices=["auto", "gram", "standard"], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", help="of the JSON file; communication-tp and the number of ranks if not given")
    parser.add_argument("--directory", type=Path, default=RESULTS)
    args = parser.parse_args()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(torch.get_num_threads() // dist.get_world_size(), 1))
    of = SETS[args.set]
    steps = contestants(pieces(of.shapes, device), args.modes, args.methods, args.precision, args.algorithm)
    counts = {}
    for name, step in steps.items():
        step()  # makes the state, and compares the ranks' settings
        with Traffic() as traffic:
            step()
        most = torch.tensor(traffic.bytes, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        counts[name] = {"collectives": dict(traffic.collectives), "bytes_of_busiest_rank": most.item()}
    seconds = by_turns(steps, args.rounds, device)
    if dist.get_rank() == 0:
        report(of.title, args, device, counts, seconds)
    dist.destroy_process_group()


def report(title: str, args: argparse.Namespace, device: torch.device, counts: dict, seconds: dict) -> None:
    """Prints a table and writes the JSON file."""
    base, rows, result = "Megatron's duplicated", [], {}
    for name, count in counts.items():
        against = ratio(seconds[name], seconds[base])
        result[name] = {**count, "ms": [1e3 * each for each in seconds[name]], "against": {base: against}}
        rows.append(
            (
                name,
                str(sum(count["collectives"].values())),
                f"{count['bytes_of_busiest_rank'] / 2**20:.4g}",
                f"{count['bytes_of_busiest_rank'] / counts[base]['bytes_of_busiest_rank']:.2f}",
                f"{1e3 * statistics.median(seconds[name]):.4g}",
                f"{against['median']:.2f}",
            )
        )
    ranks = dist.get_world_size()
    print(f"\n{title}, {ranks} ranks, {args.precision}, {args.algorithm}\n")
    print(table(("", "collectives", "MiB per rank", "x Megatron's duplicated", "ms", "x Megatron's duplicated"), rows))
    settings = {"set": args.set, "ranks": ranks, "precision": args.precision, "algorithm": args.algorithm}
    name = args.name or f"communication-tp{ranks}"
    result = {"machine": circumstances(device), "settings": settings, "contestants": result}
    print("\nwrote", save(name, result, args.directory))


if __name__ == "__main__":
    main()
