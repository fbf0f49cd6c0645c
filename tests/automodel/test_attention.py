# SPDX-License-Identifier: Apache-2.0
"""Automodel's attention with output gates or a fused weight: its heads, by Automodel's own forward."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.gpt2 import CausalSelfAttention
from nemo_automodel.components.models.qwen3_next.layers import Qwen3NextAttention
from side_by_side import normal
from torch import nn


def qwen3_next() -> tuple[nn.Module, dict[str, Any]]:
    """Four heads of queries and two of keys, of 8 rows each, and what its forward takes beside the input."""
    config: Any = SimpleNamespace(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config.rms_norm_eps, config.torch_dtype = 1e-6, "float64"
    backend = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", rope_fusion=False)
    return Qwen3NextAttention(config, 0, backend), {"freqs_cis": normal((1, 5, 8), 2).double()}


class Alone(nn.Module):
    """An attention module below one of another name, run on the same input each time."""

    def __init__(self, attention: nn.Module, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.inputs = nn.ModuleDict({"attention": attention.double()}), inputs
        for number, p in enumerate(attention.parameters()):
            p.data.copy_(normal(tuple(p.shape), number) * 0.3 if p.ndim > 1 else p)

    def forward(self) -> torch.Tensor:
        """Returns the output."""
        return self.layer["attention"](normal((1, 5, 32), 1).double(), **self.inputs)


SPLIT = {
    "Qwen3NextAttention": {"q_proj": "0 0* 1 1* 2 2* 3 3*", "k_proj": "01 23", "v_proj": "01* 23*"},
    "CausalSelfAttention": {"qkv_proj": "0 1 2 3 0 1 2 3 0* 1* 2* 3*"},
}
WHOLE = {"Qwen3NextAttention": "0123 0123", "CausalSelfAttention": "0123 0123 0123*"}


@pytest.mark.parametrize("name", SPLIT)
def test_each_block_reaches_its_heads(name: str) -> None:
    made = qwen3_next() if name == "Qwen3NextAttention" else (CausalSelfAttention(32, 4), {})
    model = Alone(*made)
    found = tiny_models.reach(model)[name]
    assert {leaf: blocks for leaf, blocks in found.items()} == {
        leaf: blocks.replace("0* 1 1* 2 2* 3 3*", "0 1 1 2 2 3 3") if leaf == "q_proj" else blocks
        for leaf, blocks in SPLIT[name].items()
    }
    [weights] = tiny_models.reach(model, by_head=False).values()
    assert [*weights.values()] == [WHOLE[name]]
