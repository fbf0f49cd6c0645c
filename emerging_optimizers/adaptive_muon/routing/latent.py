# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention, as Hugging Face's models since DeepSeek-V2 have it.

GLM-5 orthogonalizes the up-projections head by head, the keys' and the values' apart (arXiv:2602.15763, "Muon Split").
"""

from collections.abc import Iterator

from torch import nn

from emerging_optimizers.adaptive_muon.options import SplitOptions
from emerging_optimizers.adaptive_muon.routing.parts import ONE_MATRIX, Parts, columns, rows, weight_of


__all__ = ["in_latent", "is_latent"]

_SIZES = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_NUMBERS = ("num_heads", "num_attention_heads", "n_heads")


def is_latent(module: nn.Module) -> bool:
    """Return whether a module is latent attention, by its attributes."""
    return _heads(module) is not None and all(type(getattr(module, name, None)) is int for name in _SIZES)


def in_latent(module: nn.Module, switches: SplitOptions) -> Iterator[tuple[nn.Parameter, Parts]]:
    """Yield the parts of the weights of a module, if it is latent attention.

    Of the projection down, ``kv_a_proj_with_mqa``, the rows of the latent vector and those of the key with positions,
    which all heads share, are two matrices.
    """
    number = _heads(module)
    if not switches.split_heads or number is None or not is_latent(module):
        return
    rank, rope, nope, value = (getattr(module, name) for name in _SIZES)
    for name, sizes, each in (
        ("q_proj", [("query head", number, nope + rope)], ""),
        ("q_b_proj", [("query head", number, nope + rope)], ""),
        ("kv_a_proj_with_mqa", [("latent vector", 1, rank), ("shared key", 1, rope)], ""),
        ("kv_b_proj", [("key", 1, nope), ("value", 1, value)], "head"),
    ):
        weight, times = weight_of(module, name), number if each else 1
        if weight is not None and weight.rows == times * sum(count * size for _, count, size in sizes):
            yield weight.p, rows(sizes, each=each, times=times)
    down, gates = weight_of(module, "q_a_proj"), weight_of(module, "gate_proj")
    if down is not None:
        yield down.p, ONE_MATRIX
    if gates is not None and gates.rows == number * value:
        yield gates.p, rows([("gate head", number, value)])
    output = weight_of(module, "o_proj")
    if output is not None and output.columns == number * value:
        yield output.p, columns("head", number, value)


def _heads(module: nn.Module) -> int | None:
    """Return the number of heads that a module has as an attribute."""
    numbers = [getattr(module, name, None) for name in _NUMBERS]
    return next((number for number in numbers if type(number) is int), None)
