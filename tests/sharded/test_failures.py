# SPDX-License-Identifier: Apache-2.0
"""Ranks that disagree: every one of them gets an error that says about what, and nothing has changed."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pieces import OPTIONS, set_gradients, strips
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, Piece


several = pytest.mark.skipif("os.environ['WORLD_SIZE'] == '1'", reason="one process cannot disagree")
pytestmark = several


def refused(params: list[Any], match: str, group: ProcessGroup, **options: Any) -> None:
    """All ranks' first step is refused alike, and no weight or state has changed."""
    optimizer = AdaptiveMuon(params, tp_group=group, **OPTIONS, **options)
    tensors = [p for g in optimizer.param_groups for p in g["params"]]
    before = [p.detach().clone() for p in tensors]
    for p in tensors:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=match) as error:
        optimizer.step()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, str(error.value))
    assert len(set(told)) == 1, told
    assert all(torch.equal(p, q) for p, q in zip(tensors, before, strict=True))
    assert not optimizer.state


def matrix(rows: int, columns: int, dim: int = 0, **attributes: Any) -> nn.Parameter:
    p = nn.Parameter(torch.randn(rows, columns))
    for name, value in {"partition_dim": dim, **attributes}.items():
        setattr(p, name, value)
    return p


def test_another_width(group: ProcessGroup) -> None:
    columns = 9 if dist.get_rank() == 1 else 8
    params = [("first", matrix(4, 8)), ("second", matrix(4, columns))]
    refused(params, r"'second': \(\*, 8\) float32.* on rank 0.*'second': \(\*, 9\) float32.* on rank 1", group)


def test_an_index_where_there_are_no_names(group: ProcessGroup) -> None:
    columns = 9 if dist.get_rank() == 1 else 8
    refused([matrix(4, 8), matrix(4, columns)], r"parameter 1 of its group: \(\*, 9\)", group)


def test_another_dtype(group: ProcessGroup) -> None:
    dtype = torch.bfloat16 if dist.get_rank() == 1 else torch.float32
    p = nn.Parameter(torch.randn(4, 8, dtype=dtype))
    p.partition_dim = 0  # type: ignore[attr-defined]
    refused([("w", p)], r"'w': .*float32.*rank 0.*bfloat16.*rank 1", group)


def test_another_dimension(group: ProcessGroup) -> None:
    refused([("w", matrix(8, 8, dist.get_rank() % 2))], r"split along dim 0.*split along dim 1", group)


def test_whole_on_one_rank(group: ProcessGroup) -> None:
    refused([("w", matrix(8, 8, -1 if dist.get_rank() == 0 else 0))], r"\(8, 8\).*rank 0.*\(\*, 8\)", group)


def test_whole_ones_of_different_shapes(group: ProcessGroup) -> None:
    refused([("w", matrix(8 + dist.get_rank() % 2, 8, -1))], r"'w': \(8, 8\).*rank 0.*'w': \(9, 8\).*rank 1", group)


def test_another_order(group: ProcessGroup) -> None:
    names = ("a", "b") if dist.get_rank() == 0 else ("b", "a")
    refused([(name, matrix(4, 8)) for name in names], "'a': .*rank 0.*'b': .*rank 1", group)


def test_one_more(group: ProcessGroup) -> None:
    params = [(str(i), matrix(4, 8)) for i in range(3 if dist.get_rank() == 0 else 2)]
    refused(params, "'2': .* on rank 0; nothing on rank 1", group)


@pytest.mark.parametrize(
    "options",
    [("tp_mode", "layer_sharded", "duplicated"), ("moment2_method", "namo", "normuon"), ("num_ns_steps", 5, 6)],
)
def test_other_options(options: tuple[str, Any, Any], group: ProcessGroup) -> None:
    name, first, other = options
    chosen = {name: first if dist.get_rank() == 0 else other}
    refused(
        [("w", matrix(8, 8))],
        f"(?i)options of the optimizer.*{first}.* on rank 0.*{other}.* on rank 1",
        group,
        **chosen,
    )


def test_other_blocks(group: ProcessGroup) -> None:
    blocks = (4, 4) if dist.get_rank() == 0 else (6, 2)
    refused([("w", matrix(8, 8, muon_blocks=blocks))], r"blocks \(4, 4\).*blocks \(6, 2\)", group)
    of_columns = (4, 4) if dist.get_rank() == 0 else ColumnBlocks((4, 4))
    refused([("w", matrix(8, 8, muon_blocks=of_columns))], r"blocks \(4, 4\).*blocks ColumnBlocks\(", group)


def test_blocks_that_do_not_fit(group: ProcessGroup) -> None:
    refused([("w", matrix(4, 8, muon_blocks=(5, 2)))], r"blocks of parameter 'w'.*\(5, 2\)", group)
    refused([("w", matrix(4, 8, muon_blocks=ColumnBlocks((5, 2))))], r"blocks of parameter 'w'.* 8 columns", group)


def test_pieces_that_overlap_or_leave_gaps(group: ProcessGroup) -> None:
    size = dist.get_world_size()
    for start in (0, 5):
        top = start * dist.get_rank()
        piece = Piece(group, (4 * size, 8), (top, top + 4, 0, 8))
        refused([("w", matrix(4, 8))], "make up the whole", group, layout_fn=lambda p, piece=piece: piece)


def test_a_gradient_on_one_rank_only(group: ProcessGroup) -> None:
    pairs = strips([(24, 64)])
    optimizer = AdaptiveMuon([(str(i), p.piece) for i, p in enumerate(pairs)], tp_group=group, **OPTIONS)
    set_gradients(pairs, 0)
    if dist.get_rank() == 1:
        pairs[1].piece.grad = None
    before = [p.piece.detach().clone() for p in pairs]
    with pytest.raises(ValueError, match=r"'1' has a gradient on rank 0.*'1' has no gradient on rank 1"):
        optimizer.step()
    assert all(torch.equal(p.piece, q) for p, q in zip(pairs, before, strict=True))
    assert not optimizer.state


def test_the_only_gradient_on_one_rank(group: ProcessGroup) -> None:
    p = matrix(4, 8)
    p.grad = torch.ones(4, 8) if dist.get_rank() == 0 else None
    optimizer = AdaptiveMuon([("w", p)], tp_group=group)
    for _ in range(2):  # a step that is refused is so again
        with pytest.raises(ValueError, match=r"'w' has a gradient on rank 0.*'w' has no gradient on rank 1"):
            optimizer.step()
    assert not optimizer.state


def test_different_gradients_gone_on_different_ranks_after_a_step(group: ProcessGroup) -> None:
    pairs = strips([(24, 64)])
    optimizer = AdaptiveMuon([(str(i), p.piece) for i, p in enumerate(pairs)], tp_group=group, **OPTIONS)
    set_gradients(pairs, 0)
    optimizer.step()
    gone = min(dist.get_rank(), 1)
    pairs[gone].piece.grad = None
    with pytest.raises(ValueError, match=r"'0' has no gradient on rank 0.*'0' has a gradient on rank 1"):
        optimizer.step()


def test_an_added_parameter_with_a_gradient_on_one_rank_only(group: ProcessGroup) -> None:
    first, added = matrix(4, 8), matrix(4, 8)
    first.grad = torch.ones(4, 8)
    optimizer = AdaptiveMuon([("w", first)], tp_group=group)
    optimizer.step()
    optimizer.add_param_group({"params": [("b", added)]})
    added.grad = torch.ones(4, 8) if dist.get_rank() == 0 else None
    with pytest.raises(ValueError, match=r"'b' has a gradient on rank 0.*'b' has no gradient on rank 1"):
        optimizer.step()


def test_a_piece_without_a_group() -> None:
    with pytest.raises(ValueError, match=r"must have a tp_group.*partition_dim, got 1"):
        AdaptiveMuon([matrix(4, 8, 1)])


DYING = """
import os, sys, torch
from torch import distributed as dist, nn
from emerging_optimizers.adaptive_muon import AdaptiveMuon
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
p = nn.Parameter(torch.randn(4, 8))
p.partition_dim = 0
optimizer = AdaptiveMuon([p], tp_group=dist.group.WORLD)
p.grad = torch.randn(4, 8)
if dist.get_rank() == 1:
    os._exit(3)
try:
    optimizer.step()
except RuntimeError as error:
    print(error, flush=True)
"""


def test_a_rank_that_dies(tmp_path: Path) -> None:
    """The others learn that not all answered. Two processes of their own, started by the first rank."""
    if dist.get_rank() == 0:
        ours = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        meeting = f"file://{tmp_path / 'meeting'}"
        running = [
            subprocess.Popen(
                [sys.executable, "-c", DYING, meeting, str(rank)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        out = running[0].communicate(timeout=600)[0]
        running[1].communicate(timeout=600)
        assert running[1].returncode == 3
        assert re.search(r"must compare its shards of the parameters, got no answer on rank 0 of 2\. See", out), out
    dist.barrier()
