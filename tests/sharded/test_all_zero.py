# SPDX-License-Identifier: Apache-2.0
"""Which gradients are zero on all ranks that hold shards of them, and how many messages it takes to find out."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pieces import collectives
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from emerging_optimizers.adaptive_muon import ColumnBlocks, Piece, Split
from emerging_optimizers.adaptive_muon.sharding.dtensor import gradient_of
from emerging_optimizers.adaptive_muon.sharding.layout import ShardedLayout
from emerging_optimizers.adaptive_muon.sharding.rules import Rules
from emerging_optimizers.adaptive_muon.sharding.sharding import Sharding


class AnyLayout:
    """A mode that can orthogonalize every matrix."""

    has_owners = True

    def check(self, layout: ShardedLayout, name: str) -> None:
        pass


def resolved(params: list[nn.Parameter], group: ProcessGroup, layout_fn: Any = None) -> Sharding:
    sharding = Sharding(Rules(group, None, True, layout_fn, None, AnyLayout()), {})
    sharding.resolve([{"params": params}])
    return sharding


def matrix(rows: int, columns: int, nonzero: bool = False, dim: int = 0, **attributes: Any) -> nn.Parameter:
    """A parameter whose gradient is zero but for the last element, if ``nonzero``."""
    p = nn.Parameter(torch.ones(rows, columns))
    for name, value in {"partition_dim": dim, **attributes}.items():
        setattr(p, name, value)
    p.grad = torch.zeros_like(p)
    if nonzero:
        p.grad[-1:, -1:] = 1e-30
    return p


def zero_gradients(sharding: Sharding, params: list[nn.Parameter]) -> list[bool]:
    """For each parameter, whether its gradient is found to be zero."""
    found = sharding.all_zero({p: gradient_of(p) for p in params})
    assert found <= set(params)
    return [p in found for p in params]


def messages_of_a_gather(group: ProcessGroup) -> Counter[str]:
    return collectives(lambda: dist.all_gather_object([None] * group.size(), True, group=group))


def test_one_rank_decides_for_all(group: ProcessGroup) -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    params = [
        matrix(4, 8),
        *(matrix(4, 8, rank == one) for one in (0, last)),
        matrix(8, 4, rank == last, dim=1),
        matrix(8, 8, rank == last, muon_blocks=(2, 6)),
        matrix(8, 8, rank == last, muon_blocks=ColumnBlocks((2, 6))),
        matrix(8, 4, rank == last, muon_transposed=True),
        matrix(4 if rank == 0 else 0, 8, rank == 0),  # all others have empty shards
        matrix(4 if rank == 0 else 0, 8),
    ]
    sharding = resolved(params, group)
    expected = [True, *([False] * 7), True]
    assert zero_gradients(sharding, params) == expected
    assert zero_gradients(sharding, params[::-1]) == expected[::-1]


def test_gradients_of_whole_parameters_are_compared_no_further(group: ProcessGroup) -> None:
    """Else every step would make its plan anew."""
    params = [matrix(4, 8, dim=-1)]
    sharding = resolved(params, group)
    assert sharding.has_to_compare
    sharding.compare_gradients([{"params": params}])
    assert not sharding.has_to_compare


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_zero(group: ProcessGroup, value: float) -> None:
    p = matrix(4, 8)
    if dist.get_rank() == 0:
        p.grad[1, 2] = value  # type: ignore[index]
    assert zero_gradients(resolved([p], group), [p]) == [False]


def test_whole_matrices_are_each_ranks_own_and_need_no_message(group: ProcessGroup) -> None:
    nonzero = dist.get_rank() == 0
    params = [matrix(4, 8, nonzero, dim=-1), matrix(4, 8, dim=-1), matrix(4, 8, nonzero, dim=-1, muon_blocks=(1, 3))]
    sharding, found = resolved(params, group), []
    assert not collectives(lambda: found.extend(zero_gradients(sharding, params)))
    assert found == [not nonzero, True, not nonzero]


def test_padding_does_not_count(group: ProcessGroup) -> None:
    """It belongs to no matrix, and gets no update."""
    rank, size = dist.get_rank(), dist.get_world_size()
    params = [matrix(4, 8, nonzero=True), matrix(4, 8)]
    if rank == 0:
        params[1].grad[2, 0] = 1  # type: ignore[index]

    def layout(p: torch.Tensor) -> Piece:
        return Piece(group, (3 * size, 8), (3 * rank, 3 * rank + 3, 0, 8), padding=1)

    assert zero_gradients(resolved(params, group, layout), params) == [True, False]


@pytest.mark.skipif("int(os.environ['WORLD_SIZE']) < 2", reason="groups of two")
def test_one_gather_for_each_group(group: ProcessGroup) -> None:
    pair, _ = dist.new_subgroups(2)
    params = [matrix(4, 8, dist.get_rank() == 0, over=over) for over in (pair, group, pair, group)]
    sharding, found = resolved(params, group, lambda p: Split(p.over, 0)), []
    seen = collectives(lambda: found.extend(zero_gradients(sharding, params)))
    assert seen == messages_of_a_gather(pair) + messages_of_a_gather(group)
    in_other_pair = dist.get_rank() > 1
    assert found == [in_other_pair, False, in_other_pair, False]


@pytest.mark.parametrize("fill", [lambda G: None, lambda G: G[-1:].fill_(1)], ids=["zero", "nonzero"])
def test_dtensors(group: ProcessGroup, fill: Callable[[torch.Tensor], Any]) -> None:
    mesh, G = init_device_mesh("cpu", (dist.get_world_size(),)), torch.zeros(7, 8)
    fill(G)
    p = nn.Parameter(distribute_tensor(torch.ones(7, 8), mesh, [Shard(0)]))
    p.grad = distribute_tensor(G, mesh, [Shard(0)])
    assert zero_gradients(resolved([p], group), [p]) == [not G.any()]
