# SPDX-License-Identifier: Apache-2.0
"""The messages of a step: who orthogonalizes what, and how shards get there and back."""

from typing import Literal, get_args

from emerging_optimizers.adaptive_muon.checks import require_one_of
from emerging_optimizers.adaptive_muon.exchange.distributed import Distributed
from emerging_optimizers.adaptive_muon.exchange.duplicated import Duplicated
from emerging_optimizers.adaptive_muon.exchange.layer_sharded import LayerSharded
from emerging_optimizers.adaptive_muon.exchange.mode import Exchange, LocalExchange, Mode, Shards
from emerging_optimizers.adaptive_muon.exchange.whole import Orthogonalize


__all__ = ["Exchange", "LocalExchange", "Mode", "Orthogonalize", "Shards", "TensorParallelModeT", "make_mode"]

TensorParallelModeT = Literal["layer_sharded", "duplicated", "distributed", "blockwise"]

_MODES = {"layer_sharded": LayerSharded(), "duplicated": Duplicated(), "distributed": Distributed()}


def make_mode(name: str) -> Mode | None:
    """Return the mode of this name; None for "blockwise", which takes every shard for a matrix of its own.

    Args:
        name: A name of ``TensorParallelModeT``.

    Raises:
        ValueError: If the name is unknown.
    """
    require_one_of("tp_mode", name, get_args(TensorParallelModeT))
    return _MODES.get(name)
