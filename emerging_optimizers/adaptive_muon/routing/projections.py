# SPDX-License-Identifier: Apache-2.0
"""The heads of attention with a projection of its own for queries, keys, values and the output.

A module is recognized by the names of its projections, and by attributes that give the number and the size of its heads.
Both must fit the shapes of the weights: rows are number times size.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import nn

from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.routing.parts import (
    Parts,
    Weight,
    child_of,
    columns,
    kinds_of,
    merged_rows,
    rows,
    weight_of,
)


__all__ = ["Heads", "HeadsIn", "by_head", "has_projections", "heads_of", "of_positions", "output_after", "own_heads"]

# Names of the projections in Hugging Face's models, NeMo's and many others.
_QUERIES = (
    *("q_proj", "query", "q", "q_lin", "query_proj", "linear_q", "to_q", "q_net", "query_net", "project_q"),
    *("wq", "Wq", "q_head", "q_attn", "query_layer"),
)
_KEYS = (
    *("k_proj", "key", "k", "k_lin", "key_proj", "linear_k", "to_k", "k_net", "key_net", "project_k"),
    *("wk", "Wk", "k_head"),
)
_VALUES = (
    *("v_proj", "value", "v", "v_lin", "value_proj", "linear_v", "to_v", "v_net", "value_net", "project_v"),
    *("wv", "Wv", "v_head"),
)
_OUTPUTS = (
    *(
        "o_proj",
        "out_proj",
        "o",
        "out_lin",
        "linear_out",
        "out_projection",
        "output_proj",
        "dense",
        "proj",
        "projection",
    ),
    *("projection_layer", "to_out", "to_out.0", "o_net", "attention_out", "wo", "Wo", "c_proj", "output", "post_proj"),
)
# Projections of positions, which are keys too.
_POSITIONS = ("linear_pos", "relative_k_proj", "pos_proj", "pos_net", "r_net")
# Further queries, keys and values: Longformer's for global attention, LUKE's between words and entities.
_MORE = (
    *("query_global", "key_global", "value_global", "global_q", "global_k", "global_v"),
    *("w2e_query", "e2w_query", "e2e_query"),
)
# Output gates, by which the values are multiplied element by element.
_GATES = ("gate_proj", "g_proj")
# Attributes that give the number of heads, of the module or of its config, and the size of a head.
_NUMBERS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "nhead",
    "num_attn_heads",
    "heads",
    "h",
    "attention_heads",
)
_KEY_NUMBERS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")
_SIZES = (
    *(
        "head_dim",
        "attention_head_size",
        "key_value_proj_dim",
        "d_k",
        "d_head",
        "head_size",
        "attn_head_size",
        "dim_head",
    ),
    *("dim_per_head", "attention_head_dim"),
)
_VALUE_SIZES = ("v_head_dim", "values_head_dim")
# Classes whose query projection has, head by head, a query and its output gate.
_GATED = {
    *("transformers.Qwen3NextAttention", "transformers.Qwen3_5Attention", "transformers.Qwen3_5MoeAttention"),
    *("transformers.Qwen4ExpTextAttention", "nemo_automodel.Qwen3NextAttention"),
}

HeadsIn = Callable[[int, int], int]


@dataclass(frozen=True)
class Heads:
    """The heads of an attention module."""

    number: int
    size: int  # of queries and keys
    groups: int  # the number of heads of keys and values
    value_size: int

    @property
    def queries_per_group(self) -> int:
        """How many query heads share a head of keys and values."""
        return self.number // self.groups


def heads_of(module: nn.Module, all_rows: int, heads_in: HeadsIn) -> Heads | None:
    """Return the heads of a module, or None where its attributes do not give them, or give some that do not fit.

    Args:
        module: The module.
        all_rows: The rows of a weight.
        heads_in: Returns how many heads these rows are, for the numbers of heads of queries and of keys.
    """
    config = getattr(module, "config", None)
    numbers, sizes = _values(module, _NUMBERS), _values(module, _SIZES)
    if not sizes and len(numbers) == 1:
        [number] = numbers
        sizes = {all_rows // heads_in(number, _groups(module, number))}
    numbers, sizes = numbers | _values(config, _NUMBERS), sizes or _values(config, _SIZES)
    fitting = {
        (number, size)
        for number in numbers
        for size in sizes
        if heads_in(number, _groups(module, number)) * size == all_rows
    }
    if len(fitting) != 1:
        return None
    [(number, size)] = fitting
    of_values = _values(module, _VALUE_SIZES)
    return Heads(number, size, _groups(module, number), min(of_values) if len(of_values) == 1 else size)


def has_projections(module: nn.Module) -> bool:
    """Return whether a module has children that are called as the projections of queries and keys are."""
    return all(any(child_of(module, name) for name in names) for names in (_QUERIES, _KEYS))


def own_heads(module: nn.Module) -> Heads | None:
    """Return the heads of a module with a projection for queries, or None where it has none or they are not known."""
    queries = _first(module, _QUERIES)
    if queries is None:
        return None
    heads = heads_of(module, queries.rows, (lambda n, _: 2 * n) if _is_gated(module) else _all)
    return heads if heads is None or _values(module, _SIZES) or _agrees(module, heads) else None


def by_head(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the weights of an attention module, if it is one."""
    queries, heads = _first(module, _QUERIES), own_heads(module)
    if queries is None or heads is None:
        return
    if _is_gated(module):
        parts = [("query", 1, heads.size), ("gate", 1, heads.size)]
        if switches.split_heads:
            yield queries.p, rows(parts, each="head", times=heads.number)
        elif switches.split_qkv:
            yield queries.p, merged_rows(parts, times=heads.number)
    elif switches.split_heads:
        yield queries.p, rows([("query head", heads.number, heads.size)])
    if not switches.split_heads:
        return
    yield from _of_keys(_first(module, _KEYS), "key head", heads.size, heads)
    yield from _of_keys(_first(module, _VALUES), "value head", heads.value_size, heads)
    yield from of_positions(module, heads)
    for name in _MORE:
        yield from _of_keys(_first(module, [name]), "head", heads.size, heads)
    gates = _first(module, _GATES)
    if gates is not None and gates.rows == heads.number * heads.value_size:
        yield gates.p, rows([("gate head", heads.number, heads.value_size)])
    yield from output_after(module, heads)


def of_positions(module: nn.Module, heads: Heads) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the projection of positions of a module, if it has one."""
    yield from _of_keys(_first(module, _POSITIONS), "head", heads.size, heads)


def output_after(
    module: nn.Module, heads: Heads, names: Collection[str] = _OUTPUTS
) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the output projection of a module, if it has one whose columns are its heads' values."""
    output = _first(module, names)
    if output is not None and output.columns == heads.number * heads.value_size:
        yield output.p, columns("head", heads.number, heads.value_size)


def _all(number: int, groups: int) -> int:
    return number


def _agrees(module: nn.Module, heads: Heads) -> bool:
    """Return whether the other projections of a module have heads of the size that its queries alone have shown.

    Queries and output gates that are rows of one weight have twice the size.
    """
    keys, output = _first(module, _KEYS), _first(module, _OUTPUTS)
    return (keys is None or any(_of_keys(keys, "key head", heads.size, heads))) and (
        output is None or output.columns == heads.number * heads.value_size
    )


def _is_gated(module: nn.Module) -> bool:
    """Return whether the query projection of a module has an output gate beside every query."""
    return not _GATED.isdisjoint(kinds_of(module))


def _of_keys(weight: Weight | None, name: str, size: int, heads: Heads) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of a weight with as many heads as there are heads of keys, or of queries."""
    number = 0 if weight is None else weight.rows // size
    if weight is not None and number * size == weight.rows and number in (heads.groups, heads.number):
        yield weight.p, rows([(name, number, size)])


def _groups(module: nn.Module, number: int) -> int:
    """Return the number of heads of keys and values, of so many heads of queries."""
    per_group = _values(module, ("num_key_value_groups", "num_queries_per_kv"))
    if len(per_group) == 1 and number % min(per_group) == 0:
        return number // min(per_group)
    groups = _values(module, _KEY_NUMBERS) or _values(getattr(module, "config", None), _KEY_NUMBERS)
    return min(groups) if len(groups) == 1 and number % min(groups) == 0 else number


def _values(module: object, names: Collection[str]) -> set[int]:
    """Return the values of those attributes that are positive integers."""
    values = (getattr(module, name, None) for name in names)
    return {value for value in values if type(value) is int and value > 0}


def _first(module: nn.Module, names: Collection[str]) -> Weight | None:
    """Return the weight of the first of the children of these names."""
    return next(filter(None, (weight_of(module, name) for name in names)), None)
