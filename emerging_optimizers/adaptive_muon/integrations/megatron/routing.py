# SPDX-License-Identifier: Apache-2.0
"""What goes to Megatron's scalar optimizer beside what Megatron sends there itself, by the rules of HybridAdaptiveMuon."""

from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from emerging_optimizers.adaptive_muon.routing.rules import route_parameter


__all__ = ["is_scalar", "scalar_overrides"]


def scalar_overrides() -> dict[ParamKey, dict[str, Any]]:
    """Return the overrides for an entry of Megatron's table, which are applied to parameters whose predicate holds."""
    predicate = ParamWithNamePredicate(name="adaptive_muon_scalar", fn=is_scalar)
    return {ParamKey(with_name_predicate=predicate): {"optimizer": "adam"}}


def is_scalar(p: torch.Tensor, name: str) -> bool:
    """Return whether a parameter is no hidden matrix: a router, an embedding, a head, a single row, or tagged so.

    Megatron tags the word embeddings and the output layer only. One that Megatron has laid out for the layer-wise
    optimizer is that optimizer's, as all its matrices are.
    """
    if getattr(p, "is_managed_by_layer_wise_optimizer", False):
        return False
    return route_parameter(p, name).algorithm == "adamw"
