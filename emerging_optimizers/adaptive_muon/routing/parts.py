# SPDX-License-Identifier: Apache-2.0
"""The matrices that a weight holds: rows or columns that are one matrix each, as blocks of AdaptiveMuon and in words."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from emerging_optimizers.adaptive_muon.routing.linear_maps import LinearMap, linear_map
from emerging_optimizers.adaptive_muon.sharding.blocks import ColumnBlocks


__all__ = [
    "ONE_MATRIX",
    "Parts",
    "WHOLE",
    "Weight",
    "child_of",
    "columns",
    "kinds_of",
    "merged_rows",
    "rows",
    "weight_of",
]

# What wrappers call a module that they wrap: torch.compile, checkpointing, FSDP1, peft, NeMo's and Megatron's adapters,
# and the linear layers with clamped inputs of Hugging Face's Gemma 4.
_WRAPPED = (
    *("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"),
    *("base_layer", "original_module", "to_wrap", "linear"),
)


_PLURALS = {
    **{"query": "queries", "key": "keys", "value": "values", "gate": "gates"},
    **{"query head": "queries", "key head": "keys", "value head": "values"},
}


@dataclass(frozen=True)
class Parts:
    """The matrices that a weight holds."""

    blocks: Any  # what muon_blocks takes; None where the weight is one matrix
    text: str  # what they are, for a person


WHOLE = Parts(None, "one head")
ONE_MATRIX = Parts(None, "one matrix")


@dataclass(frozen=True)
class Weight:
    """The weight of a linear map, which a module or one of its children has."""

    p: nn.Parameter
    map: LinearMap

    @property
    def rows(self) -> int:
        """The number of outputs."""
        return self.map.outputs

    @property
    def columns(self) -> int:
        """The number of inputs."""
        return self.map.inputs


def weight_of(module: nn.Module, name: str) -> Weight | None:
    """Return the weight of a module's child, or the weight of this name that the module has itself, if there is one.

    Of a weight that is parametrized it is the direction. A shard that only an attribute shows (``partition_dim``) has
    other rows than its matrix, and is passed over.
    """
    leaf, owner, p = name, module, _stored(module, name)
    if p is None:
        child = child_of(module, name)
        if child is None:
            return None
        leaf, owner, p = "weight", child, _stored(child, "weight")
    if p is None or getattr(p, "partition_dim", -1) not in (None, -1):
        return None
    map_ = linear_map(owner, leaf, p)
    return None if map_ is None else Weight(p, map_)


def _stored(module: nn.Module, leaf: str) -> nn.Parameter | None:
    """Return the parameter of this name that a module has, or in its place what torch scales or masks to make it."""
    made_by = getattr(module, "parametrizations", {})
    if leaf in made_by:  # which must not be computed here: spectral_norm counts that as an iteration
        of_leaf = made_by[leaf]
        is_scaled = all(type(each).__name__ in ("_WeightNorm", "_SpectralNorm") for each in of_leaf)
        found = getattr(of_leaf, "original", getattr(of_leaf, "original1", None)) if is_scaled else None
        return found if isinstance(found, nn.Parameter) else None
    values = (getattr(module, name, None) for name in (leaf, f"{leaf}_v", f"{leaf}_orig"))
    return next((value for value in values if isinstance(value, nn.Parameter)), None)


def rows(sizes: Sequence[tuple[str, int, int]], *, each: str = "", times: int = 1) -> Parts:
    """Return parts that are rows: for each (name, number, size), in their order, so many matrices of so many rows.

    Where the sizes are those of one query group or head, the weight has them ``times``, once for ``each`` of these.
    """
    blocks = tuple(size for _, number, size in sizes for _ in range(number)) * times
    text = _listed(
        f"{number} {name}s of {size}" if number > 1 else f"{name} of {size}" for name, number, size in sizes
    )
    return (
        WHOLE if len(blocks) == 1 else Parts(blocks, f"{times} {each}s, each {text} rows" if each else f"{text} rows")
    )


def merged_rows(sizes: Sequence[tuple[str, int, int]], *, times: int = 1) -> Parts:
    """Return parts that are one matrix for each (name, number, size): all of its rows, wherever they stand.

    As in :func:`rows`, they may be those of one query group or head.
    """
    blocks = tuple(number * size for _, number, size in sizes)
    return Parts(
        blocks, _listed(f"{_PLURALS[name]} of {times * number * size}" for name, number, size in sizes) + " rows"
    )


def columns(name: str, number: int, size: int) -> Parts:
    """Return parts that are so many matrices of so many columns."""
    return WHOLE if number == 1 else Parts(ColumnBlocks((size,) * number), f"{number} {name}s of {size} columns")


def kinds_of(module: nn.Module) -> Iterator[str]:
    """Yield "package.Class" of a module's class and of its bases: ``fully_shard`` makes a class of its own."""
    return (f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(module).__mro__)


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """Return a child of a module by its dotted name, without what is wrapped around it."""
    child: Any = module
    for part in name.split("."):
        child = getattr(child, part, None)
        while inner := next((each for each in _WRAPPED if isinstance(getattr(child, each, None), nn.Module)), None):
            child = getattr(child, inner)
    return child if isinstance(child, nn.Module) else None


def _listed(texts: Iterable[str]) -> str:
    """Return texts in one: "a, b and c"."""
    *before, last = texts
    return f"{', '.join(before)} and {last}" if before else last
