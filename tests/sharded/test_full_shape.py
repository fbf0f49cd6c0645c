# SPDX-License-Identifier: Apache-2.0
"""State with V in its parameter's shape: expanded, cut as the parameter is, and reduced again."""

from typing import Any

import pytest
import torch
from pieces import OPTIONS, Pair, gathered, options_of, set_gradients, strips
from side_by_side import each_method
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, Piece
from emerging_optimizers.adaptive_muon.state import full_shape
from emerging_optimizers.adaptive_muon.state.full_shape import expand_v, reduce_v


def expanded(optimizer: AdaptiveMuon, p: torch.Tensor) -> dict[str, Any]:
    return expand_v(optimizer.state[p], p, optimizer.state_format)


def padded_strips(shapes: list[tuple[int, int]], group: ProcessGroup) -> tuple[list[Pair], dict[Any, Piece]]:
    """Strips of ceil(rows / ranks) + 1 rows, the last of them, or more, filled up with rows that belong to no matrix."""
    pairs, layouts = [], {}
    for whole_rows, columns in shapes:
        whole = torch.randn(whole_rows, columns, generator=torch.Generator().manual_seed(whole_rows))
        rows = -(-whole_rows // group.size()) + 1
        top, bottom = (min(row, whole_rows) for row in (rows * group.rank(), rows * (group.rank() + 1)))
        padding = rows - (bottom - top)

        def cut(t: torch.Tensor, top: int = top, bottom: int = bottom, padding: int = padding) -> torch.Tensor:
            if t.ndim == 1 or t.size(-2) == 1:
                return t
            return nn.functional.pad(t[top:bottom], (0, 0, 0, padding))

        pairs.append(Pair(nn.Parameter(whole), nn.Parameter(cut(whole).clone()), cut))
        layouts[pairs[-1].piece] = Piece(group, (whole_rows, columns), (top, bottom, 0, columns), padding)
    return pairs, layouts


@each_method
@pytest.mark.parametrize("kind", ["strips", "blocks", "columns", "padded", "padded blocks", "padded columns"])
def test_expanded_state_is_cut_as_the_parameter_is(method: str, kind: str, group: ProcessGroup) -> None:
    """And what is read off its pieces, also of pieces without a row of a block, is the state of the pieces."""
    options = options_of(method)
    layouts: dict[Any, Piece] = {}
    # Wide and tall, and on four ranks some hold no row, or column, of some. The blocks of 12 are one batch.
    sizes = (30, 18, 12, 12)
    shapes = {"blocks": [(72, 16)], "columns": [(16, 72)]}
    if "padded" in kind:
        pairs, layouts = padded_strips(shapes.get(kind.removeprefix("padded "), [(30, 17), (17, 30), (3, 18)]), group)
    else:
        pairs = strips(shapes.get(kind, [(24, 64), (64, 24), (30, 18)]))
    for pair in pairs:
        if "blocks" in kind or "columns" in kind:
            for p in pair.whole, pair.piece:
                p.muon_blocks = sizes if "blocks" in kind else ColumnBlocks(sizes)
    whole = AdaptiveMuon([pair.whole for pair in pairs], **options)
    pieces = AdaptiveMuon([pair.piece for pair in pairs], tp_group=group, layout_fn=layouts.get, **options)
    for step in range(2):
        set_gradients(pairs, step)
        whole.step()
        pieces.step()
    for pair in pairs:
        full = expanded(pieces, pair.piece)
        assert full["moment2_buffer"].shape == full["momentum_buffer"].shape == pair.piece.shape
        assert full.keys() <= {"momentum_buffer", "moment2_buffer", "step"}
        of_whole = expanded(whole, pair.whole)
        for key in "moment2_buffer", "momentum_buffer":
            expected, rows = (
                pair.cut(of_whole[key]),
                pair.piece.size(0) - layouts[pair.piece].padding if layouts else None,
            )
            torch.testing.assert_close(full[key][:rows], expected[:rows], rtol=1e-4, atol=1e-6)
        states = [(pieces, pair.piece, full), (whole, pair.whole, of_whole)]
        for optimizer, p, state in states:
            own = dict(optimizer.state[p])
            for given in (state, own):
                [reduced] = reduce_v([given], [p], optimizer.state_format)
                torch.testing.assert_close(reduced, own, rtol=0, atol=0)


def test_a_shard_in_the_shape_of_its_v(group: ProcessGroup) -> None:
    """One rank cannot see whether V is expanded, and an empty shard beside it can: all of them take part."""
    pairs = strips([(18, 3), (3, 18)])
    options = options_of("normuon")
    set_gradients(pairs, 0)
    optimizer = AdaptiveMuon([pair.piece for pair in pairs], tp_group=group, **options)
    optimizer.step()
    params = [pair.piece for pair in pairs]
    own = [dict(optimizer.state[p]) for p in params]
    full = [expanded(optimizer, p) for p in params]
    for given in (own, full):
        assert len({*gathered(messages_of(given, params, optimizer))}) == 1, "some ranks would wait for the others"
        torch.testing.assert_close(reduce_v(given, params, optimizer.state_format), own, rtol=0, atol=0)


def test_a_shard_in_the_shape_of_another_methods_v(group: ProcessGroup) -> None:
    """A checkpoint that does not fit is refused, later and on all ranks; none waits for the others before."""
    if group.size() > 1:
        p = nn.Parameter(torch.randn(group.size() + 1, 3).tensor_split(group.size())[dist.get_rank()].clone())
        p.partition_dim = 0  # type: ignore[attr-defined]
        optimizer = AdaptiveMuon([p], tp_group=group, moment2_method="normuon")
        p.grad = torch.ones_like(p)
        optimizer.step()
        state = {**optimizer.state[p], "moment2_buffer": torch.ones(1, 3)}  # of "namo_d"
        assert len({*gathered(messages_of([state], [p], optimizer))}) == 1, "some ranks would wait for the others"


def messages_of(states: list[dict[str, Any]], params: list[nn.Parameter], optimizer: AdaptiveMuon) -> tuple[Any, ...]:
    """The shapes and dtypes of what this rank would send to reduce these states, in which it gets no answer."""
    sent: list[Any] = []

    def recorded(group: ProcessGroup, terms: list[torch.Tensor]) -> list[torch.Tensor]:
        sent.extend((*term.shape, term.dtype) for term in terms)
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_shape, "sum_over", recorded)
        reduce_v(states, params, optimizer.state_format)
    return tuple(sent)


def test_rows_of_padding_stay_as_they_are(group: ProcessGroup) -> None:
    """Whatever is in them, and with every kind of weight decay they could be scaled by."""
    pairs, layouts = padded_strips([(10, 17), (17, 10)], group)
    for pair in pairs:
        pair.piece.data += 0.0
        set_gradients([pair], 0)
    optimizer = AdaptiveMuon(
        [pair.piece for pair in pairs], layout_fn=layouts.get, moment2_method="namo_d", **OPTIONS, weight_decay=0.1
    )
    whole = AdaptiveMuon([pair.whole for pair in pairs], moment2_method="namo_d", **OPTIONS, weight_decay=0.1)
    optimizer.step()
    whole.step()
    for pair in pairs:
        torch.testing.assert_close(pair.piece.detach(), pair.cut(pair.whole.detach()), rtol=0, atol=1e-6)


def test_a_piece_that_does_not_fit_its_padding_is_refused(group: ProcessGroup) -> None:
    pairs, layouts = padded_strips([(10, 17)], group)
    [(p, piece)] = layouts.items()
    if group.size() > 1:
        wrong = Piece(group, piece.whole, piece.rectangle, piece.padding + 1)
        with pytest.raises(ValueError, match="rows of padding"):
            AdaptiveMuon([p], layout_fn=lambda _: wrong)
    dist.barrier()
