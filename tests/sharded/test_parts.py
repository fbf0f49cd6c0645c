# SPDX-License-Identifier: Apache-2.0
"""Heads, gate and up projections, experts and convolutions of a sharded model: the same as in the whole one."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import full, local, mesh, set_gradients_of_both
from pieces import difference, options_of
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from emerging_optimizers.adaptive_muon import ColumnBlocks, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


class Attention(nn.Module):
    """Six heads of queries of four rows, which no number of ranks but two and one divides, and two of keys and values."""

    num_heads, num_key_value_heads, head_dim = 6, 2, 4

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, rows, bias=False) for rows in (24, 8, 8))
        self.o_proj = nn.Linear(24, 12, bias=False)


class Phi3MLP(nn.Module):
    """By its name, one of Hugging Face's."""

    __module__ = "transformers.models.phi3.modeling_phi3"

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(12, 2 * 9, bias=False), nn.Linear(9, 12, bias=False)


class Experts(nn.Module):
    """Five experts, which no number of ranks but one divides, stored as (in, out) or not."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        shapes = ((5, 6, 14), (5, 7, 6)) if transposed else ((5, 14, 6), (5, 6, 7))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.has_gate, self.is_concatenated, self.is_transposed = True, not transposed, transposed


class Model(nn.Module):
    """What heads, gates and up projections, experts and convolutions are found in."""

    def __init__(self) -> None:
        super().__init__()
        self.separate, self.fused, self.mlp = Attention(), nn.MultiheadAttention(12, 3, bias=False), Phi3MLP()
        self.experts, self.stored = Experts(transposed=False), Experts(transposed=True)
        self.conv, self.image = nn.Conv1d(5, 7, 3, bias=False), nn.Conv2d(3, 6, 2, bias=False)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6, bias=False)


def fsdp(model: Any) -> None:
    """Strips of rows, or some experts each; and each module has a class of torch's own then."""
    parts = (model.separate, model.fused, model.mlp, model.experts, model.stored, model.conv, model.image, model)
    for part in parts:
        fully_shard(part, mesh=mesh((dist.get_world_size(),), ("dp",)))


def experts_and_their_rows(model: Any) -> None:
    """Some experts each, and of these strips of rows or columns, as NeMo Automodel shards them."""
    size = dist.get_world_size()
    both = mesh((max(size // 2, 1), min(size, 2)), ("dp", "tp"))
    for experts in (model.experts, model.stored):
        for leaf, p in [*experts.named_parameters()]:
            sharded = distribute_tensor(p.detach(), both, [Shard(0), Shard(1)])
            experts.register_parameter(leaf, nn.Parameter(sharded))


def tensor_parallel_and_fsdp(model: Any) -> None:
    """Strips of rows of queries, of columns of the output projection, each in strips of rows."""
    size = dist.get_world_size()
    both = mesh((max(size // 2, 1), min(size, 2)), ("dp", "tp"))
    plan = {"separate.q_proj": ColwiseParallel(), "separate.o_proj": RowwiseParallel()}
    parallelize_module(model, both["tp"], plan)
    fully_shard(model, mesh=both["dp"])


WAYS = (fsdp, tensor_parallel_and_fsdp, experts_and_their_rows)


def optimizer_of(model: nn.Module, method: str) -> HybridAdaptiveMuon:
    switches = {"split_heads": True, "split_gate_up": True, "stacked_experts": True, "flatten_conv": True}
    return HybridAdaptiveMuon.from_model(model, **options_of(method), weight_decay=0.1, **switches)


def both(way: Callable[[nn.Module], None]) -> tuple[Model, Model, dict[nn.Parameter, torch.Tensor]]:
    """The same model whole and sharded, and the places of each shard's elements in the whole parameter."""
    torch.manual_seed(0)
    whole = Model()
    numbered, sharded = copy.deepcopy(whole), copy.deepcopy(whole)
    for p in numbered.parameters():
        p.data = torch.arange(p.numel(), dtype=p.dtype).view_as(p)
    way(numbered)
    way(sharded)
    pairs = zip(sharded.parameters(), numbered.parameters(), strict=True)
    return whole, sharded, {p: local(number).long() for p, number in pairs}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_whole(method: str, way: Callable[[nn.Module], None]) -> None:
    """Three steps on the same gradients; and the table says the same of both."""
    whole, sharded, places = both(way)
    pairs = list(zip(whole.parameters(), sharded.parameters(), strict=True))
    optimizers = [optimizer_of(model, method) for model in (whole, sharded)]
    assert optimizers[0].describe() == optimizers[1].describe()
    found = {name: getattr(p, "muon_parts", None) for name, p in sharded.named_parameters()}
    assert found == {
        "separate.q_proj.weight": (4,) * 6,
        "separate.k_proj.weight": (4,) * 2,
        "separate.v_proj.weight": (4,) * 2,
        "separate.o_proj.weight": ColumnBlocks((4,) * 6),
        "fused.in_proj_weight": (4,) * 9,
        "fused.out_proj.weight": ColumnBlocks((4,) * 3),
        "mlp.gate_up_proj.weight": (9, 9),
        "mlp.down_proj.weight": None,
        **{"experts.gate_up_proj": (7, 7), "experts.down_proj": None},
        **{"stored.gate_up_proj": (1, 1), "stored.down_proj": None},
        **dict.fromkeys(("conv.weight", "image.weight", "depthwise.weight")),
    }
    to_muon = {p for group in optimizers[1].param_groups if group["use_muon"] for p in group["params"]}
    assert to_muon == {p for name, p in sharded.named_parameters() if name != "depthwise.weight"}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        set_gradients_of_both(pairs, places, generator)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in pairs:
        assert difference(full(q), p.detach()) <= (1e-4 if method == "adamuon" else 1e-6)


@pytest.mark.skipif("CHECKPOINTS" not in os.environ, reason="needs a directory that outlives the run: CHECKPOINTS")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_goes_on_with_other_numbers_of_ranks(method: str, way: Callable[[nn.Module], None]) -> None:
    """Saved by four ranks after two steps, loaded by four, two and one, which take the third as a whole model does."""
    place = Path(os.environ["CHECKPOINTS"]) / f"parts-{method}-{way.__name__}"
    whole, sharded, places = both(way)
    pairs = list(zip(whole.parameters(), sharded.parameters(), strict=True))
    of_whole, optimizer = (optimizer_of(model, method) for model in (whole, sharded))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        set_gradients_of_both(pairs, places, generator)
        of_whole.step()
        if dist.get_world_size() == 4:
            optimizer.step()
    if dist.get_world_size() == 4:
        state = {"model": get_model_state_dict(sharded), "optimizer": get_optimizer_state_dict(sharded, optimizer)}
        dcp.save(state, checkpoint_id=place)
        dist.barrier()
    _, loaded, places = both(way)
    optimizer = optimizer_of(loaded, method)
    state = {"model": get_model_state_dict(loaded), "optimizer": get_optimizer_state_dict(loaded, optimizer)}
    dcp.load(state, checkpoint_id=place)
    set_model_state_dict(loaded, state["model"])
    set_optimizer_state_dict(loaded, optimizer, state["optimizer"])
    pairs = list(zip(whole.parameters(), loaded.parameters(), strict=True))
    set_gradients_of_both(pairs, places, generator)
    of_whole.step()
    optimizer.step()
    for p, q in pairs:
        assert difference(full(q), p.detach()) <= (1e-4 if method == "adamuon" else 1e-6)
