# SPDX-License-Identifier: Apache-2.0
"""A small model, the ways of torch to shard it, and its training on batches that are the same on all ranks."""

import copy
from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from emerging_optimizers.adaptive_muon import ColumnBlocks


class Model(nn.Module):
    """Layers whose rows divide evenly and do not, fewer rows than ranks, fused ones, and what AdamW takes."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.fused = nn.Linear(6, 2 * (5 + 2 + 1), bias=False)
        self.few = nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits of three classes for each token."""
        hidden = self.norm(self.down(torch.tanh(self.up(self.embed(tokens)))))
        logits: torch.Tensor = self.few(torch.tanh(self.fused(hidden)))
        return logits


@cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of all processes; made once, since each has process groups with threads and connections of their own."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def fsdp(model: nn.Module) -> None:
    """One dimension: every parameter in strips of rows."""
    dp = mesh((dist.get_world_size(),), ("dp",))
    fully_shard(model.up, mesh=dp)  # type: ignore[arg-type]
    fully_shard(model, mesh=dp)


def hsdp(model: nn.Module) -> None:
    """Two dimensions: replicas of strips of rows."""
    size = dist.get_world_size()
    fully_shard(model, mesh=mesh((max(size // 2, 1), min(size, 2)), ("replicate", "shard")))


def tensor_parallel(model: nn.Module) -> None:
    """One dimension: strips of rows in one layer, of columns in the next, and all of the rest."""
    parallelize_module(
        model, mesh((dist.get_world_size(),), ("tp",)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )


def tensor_parallel_and_fsdp(model: nn.Module) -> None:
    """Two dimensions, both of them sharding: rectangles, and strips of strips."""
    size = dist.get_world_size()
    both = mesh((max(size // 2, 1), min(size, 2)), ("dp", "tp"))
    parallelize_module(model, both["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=both["dp"])


WAYS: tuple[Callable[[nn.Module], None], ...] = (fsdp, hsdp, tensor_parallel, tensor_parallel_and_fsdp)


def models(
    way: Callable[[nn.Module], None], hidden: int = 12, dtype: torch.dtype = torch.float32
) -> tuple[Model, Model, dict[nn.Parameter, torch.Tensor]]:
    """The same model whole and sharded, and for each sharded parameter the places of its elements in the whole one.

    The places are read off a model that was sharded with its elements numbered: torch says who holds what.
    """
    torch.manual_seed(0)
    whole = Model(hidden)
    numbered = copy.deepcopy(whole)
    sharded = copy.deepcopy(whole.to(dtype))
    for p in numbered.parameters():
        p.data = torch.arange(p.numel(), dtype=p.dtype).view_as(p)
    try:
        way(numbered)
        way(sharded)
    except NotImplementedError as error:  # torch 2.6 has no uneven strips of strips
        pytest.skip(str(error))
    for p, number in zip(whole.parameters(), numbered.parameters(), strict=True):
        if not torch.equal(full(number).flatten(), torch.arange(p.numel(), dtype=number.dtype)):
            pytest.skip("torch 2.9 puts uneven strips of strips together in another order")
    places = {p: local(number).long() for p, number in zip(sharded.parameters(), numbered.parameters(), strict=True)}
    for model in (whole, sharded):
        model.fused.weight.muon_blocks = (5, 2, 1)  # type: ignore[assignment]
        model.down.weight.muon_blocks = ColumnBlocks((5, hidden - 8, 3))  # type: ignore[assignment]
    return whole, sharded, places


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a tensor."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, sharded or not."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def set_gradients_of_both(
    pairs: Iterable[tuple[nn.Parameter, nn.Parameter]],
    places: dict[nn.Parameter, torch.Tensor],
    generator: torch.Generator,
) -> None:
    """Random gradients for whole parameters, and for each one's sharded twin this rank's shard of them."""
    for p, q in pairs:
        p.grad, q.grad = torch.randn(p.shape, generator=generator).to(p.dtype), q.detach().clone()
        local(q.grad).copy_(p.grad.flatten()[places[q]])


def step_both(
    optimizers: Iterable[torch.optim.Optimizer],
    pairs: Iterable[tuple[nn.Parameter, nn.Parameter]],
    places: dict[nn.Parameter, torch.Tensor],
    steps: int,
) -> None:
    """Steps of the optimizers of whole parameters and of their sharded twins, on the same gradients."""
    optimizers, pairs, generator = [*optimizers], [*pairs], torch.Generator().manual_seed(0)
    for _ in range(steps):
        set_gradients_of_both(pairs, places, generator)
        for optimizer in optimizers:
            optimizer.step()


def require_trainable(model: nn.Module) -> None:
    """Skips a test that trains where torch cannot: FSDP2's forward and backward passes need a GPU in torch 2.6."""
    if isinstance(model, FSDPModule) and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of torch 2.6 does not train on a CPU")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """Trains on a batch of its own for each step, and returns the losses."""
    require_trainable(model)
    losses = []
    for step in steps:
        tokens = torch.randint(11, (16,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens), tokens % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(full(loss)))
    return losses
