# SPDX-License-Identifier: Apache-2.0
"""Experts in one tensor, a stack of matrices, and the routers that choose among experts.

The names of fused projections and the shapes of the two together give the order of their dimensions. Where these do not
decide it, attributes of the module do, or a table of classes whose ``forward`` was read.
"""

import re
from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from emerging_optimizers.adaptive_muon.routing.linear_maps import features_of
from emerging_optimizers.adaptive_muon.routing.parts import kinds_of


__all__ = ["EXPERT_CLASSES", "find_routers", "in_experts", "is_called_expert", "is_called_router"]

# The first and the last projection of gated experts, in Hugging Face's models and in NeMo Automodel's.
_PAIRS = (("gate_up_proj", "down_proj"), ("gate_and_up_projs", "down_projs"))
# Classes whose shapes do not show the order: the leaves, and whether they are stored as (experts, in, out).
_TABLE: dict[str, tuple[tuple[str, ...], bool]] = {
    "transformers.InklingSharedExperts": (("gate_proj", "up_proj", "down_proj"), False),
    "transformers.JetMoeParallelExperts": (("weight",), False),
    "nemo_automodel.GroupedExperts": (("gate_and_up_projs", "down_projs"), True),
    "nemo_automodel.GroupedExpertsDeepEP": (("gate_and_up_projs", "down_projs"), True),
}
EXPERT_CLASSES = tuple(_TABLE)
_ROUTER = re.compile(r"(Router|Gating)$")
# What a router is called beside the experts that it chooses among. Elsewhere such a gate may be any.
_GATES = {"gate", "gating", "router_gate"}


def in_experts(module: nn.Module) -> Iterator[tuple[nn.Parameter, tuple[int, int], bool]]:
    """Yield the stacks that a module has: the parameter, its outputs and inputs, and whether it is stored (in, out).

    A shard that only an attribute shows (``partition_dim``) is passed over.
    """
    stacks = {
        leaf: p
        for leaf, p in module.named_parameters(recurse=False)
        if not is_lazy(p) and p.ndim == 3 and getattr(p, "partition_dim", -1) in (None, -1)
    }
    if not stacks or isinstance(module, nn.modules.conv._ConvNd):
        return
    for leaf, transposed in _orders(module, stacks):
        rows, columns = stacks[leaf].shape[-2:]
        yield stacks[leaf], (columns, rows) if transposed else (rows, columns), transposed


def is_called_expert(path: list[str], module: nn.Module) -> bool:
    """Return whether the name of a parameter, or the class of its module, is one of experts."""
    return any("expert" in part.lower() for part in (*path, type(module).__name__))


def is_called_router(path: list[str]) -> bool:
    """Return whether a module is a router by its dotted name."""
    return "router" in path


def find_routers(model: nn.Module) -> set[nn.Module]:
    """Return the modules that choose among experts: by their class, or by their name and what stands beside them."""
    routers = set()
    for outer in model.modules():
        for name, module in outer.named_children():
            is_named = name == "router" or (name in _GATES and _has_experts(outer))
            by_class = any(_ROUTER.search(cls.__name__) for cls in type(module).__mro__)
            if (is_named or by_class) and not _has_experts(module):
                routers.add(module)
    return routers


def _has_experts(module: nn.Module) -> bool:
    return any("expert" in name for name, _ in module.named_children())


def _orders(module: nn.Module, stacks: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, bool]]:
    """Yield the names of a module's stacks, and whether they are stored (in, out)."""
    said = getattr(module, "is_transposed", None)  # by Hugging Face's use_experts_implementation
    for first, last in _PAIRS:
        found = _order_of_gated(stacks[first], stacks[last]) if {first, last} <= {*stacks} else None
        if found is not None:
            if said in (None, found):
                yield from ((first, found), (last, found))
            return
    for kind in kinds_of(module):
        if kind in _TABLE:
            leaves, transposed = _TABLE[kind]
            yield from ((leaf, transposed) for leaf in leaves if leaf in stacks)
            return
    if getattr(module, "has_gate", None) is False and isinstance(said, bool) and {"up_proj", "down_proj"} <= {*stacks}:
        yield from (("up_proj", said), ("down_proj", said))
    elif stacks.keys() == {"weight"} and _counts_experts(module, stacks["weight"].size(0)):
        shape = tuple(stacks["weight"].shape[-2:])
        orders = {shape != each for each in features_of(module) if {*each} == {*shape}}
        if len(orders) == 1 and shape[0] != shape[1]:
            yield "weight", orders.pop()


def _order_of_gated(gate_up: nn.Parameter, down: nn.Parameter) -> bool | None:
    """Return whether gate and up projections, and projections down, are stored (in, out); None where they do not fit.

    The ones have twice as many outputs as the others have inputs. In the wrong order they do not fit together.
    """
    first, last = gate_up.shape[-2:], down.shape[-2:]
    if first == (2 * last[1], last[0]):
        return False
    return True if first == (last[1], 2 * last[0]) else None


def _counts_experts(module: nn.Module, number: int) -> bool:
    """Return whether an attribute of a module is its number of experts."""
    return any("expert" in name and value == number for name, value in vars(module).items() if type(value) is int)
