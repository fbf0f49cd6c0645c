# SPDX-License-Identifier: Apache-2.0
"""Trains under DistributedDataParallel, every replica doing all of the optimizer's work and then its share of it.

torchrun --nproc_per_node 2 examples/replicas.py
"""

import argparse
import statistics
import time

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


def train(steps: int, width: int, share: bool) -> tuple[nn.Module, float, int]:
    """Returns the model, the median milliseconds of the optimizer's step, and its operations on this replica."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(2)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = HybridAdaptiveMuon.from_model(model, lr=5e-3, moment2_method="namo_d", share_replicas=share)
    milliseconds, generator = [], torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        loss = model(torch.randn(4, 16, width, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return model, statistics.median(milliseconds[1:]), counter.get_total_flops()


def main() -> None:
    """Prints both beside each other, and how far apart the weights are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    found = [train(args.steps, args.width, share) for share in (False, True)]
    if dist.get_rank() == 0:
        for name, (_, milliseconds, flops) in zip(("each does all", "shared"), found, strict=True):
            print(f"{name:14} {milliseconds:8.1f} ms per step  {flops / 1e9:8.3f} GFLOP per replica")
        (alone, *_), (shared, *_) = found
        pairs = zip(alone.parameters(), shared.parameters(), strict=True)
        print("largest difference of a weight:", max((p - q).detach().abs().max().item() for p, q in pairs))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
