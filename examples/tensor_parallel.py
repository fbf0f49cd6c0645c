# SPDX-License-Identifier: Apache-2.0
"""Trains an MLP whose matrices are split over the processes, and the same MLP whole: how far apart do they come?

    torchrun --nproc_per_node 2 examples/tensor_parallel.py

On CUDA where every process has a device, else on the CPU. The model is in float64, so that what its own sums over the
ranks round does not hide what the optimizer does; the optimizer orthogonalizes in float32, as it always does.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args, override

import torch
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers.adaptive_muon import AdaptiveMuon, Moment2MethodT, TensorParallelModeT


ON_CUDA = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
INPUTS, HIDDEN, OUTPUTS = 40, 96, 24
NAMES = {"alltoall_base_": "all-to-all", "_allgather_base_": "all-gather", "allreduce_": "all-reduce"}


def normal(*shape: int, seed: int) -> torch.Tensor:
    """Random numbers, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to("cuda" if ON_CUDA else "cpu")


def whole(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """All of a matrix."""
    return matrix


def strip(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's strip of a matrix; the strips differ by a row or column where they must."""
    return matrix.tensor_split(dist.get_world_size(), dim)[dist.get_rank()]


class MLP(nn.Module):
    """Two linear layers: column-parallel (its weight is split by rows), then row-parallel (split by columns)."""

    def __init__(self, cut: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        super().__init__()
        self.split = cut is strip
        self.up = nn.Parameter(cut(normal(HIDDEN, INPUTS, seed=1) / INPUTS**0.5, 0).clone())
        self.down = nn.Parameter(cut(normal(OUTPUTS, HIDDEN, seed=2) / HIDDEN**0.5, 1).clone())
        if self.split:
            self.up.partition_dim, self.down.partition_dim = 0, 1  # all that the optimizer needs

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the outputs, of which every rank has the part that its hidden units make."""
        part = torch.tanh(x @ self.up.T) @ self.down.T
        if not self.split:
            return part
        total = part.detach().clone()
        dist.all_reduce(total)
        return part + (total - part.detach())  # the value of the total, the gradient of the part


class Traffic(TorchDispatchMode):
    """Counts the collectives, and the bytes this rank sends in them: in a sum or a gather, as one of a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.sent = 0.0

    @override
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d":
            ranks = dist.get_world_size()
            self.collectives[NAMES.get(name, name)] += 1
            if name == "alltoall_base_":
                kept = args[4][dist.get_rank()] * args[1].element_size()
                self.sent += args[1].nbytes - kept
            elif name == "_allgather_base_":
                self.sent += (ranks - 1) * args[1].nbytes
            elif name == "allreduce_":
                self.sent += 2 * (ranks - 1) / ranks * sum(tensor.nbytes for tensor in args[0])
        return function(*args, **(kwargs or {}))


def train(model: MLP, steps: int, **options: Any) -> Traffic:
    """Trains on random data, and returns the traffic of the last step; in the first, ranks also compare shapes."""
    optimizer = AdaptiveMuon(
        model.named_parameters(), lr=0.01, nesterov=True, fp32_matmul_prec="highest", extra_scale_factor=0.2, **options
    )
    teacher, traffic = normal(INPUTS, OUTPUTS, seed=3), Traffic()
    for step in range(steps):
        x = normal(128, INPUTS, seed=100 + step)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), torch.tanh(x @ teacher)).backward()
        traffic = Traffic()
        with traffic:
            optimizer.step()
    return traffic


@torch.no_grad()
def difference(model: MLP, expected: MLP) -> float:
    """Returns how far this rank's weights are from the whole MLP's, relative to its largest."""
    pairs = ((model.up, expected.up, 0), (model.down, expected.down, 1))
    return max((float((p - strip(q, dim)).abs().max() / q.abs().max()) for p, q, dim in pairs if p.numel()), default=0)


def main() -> None:
    """Trains with every method and mode, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    methods, modes = get_args(Moment2MethodT), get_args(TensorParallelModeT)
    parser.add_argument("--method", nargs="+", choices=methods, default=methods, help="default: all")
    parser.add_argument("--mode", nargs="+", choices=modes, default=modes, help="tp_mode; default: all")
    parser.add_argument("--steps", type=int, default=20, help="training steps, at least 2 (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.steps < 2 or "LOCAL_RANK" not in os.environ:
        parser.error(
            "needs at least 2 steps, and torchrun. Use torchrun --nproc_per_node 2 examples/tensor_parallel.py."
        )
    if ON_CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if ON_CUDA else "gloo")
    say: Callable[..., None] = print if dist.get_rank() == 0 else lambda *_: None

    say(f"{dist.get_world_size()} processes, {dist.get_backend()}, {arguments.steps} steps")
    say(f"{'method':8}  {'tp_mode':13}  {'difference':>10}  {'bytes sent':>10}  collectives of a step")
    for method in arguments.method:
        expected = MLP(whole)
        train(expected, arguments.steps, moment2_method=method, bias_correction=True)
        for mode in arguments.mode:
            model = MLP(strip)
            options = {"moment2_method": method, "bias_correction": True, "tp_mode": mode}
            traffic = train(model, arguments.steps, tp_group=dist.group.WORLD, **options)
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, (difference(model, expected), traffic.sent))
            differences, sent_by_rank = zip(*gathered, strict=True)
            apart, sent = max(differences), sum(sent_by_rank) / len(gathered)
            collectives = ", ".join(f"{count} {name}" for name, count in traffic.collectives.items()) or "none"
            say(f"{method:8}  {mode:13}  {apart:10.1e}  {sent:10,.0f}  {collectives}")
    say("\nDifference: of a weight from the whole MLP's, the largest, relative to the MLP's largest weight.")
    say("Bytes sent: by a rank in a step, on average. blockwise takes each shard for a matrix of its own.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
