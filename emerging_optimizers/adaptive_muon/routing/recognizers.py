# SPDX-License-Identifier: Apache-2.0
"""Which rows or columns of a model's weights are one matrix: what each kind of module shows."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.routing.fused import fused_heads, has_fused, in_fused
from emerging_optimizers.adaptive_muon.routing.gate_up import in_gated
from emerging_optimizers.adaptive_muon.routing.latent import in_latent, is_latent
from emerging_optimizers.adaptive_muon.routing.parts import (
    Parts,
    child_of,
    columns,
    merged_rows,
    rows,
    weight_of,
)
from emerging_optimizers.adaptive_muon.routing.projections import by_head, has_projections, output_after, own_heads


__all__ = ["Found", "find_parts", "is_attention"]

# Enough to say that a module is not recognized, not to recognize it.
_ATTENTION = re.compile(r"(?!.*mlp$)(.*attention|.*attn|.*mha|.*deltanet$)", re.IGNORECASE)

Recognizer = Callable[[nn.Module, SplitOptions], Iterator[tuple[nn.Parameter, Parts]]]


@dataclass(frozen=True)
class Found:
    """What the modules of a model show of a weight, which several may use.

    Args:
        parts: Its parts by each module and recognizer; the first is to be shown.
        modules: The modules.
    """

    parts: list[Parts] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def agree(self) -> bool:
        """Whether the matrices are the same in all uses, in whatever words."""
        return all(parts.blocks == self.parts[0].blocks for parts in self.parts)


def find_parts(model: nn.Module, switches: SplitOptions) -> dict[nn.Parameter, Found]:
    """Return what is found of the weights of a model that are recognized."""
    found: dict[nn.Parameter, Found] = {}
    for module in model.modules():
        for recognize in _RECOGNIZERS:
            for p, parts in recognize(module, switches):
                of_weight = found.setdefault(p, Found())
                of_weight.parts.append(parts)
                of_weight.modules.append(module)
    return found


def is_attention(module: nn.Module) -> bool:
    """Return whether a module may be attention, by its class's name or its children's."""
    return (
        _is_called_attention(module)
        or (_mentions_attention(module) and not any(map(_mentions_attention, [*module.modules()][1:])))  # not a layer
        or has_projections(module)
        or has_fused(module)
        or is_latent(module)
    )


def _in_multihead(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the weights of torch's ``MultiheadAttention``."""
    if not isinstance(module, nn.MultiheadAttention):
        return
    number, size, width = module.num_heads, module.head_dim, module.embed_dim
    fused = weight_of(module, "in_proj_weight")
    sizes = [(f"{name} head", number, size) for name in ("query", "key", "value")]
    if fused is not None and fused.rows == 3 * width:
        if switches.split_heads:
            yield fused.p, rows(sizes)
        elif switches.split_qkv:
            yield fused.p, merged_rows(sizes)
    if not switches.split_heads:
        return
    for leaf, one in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), sizes, strict=True):
        weight = weight_of(module, leaf)
        if weight is not None and weight.rows == width:
            yield weight.p, rows([one])
    output = weight_of(module, "out_proj")
    if output is not None and output.columns == width:
        yield output.p, columns("head", number, size)


def _in_projections(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of separate projections, except those of latent attention."""
    return iter(()) if is_latent(module) else by_head(module, switches)


def _after_attention(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of an output projection that stands beside the attention, as BERT's does."""
    if not switches.split_heads or not _is_called_attention(module):
        return  # a layer's ``output`` may be that of its MLP
    for name in ("self", "attention", "self_attention", "longformer_self_attn", "attn"):
        attention = child_of(module, name)
        heads = None if attention is None else fused_heads(attention) or own_heads(attention)
        if attention is not None and heads is not None and not any(output_after(attention, heads)):
            yield from output_after(module, heads, ("output.dense", "output", "post"))


def _is_called_attention(module: nn.Module) -> bool:
    return any(cls.__name__.endswith(("Attention", "Attn", "DeltaNet")) for cls in type(module).__mro__)


def _mentions_attention(module: nn.Module) -> bool:
    return any(_ATTENTION.match(cls.__name__) for cls in type(module).__mro__)


_RECOGNIZERS: Sequence[Recognizer] = (_in_multihead, in_fused, in_latent, _in_projections, _after_attention, in_gated)
