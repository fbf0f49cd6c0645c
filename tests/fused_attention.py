# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's attention modules with a fused weight, each made and run by itself."""

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import tiny_models
import torch
import transformers
from torch import nn


# Arguments of their constructors, and the shapes of what they take: texts, patches and windows.
_ARGUMENTS = {
    **dict.fromkeys(("dim", "embed_dim", "hidden_size", "dim_out", "hidden_size_output", "hidden_dim", "nx"), 32),
    **dict.fromkeys(("num_attention_heads", "num_heads", "window_size"), 4),
    **{"layer_idx": 0, "stage_idx": 0, "input_size": (8, 8), "query_stride": 1, "n_positions": 16, "dim_head": 8},
    **{"is_causal": True},
}
_SHAPES = ((1, 9), (9,), (1, 3, 3), (1, 8, 8), (1, 14, 14), (1, 4, 4), (1, 4, 9))


class Alone(nn.Module):
    """An attention module, below a module of another name: at the top, its output projection is a head."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({"attention": attention})

    def forward(self) -> None:
        """Run it on the first of several inputs that it takes."""
        attention: Any = self.layer["attention"]
        errors: list[Exception] = []
        generator, width = (
            torch.Generator().manual_seed(3),
            getattr(getattr(attention, "qkv", None), "in_features", 32),
        )
        for shape in _SHAPES:
            for size in 8, 4:  # of the rotary embedding
                x = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
                angles = torch.randn(2, shape[-1], size, generator=generator, dtype=torch.float64)
                inputs = {
                    **dict.fromkeys(("hidden_states", "x", "windowed_hidden_states", "hidden_state", "latents"), x),
                    **{"residual": torch.zeros_like(x), "alibi": torch.zeros(4, 1, 9, dtype=torch.float64)},
                    **{"position_embeddings": tuple(angles), "mask": torch.ones(1, 9)},
                    **{
                        "cu_seqlens": torch.tensor([0, 9], dtype=torch.int32),
                        "attention_dists": torch.zeros(9, 9).long(),
                    },
                }
                wanted = inspect.signature(attention.forward).parameters.values()
                arguments = {
                    p.name: inputs.get(p.name)
                    for p in wanted
                    if p.name in inputs or p.default is p.empty and p.kind == 1
                }
                try:
                    attention(**arguments)
                    return
                except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError) as error:
                    errors.append(error)
        raise ExceptionGroup("it takes none of the inputs", errors)


def alone(folder: str, name: str) -> Alone:
    """A module of Hugging Face's of this class, by its folder, made of the first config that it takes."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind, errors = getattr(module, name), []
    wanted = [p for p in inspect.signature(kind.__init__).parameters.values() if p.name != "self" and p.kind == 1]
    for make in sorted(_configs(module, folder), key=lambda c: ("Vision" in c.__name__) != ("Vision" in name)):
        try:
            config = tiny_models.small(make())
            config._attn_implementation = "eager"
            given = {"config": config, **_ARGUMENTS}
            attention = kind(**{p.name: given[p.name] for p in wanted if p.name in given or p.default is p.empty})
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
            errors.append(error)
            continue
        torch.manual_seed(0)
        for p in attention.double().eval().parameters():
            p.data = torch.randn_like(p) * 0.3 if p.ndim > 1 else p.data
        return Alone(attention)
    raise ExceptionGroup("no config fits", errors)


def _configs(module: ModuleType, folder: str) -> Iterator[type]:
    """The classes of configs that a model's module knows."""
    own = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    for value in (*vars(module).values(), *vars(own).values()):
        if inspect.isclass(value) and issubclass(value, transformers.PreTrainedConfig):
            yield value
