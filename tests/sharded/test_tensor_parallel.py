# SPDX-License-Identifier: Apache-2.0
"""A matrix in pieces, of which every rank holds one, goes the way of the whole matrix."""

import pytest
import torch
from pieces import OPTIONS, Recording, cut, difference, pieces, set_gradients
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.moment2 import METHODS


MODES = ("layer_sharded", "duplicated", "distributed")


def walk(method, mode, group, steps=4, dtypes=(torch.float32,), **options):
    """Trains whole matrices and pieces, and returns both optimizers and the largest difference seen, by what differs."""
    triples = list(pieces(dtypes))
    whole = Recording([whole for whole, *_ in triples], moment2_method=method, **OPTIONS, **options)
    split = Recording(
        [piece for _, piece, _ in triples], moment2_method=method, tp_group=group, tp_mode=mode, **OPTIONS, **options
    )
    seen = {"O": 0.0, "W": 0.0, "M": 0.0, "V": 0.0}
    for step in range(steps):
        set_gradients(triples, step)
        for optimizer in (whole, split):
            optimizer.step()
        for p, piece, dim in triples:
            of_whole, of_piece = whole.state[p], split.state[piece]
            V = of_whole["moment2_buffer"]
            along = dim if V.ndim == 2 and dim >= 0 and V.shape[dim] == p.shape[dim] else -1
            for key, one, other in (
                (
                    "O",
                    split.orthogonalized.get((piece, None), torch.zeros_like(piece)),
                    cut(whole.orthogonalized[p, None], dim),
                ),
                ("W", piece.detach(), cut(p.detach(), dim)),
                ("M", of_piece["momentum_buffer"], cut(of_whole["momentum_buffer"], dim)),
                ("V", of_piece["moment2_buffer"], cut(V, along)),
            ):
                seen[key] = max(seen[key], difference(one, other))
    print(method, mode, seen)
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_pieces_go_the_way_of_the_whole(method: str, mode: str, group: ProcessGroup) -> None:
    seen = walk(method, mode, group)
    assert seen["M"] == 0
