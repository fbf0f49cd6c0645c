# SPDX-License-Identifier: Apache-2.0
"""Draws docs/assets/parts.png: what each switch makes of a weight. The matrices are those that from_model finds."""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import nn
from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, Phi3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from emerging_optimizers.adaptive_muon import ColumnBlocks, HybridAdaptiveMuon


PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "parts.png"
# Okabe and Ito's colors, told apart by the colour-blind.
QUERY, KEY, VALUE, OTHER = "#56B4E9", "#E69F00", "#009E73", "#CCCCCC"
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6}


class Attentions(nn.Module):
    """Those whose weights are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.multihead = nn.MultiheadAttention(32, 4, bias=False)
        self.grouped = LlamaAttention(LlamaConfig(**SIZES), 0)
        self.latent = DeepseekV3Attention(DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, **LATENT), 0)
        self.mlp = Phi3MLP(Phi3Config(**SIZES, pad_token_id=0))
        self.experts = MixtralExperts(MixtralConfig(**SIZES, num_local_experts=3))
        self.conv = nn.Conv1d(8, 24, 4, bias=False)


# Title, switch, parameter, and the colors and names of its parts, which repeat.
PANELS: Sequence[tuple[str, str, str, Sequence[tuple[str, str]]]] = (
    ("in_proj_weight\nof MultiheadAttention", "split_qkv", "multihead.in_proj_weight", [(QUERY, "Q"), (KEY, "K"), (VALUE, "V")]),
    ("the same", "split_heads", "multihead.in_proj_weight", [(QUERY, "q")] * 4 + [(KEY, "k")] * 4 + [(VALUE, "v")] * 4),
    ("q_proj, 4 heads", "split_heads", "grouped.q_proj.weight", [(QUERY, "q")]),
    ("k_proj, 2 groups", "split_heads", "grouped.k_proj.weight", [(KEY, "k")]),
    ("o_proj, 4 heads:\ncolumns", "split_heads", "grouped.o_proj.weight", [(VALUE, "o")]),
    ("kv_a_proj_with_mqa\n(latent attention)", "split_heads", "latent.kv_a_proj_with_mqa.weight", [(OTHER, "latent"), (KEY, "k, shared")]),
    ("kv_b_proj\n(latent attention)", "split_heads", "latent.kv_b_proj.weight", [(KEY, "k"), (VALUE, "v")]),
    ("gate_up_proj", "split_gate_up", "mlp.gate_up_proj.weight", [(OTHER, "gate"), (QUERY, "up")]),
    ("down_proj,\n3 experts", "stacked_experts", "experts.down_proj", [(VALUE, "expert")]),
    ("Conv1d, 24 x 8 x 4:\nflattened", "flatten_conv", "conv.weight", [(OTHER, "in x kernel")]),
)  # fmt: skip


def draw(
    axes: Axes, shape: tuple[int, int], blocks: Sequence[int], parts: Sequence[tuple[str, str]], across: bool
) -> None:
    """Draw a weight with its blocks, below or beside each other."""
    rows, columns = shape
    start = 0
    for index, size in enumerate(blocks):
        color, name = parts[index % len(parts)]
        x, y, width, height = (start, 0, size, rows) if across else (0, start, columns, size)
        axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.5))
        axes.text(x + width / 2, y + height / 2, name, ha="center", va="center", fontsize=8)
        start += size
    axes.set(xlim=(-0.5, 32.5), ylim=(96.5, -0.5), aspect="equal")
    axes.axis("off")


def blocks_of(switch: str, name: str) -> tuple[tuple[int, int], Sequence[int], bool]:
    """Return the shape of a parameter, its blocks with a switch, and whether they are columns."""
    model = Attentions()
    HybridAdaptiveMuon.from_model(model, **{"split_qkv": False, switch: True})
    p = model.get_parameter(name)
    blocks, form = getattr(p, "muon_parts", None), getattr(p, "muon_form", None)
    if form == "stack":  # the experts below each other
        return (p.size(0) * p.size(1), p.size(2)), (p.size(1),) * p.size(0), False
    if form == "flattened":
        return (p.size(0), p[0].numel()), (p.size(0),), False
    return tuple(p.shape), *((blocks.sizes, True) if isinstance(blocks, ColumnBlocks) else (blocks, False))


def main(path: Path = PICTURE) -> None:
    """Draw all panels in two rows, which are readable in a page's column."""
    figure, panels = plt.subplots(2, len(PANELS) // 2, figsize=(7.6, 8.4), layout="constrained")
    for axes, (title, switch, name, parts) in zip(panels.flat, PANELS, strict=True):
        shape, blocks, across = blocks_of(switch, name)
        draw(axes, shape, blocks, parts, across)
        axes.set_title(f"{title}\n\n{switch}", fontsize=8, loc="left")
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
