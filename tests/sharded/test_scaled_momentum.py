# SPDX-License-Identifier: Apache-2.0
"""Methods that scale M' before it is orthogonalized: the scale comes from the whole matrix, whoever has it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from models import WAYS, full, models, step_both
from pieces import Pair, difference, far_apart, fused_layers, grid, options_of, stack, strips, walk
from scaled_momentum import SCALED, registered
from torch import nn
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.exchange import Shards


EXACT = ("layer_sharded", "duplicated")
SHAPES = [(24, 64), (64, 24), (30, 17), (3, 18)]

each_method = pytest.mark.parametrize("method", SCALED)


@pytest.fixture(autouse=True)
def methods() -> Iterator[None]:
    with registered():
        yield


def options(method: str) -> dict[str, Any]:
    return {"moment2_method": method, "weight_decay": 0.1, "eps": 1e-3}


def sharded(form: str) -> Sequence[Pair]:
    """Rows and columns, the blocks of fused matrices, or stacks of experts."""
    return {"strips": strips(SHAPES), "blocks": fused_layers(2), "stacks": [stack(dim) for dim in (0, 1, 2)]}[form]


@pytest.mark.parametrize("mode", [*EXACT, "distributed"])
@pytest.mark.parametrize("form", ["strips", "blocks", "stacks"])
@each_method
def test_as_the_whole(method: str, form: str, mode: str, group: ProcessGroup) -> None:
    torch.manual_seed(0)
    seen = walk([*sharded(form)], 3, options(method), tp_group=group, tp_mode=mode)
    assert "moment2_buffer" in seen or "moment2_buffer_0" in seen
    assert not far_apart(seen, method) if mode in EXACT else max(seen.values()) <= 1e-4, seen


@pytest.mark.parametrize("mode", EXACT)
@each_method
def test_a_grid(method: str, mode: str, group: ProcessGroup) -> None:
    pairs, shards = zip(*(grid(shape, group) for shape in [(31, 18), (18, 31), (32, 32)]), strict=True)
    layouts = {pair.piece: shard for pair, shard in zip(pairs, shards, strict=True)}
    assert not far_apart(walk([*pairs], 3, options(method), layout_fn=layouts.get, tp_mode=mode), method)


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("way", WAYS)
@each_method
def test_dtensors(method: str, way: Callable[[nn.Module], None], mode: str) -> None:
    whole, sharded, places = models(way, hidden=14)
    pairs = [(p, q) for p, q in zip(whole.parameters(), sharded.parameters(), strict=True) if p.ndim == 2]
    same = {**options_of(method), **options(method)}
    optimizers = [AdaptiveMuon([*params], tp_mode=mode, **same) for params in zip(*pairs, strict=True)]
    step_both(optimizers, pairs, places, 3)
    for p, q in pairs:
        seen = {"W": difference(full(q), p.detach())}
        for key, value in optimizers[0].state[p].items():
            seen[key] = difference(full(optimizers[1].state[q][key]), value)
        assert not far_apart(seen, method), seen


@pytest.mark.parametrize("method", ["of_rows", "of_columns"])
def test_a_scale_of_the_shard_alone_would_be_far_off(
    method: str, group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests above would see if the other ranks' sums were not added."""
    whole, last = Shards.whole, group.size() - 1

    def without_the_last(self: Shards, members: Any, arrived: Any) -> Any:
        *others, (shards, *partial) = arrived
        return whole(self, members, [*others, [shards, *map(torch.zeros_like, partial)]])

    monkeypatch.setattr(Shards, "whole", without_the_last)
    seen = walk(strips(SHAPES), 3, options(method), tp_group=group)
    assert last == 0 or seen["O"] > 0.1, seen
