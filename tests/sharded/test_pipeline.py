# SPDX-License-Identifier: Apache-2.0
"""Rounds are pipelined: messages are on their way during the orthogonalization of others, in one order and few at a time."""

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pieces import OPTIONS, set_gradients, strips
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.exchange import messages
from emerging_optimizers.adaptive_muon.moment2 import METHODS


pytestmark = pytest.mark.skipif("os.environ['WORLD_SIZE'] == '1'", reason="one process sends nothing")

ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
ROUNDS = 4
KINDS = {"layer_sharded": ("shards", "results"), "duplicated": ("shards",), "replicas": ("results",)}
ORDERS = {
    "layer_sharded": """
        send shards 0, wait for shards 0, send shards 1, orthogonalize 0, send results 0,
        wait for shards 1, send shards 2, orthogonalize 1, wait for results 0, update 0, send results 1,
        wait for shards 2, send shards 3, orthogonalize 2, wait for results 1, update 1, send results 2,
        wait for shards 3, orthogonalize 3, wait for results 2, update 2, send results 3,
        wait for results 3, update 3""",
    "duplicated": """
        send shards 0, wait for shards 0, send shards 1, orthogonalize 0, update 0,
        wait for shards 1, send shards 2, orthogonalize 1, update 1,
        wait for shards 2, send shards 3, orthogonalize 2, update 2,
        wait for shards 3, orthogonalize 3, update 3""",
    "replicas": """
        orthogonalize 0, send results 0,
        orthogonalize 1, wait for results 0, update 0, send results 1,
        orthogonalize 2, wait for results 1, update 1, send results 2,
        orthogonalize 3, wait for results 2, update 2, send results 3,
        wait for results 3, update 3""",
}


def matrices(split: bool) -> list[nn.Parameter]:
    """One for every rank and round. A round's have as many columns as no others, and more cost than those after it."""
    ranks, made = dist.get_world_size(), []
    for column in range(ROUNDS):
        for _ in range(ranks):
            p = nn.Parameter(torch.randn(8 if split else 8 * ranks, 40 - column))
            p.partition_dim = 0 if split else -1  # type: ignore[attr-defined]
            p.grad = torch.randn_like(p)
            made.append(p)
    return made


class Work:
    """A collective that notes when it is waited for."""

    def __init__(self, work: Any, note: Callable[[], None]) -> None:
        self._work, self._note = work, note

    def wait(self) -> None:
        self._note()
        self._work.wait()


@pytest.mark.parametrize("mode", ORDERS)
def test_messages_travel_during_the_work_on_other_rounds(
    mode: str, group: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rank sends, waits for and works on, in its order. A round is told by its columns, or by its bytes."""
    seen: list[str] = []
    # Of an owner's matrix, or of every owner's. The flags of the first message are less.
    of_column = 4 * 8 * group.size() * (group.size() if mode == "replicas" else 1)
    sent = defaultdict[int, int](int)

    def note(event: str) -> None:
        if not seen or seen[-1] != event:
            seen.append(event)

    def watch(collective: Callable[..., Any]) -> Any:
        def watched(arrived: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            index = 40 - arrived.nbytes // of_column
            message = f"{KINDS[mode][sent[index]]} {index}"
            sent[index] += 1
            note(f"send {message}")
            return Work(collective(arrived, *args, **kwargs), lambda: note(f"wait for {message}"))

        return watched

    way: dict[str, Any] = {"replica_group": group} if mode == "replicas" else {"tp_group": group, "tp_mode": mode}
    # One matrix for each rank is beyond the bytes in flight. With "duplicated", which has no owners, a round is one matrix.
    params = matrices(split=mode != "replicas")
    params = params[:: group.size()] if mode == "duplicated" else params
    optimizer = AdaptiveMuon(params, max_bytes_in_flight=1, **way, **OPTIONS)
    optimizer.scaled_orthogonalize_fn = lambda M: note(f"orthogonalize {40 - M.size(-1)}") or M.tanh()  # type: ignore[func-returns-value]
    optimizer.post_weight_update_fn_inplace = lambda p: note(f"update {40 - p.size(-1)}")
    optimizer.step()
    seen.clear()
    monkeypatch.setattr(dist, "all_to_all_single", watch(dist.all_to_all_single))
    monkeypatch.setattr(dist, "all_gather_single", watch(ALL_GATHER), raising=False)
    optimizer.step()
    assert seen == [event.strip() for event in ORDERS[mode].split(",")]


class Buffers:
    """Makes the buffers of messages, and knows how many bytes of them there are at a time."""

    def __init__(self) -> None:
        self.now = self.most = self.number = 0

    def new(self, size: int, device: torch.device) -> torch.Tensor:
        """Returns a tensor in memory whose end is noticed: when no view of it is left."""
        memory = np.empty(size, np.uint8)
        self.now, self.number = self.now + size, self.number + 1
        self.most = max(self.most, self.now)
        weakref.finalize(memory, self._released, size)
        return torch.from_numpy(memory)

    def _released(self, size: int) -> None:
        self.now -= size


class Delivery:
    """A collective of copies, whose result is in place when it has been waited for. Gloo's threads hold buffers longer."""

    def __init__(self, arrived: torch.Tensor, result: torch.Tensor) -> None:
        self._arrived, self._result = arrived, result

    def wait(self) -> None:
        self._arrived.copy_(self._result)


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    """The buffers of all messages."""

    def of_copies(collective: Callable[..., Any]) -> Any:
        def called(arrived: torch.Tensor, sent: torch.Tensor, *args: Any, async_op: bool, **kwargs: Any) -> Delivery:
            result = torch.empty_like(arrived)
            collective(result, sent.clone(), *args, **kwargs)
            return Delivery(arrived, result)

        return called

    made = Buffers()
    monkeypatch.setattr(messages, "new_buffer", made.new)
    monkeypatch.setattr(dist, "all_to_all_single", of_copies(dist.all_to_all_single))
    monkeypatch.setattr(dist, "all_gather_single", of_copies(ALL_GATHER), raising=False)
    return made


@pytest.mark.parametrize("mode", ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_messages_take_at_most_twice_the_bytes_in_flight(
    method: str, mode: str, group: ProcessGroup, buffers: Buffers
) -> None:
    """Over a step of many rounds, and nothing is left after it. Sums of squares do not count as bytes in flight."""
    ranks, size = group.size(), 4 * 40 * 48
    cap = 3 * 2 * size  # both messages of three matrices for every owner
    sums = 2 * 2 * 3 * ranks * 2 * 4 * 48
    way: dict[str, Any] = {"replica_group": group} if mode == "replicas" else {"tp_group": group, "tp_mode": mode}
    dim = -1 if mode == "replicas" else 0
    pairs = [pair for pair in strips([(40, 48)] * 10 * ranks) if pair.piece.partition_dim == dim]  # type: ignore[attr-defined]
    options = {**OPTIONS, **way, "moment2_method": method, "max_bytes_in_flight": cap}
    optimizer = AdaptiveMuon([pair.piece for pair in pairs], **options)
    for step in range(2):
        set_gradients(pairs, step)
        buffers.number = buffers.most = 0
        optimizer.step()
        assert buffers.number >= 2 * 4 and buffers.now == 0
        assert (1.9 * cap if mode == "layer_sharded" else 0.5 * cap) <= buffers.most <= 2 * cap + sums
