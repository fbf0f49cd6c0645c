# SPDX-License-Identifier: Apache-2.0
"""What the optimizer shows of matrices in shards, blocks, stacks and replicas is what it shows of the whole ones."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import WAYS, hsdp, local, mesh, models, set_gradients_of_both
from pieces import Pair, collectives, fused_layers, grid, options_of, set_gradients, stack, strips
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


Readings = dict[str, dict[str, float]]

each_method = pytest.mark.parametrize("method", METHODS)
each_mode = pytest.mark.parametrize("mode", ["layer_sharded", "duplicated", "distributed"])

# What rounding explains: of D of "adamuon", which divides by the smallest elements of O, more than of the rest.
TOLERANCE = 1e-3
OF_ESTIMATE = 0.5  # where a square matrix is measured along its other side


def assert_same(shown: Readings, expected: Readings, square: frozenset[str] = frozenset()) -> None:
    """Checks the values of matrices; those of square ones may be estimated along another side."""
    assert shown.keys() == expected.keys()
    for name, row in expected.items():
        assert shown[name].keys() == row.keys()
        for value, one in row.items():
            rtol = OF_ESTIMATE if value == "orthogonality_error" and name in square else TOLERANCE
            assert math.isclose(shown[name][value], one, rel_tol=rtol), (name, value, shown[name][value], one)


def walked(pairs: Sequence[Pair], method: str, steps: int = 4, every: int = 1, **of_pieces: Any) -> list[Readings]:
    """Steps of whole matrices and of their shards, whose readings must be those of the whole ones in the same step.

    Returns the readings of the shards after each step.
    """
    options = {**options_of(method), "diagnostics_every": every, "bias_correction": True}
    whole = AdaptiveMuon([pair.whole for pair in pairs], **options)
    pieces = AdaptiveMuon([pair.piece for pair in pairs], **options, **of_pieces)
    square = frozenset(f"0.{i}" for i, pair in enumerate(pairs) if pair.whole.size(-1) == pair.whole.size(-2))
    at: dict[float, Readings] = {}
    history = []
    for number in range(steps):
        set_gradients([*pairs], number)
        whole.step()
        pieces.step()
        for name, row in whole.diagnostics().items():
            at.setdefault(row["step"], {})[name] = row
        if number % dist.get_world_size() == dist.get_rank() or number == steps - 1:  # any rank may read alone
            shown = pieces.diagnostics()
            assert_same(shown, {name: at[row["step"]][name] for name, row in shown.items()}, square)
            history.append(shown)
    return history


@each_mode
@each_method
def test_strips(method: str, mode: str, group: ProcessGroup) -> None:
    """By rows, by columns and whole; of other sizes on other ranks, and empty on some."""
    pairs = strips()
    last = walked(pairs, method, tp_group=group, tp_mode=mode)[-1]
    late = dist.get_world_size() > 1 and (method == "adamuon" or (mode == "distributed" and method != "normuon"))
    for index, pair in enumerate(pairs):
        splits = getattr(pair.piece, "partition_dim", -1) != -1
        assert last[f"0.{index}"]["step"] == (3 if late and splits else 4)


@each_mode
@each_method
def test_blocks_and_stacks(method: str, mode: str, group: ProcessGroup) -> None:
    pairs = fused_layers(2) + [stack(dim) for dim in (1, 2)]
    last = walked(pairs, method, tp_group=group, tp_mode=mode)[-1]
    assert {"0.0[0]", "0.1[2]", "0.2[expert 0]", "0.3[expert 4]"} <= last.keys()


@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated"])
@each_method
def test_rectangles(method: str, mode: str, group: ProcessGroup) -> None:
    pairs, shards = zip(*(grid(shape, group) for shape in [(31, 18), (18, 31)]), strict=True)
    layouts = {pair.piece: shard for pair, shard in zip(pairs, shards, strict=True)}
    walked(pairs, method, layout_fn=layouts.get, tp_mode=mode)


@pytest.mark.parametrize("rounds", [1, 2**30])
@each_method
def test_rounds_and_16_bit(method: str, rounds: int, group: ProcessGroup) -> None:
    """Many rounds of few bytes; parameters in bfloat16."""
    pairs = strips([(24, 64), (64, 24)], dtypes=(torch.float32, torch.bfloat16))
    for pair in pairs:  # whose weights would round apart
        pair.piece.data = pair.piece.data.float()
        pair.whole.data = pair.whole.data.float()
    walked(pairs, method, tp_group=group, max_bytes_in_flight=rounds)


@each_mode
@each_method
def test_every_third_step(method: str, mode: str, group: ProcessGroup) -> None:
    """What shards find out is there one step later."""
    pairs = strips([(24, 64), (30, 17)])
    last = walked(pairs, method, 5, 3, tp_group=group, tp_mode=mode)[-1]
    assert {row["step"] for row in last.values()} == {3}
    last = walked(pairs, method, 6, 3, tp_group=group, tp_mode=mode)[-1]
    assert {row["step"] for row in last.values()} <= {3, 6}


class Recorded(TorchDispatchMode):
    """Keeps what torch does, and the sizes of what it does it to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func._schema.name, [tuple(each.shape) for each in args if isinstance(each, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


@each_mode
def test_other_steps_do_nothing_for_it(mode: str, group: ProcessGroup) -> None:
    """Every third step measures, and the one after it carries what shards alone knew: not even a byte in the others."""
    seen = []
    for options in ({}, {"diagnostics_every": 3}):
        pairs = strips([(24, 64), (30, 17)])
        optimizer = AdaptiveMuon([pair.piece for pair in pairs], tp_group=group, tp_mode=mode, **options)
        of_steps = []
        for number in range(6):
            set_gradients(pairs, number)
            with Recorded() as mode_of_torch:
                optimizer.step()
            of_steps.append(mode_of_torch.seen)
        seen.append(of_steps)
    # In the first step ranks also compare the options themselves.
    differs = [one != other for one, other in zip(*seen, strict=True)][1:]
    carries = dist.get_world_size() > 1  # adamuon, by default
    assert differs == [False, True, carries, False, True]


@each_mode
@each_method
def test_no_further_collective(method: str, mode: str, group: ProcessGroup) -> None:
    pairs = strips([(24, 64), (64, 24), (30, 17)]) + fused_layers(2) + [stack(1), stack(2)]
    seen = []
    for options in ({}, {"diagnostics_every": 1}, {"diagnostics_every": 2}):
        optimizer = AdaptiveMuon(
            [pair.piece for pair in pairs], moment2_method=method, tp_group=group, tp_mode=mode, **options
        )
        of_steps = []
        for number in range(4):
            set_gradients(pairs, number)
            of_steps.append(collectives(optimizer.step))
        seen.append(of_steps)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("way", WAYS)
@each_method
def test_dtensors(method: str, way: Callable[[nn.Module], None]) -> None:
    """FSDP2, replicas of its shards, tensor parallelism, and both."""
    whole, sharded, places = models(way)
    options = {**options_of(method), "diagnostics_every": 1}
    one, other = (
        HybridAdaptiveMuon.from_model(model, params=model.named_parameters(), **options) for model in (whole, sharded)
    )
    generator, at = torch.Generator().manual_seed(0), []
    for _ in range(3):
        set_gradients_of_both(zip(whole.parameters(), sharded.parameters(), strict=True), places, generator)
        one.step()
        other.step()
        at.append(one.diagnostics())
    shown = other.diagnostics()
    assert_same(shown, {name: at[int(row["step"]) - 1][name] for name, row in shown.items()})
    assert {"up.weight", "fused.weight[0]", "fused.weight[2]"} <= shown.keys()


@each_method
def test_replicas(method: str, group: ProcessGroup) -> None:
    """Whole matrices and stacks on every rank, each of which orthogonalizes some."""
    pairs = strips([(24, 64), (64, 24), (30, 17)])[2::3]
    last = walked(pairs, method, replica_group=group)[-1]
    assert {row["step"] for row in last.values()} == {4}


def test_shards_that_are_matrices_have_names_of_their_own(group: ProcessGroup) -> None:
    pairs, rank = strips([(24, 64)]), dist.get_rank()
    optimizer = AdaptiveMuon([p.piece for p in pairs], tp_group=group, tp_mode="blockwise", diagnostics_every=1)
    set_gradients(pairs, 0)
    optimizer.step()
    suffix = f" (shard of rank {rank})" if dist.get_world_size() > 1 else ""
    assert [*optimizer.diagnostics()] == [f"0.0{suffix}", f"0.1{suffix}", "0.2"]


def test_experts_of_a_dtensor_keep_their_numbers() -> None:
    dp = mesh((dist.get_world_size(),), ("dp",))
    p = nn.Parameter(distribute_tensor(torch.randn(5, 6, 7), dp, [Shard(0)]))
    p.muon_stacked = True  # type: ignore[attr-defined]
    optimizer = AdaptiveMuon([("experts", p)], diagnostics_every=1)
    p.grad = distribute_tensor(torch.randn(5, 6, 7), dp, [Shard(0)])
    optimizer.step()
    first = {4: [0, 2, 4, 5], 2: [0, 3], 1: [0]}[dist.get_world_size()][dist.get_rank()]
    assert [*optimizer.diagnostics()] == [f"experts[expert {first + i}]" for i in range(local(p).size(0))]


@each_mode
@each_method
def test_gradients_that_come_and_go(method: str, mode: str, group: ProcessGroup) -> None:
    """On all ranks at once: readings of other batches than before, and some that wait for their shards' part."""
    pairs = strips([(24, 64)] * 3)[::3]
    options = {**options_of(method), "diagnostics_every": 1}
    whole = AdaptiveMuon([pair.whole for pair in pairs], **options)
    pieces = AdaptiveMuon([pair.piece for pair in pairs], **options, tp_group=group, tp_mode=mode)
    at: dict[tuple[str, float], dict[str, float]] = {}
    for number, missing in enumerate([1, None, None, 0, 1, None, None]):
        set_gradients(pairs, number)
        if missing is not None:
            pairs[missing].whole.grad = pairs[missing].piece.grad = None
        whole.step()
        pieces.step()
        at.update({(name, row["step"]): row for name, row in whole.diagnostics().items()})
        shown = pieces.diagnostics()
        assert_same(shown, {name: at[name, row["step"]] for name, row in shown.items()})
    assert {row["step"] for row in shown.values()} <= {6, 7}


def test_replicas_of_shards_read_alone() -> None:
    """A rank that reads waits for no other."""
    _, sharded, _ = models(hsdp)
    optimizer = HybridAdaptiveMuon.from_model(sharded, diagnostics_every=1, moment2_method="namo")
    for _ in range(3):
        for p in sharded.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
        if dist.get_rank() == 0:
            assert optimizer.diagnostics() and optimizer.diagnostics_summary() and optimizer.report()
    optimizer.diagnostics()
