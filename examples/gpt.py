# SPDX-License-Identifier: Apache-2.0
"""A small byte-level GPT with the paper's GPT-2 choices: no biases, no dropout, learned positions, a tied head."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """How large the model is.

    Attributes:
        layers: Number of blocks.
        width: Length of the vector that stands for a byte inside the model.
        heads: Attention heads a block; they share the width.
        context: Bytes the model sees at once.
        vocabulary: One entry a byte value.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    vocabulary: int = 256


class Attention(nn.Module):
    """Causal self-attention. Query, key and value are separate matrices: Muon orthogonalizes each on its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key = nn.Linear(shape.width, shape.width, bias=False)
        self.value = nn.Linear(shape.width, shape.width, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes each position (batch, time, width) with those before it."""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then a two-layer perceptron; each reads a normalized copy and adds to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width, bias=False)
        self.attention = Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.width, bias=False)
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps the stream (batch, time, width) to the stream after this block."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Predicts the next byte.

    Args:
        shape: The model's sizes.
        seed: The initial weights depend on this number and the shape only.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self._initialize(torch.Generator().manual_seed(seed))

    def _initialize(self, generator: torch.Generator) -> None:
        """GPT-2's: normal with deviation 0.02, smaller by sqrt(2 layers) where a block adds to the stream."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                adds_to_stream = name.endswith(("output.weight", "down.weight"))
                deviation = 0.02 * ((2 * len(self.blocks)) ** -0.5 if adds_to_stream else 1.0)
                nn.init.normal_(weight, std=deviation, generator=generator)

    def forward(self, text: Tensor) -> Tensor:
        """Maps bytes (batch, time) to scores of the next byte (batch, time, vocabulary)."""
        x = self.tokens(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)  # the head is the embedding, as in GPT-2

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte of windows (batch, context + 1): each byte predicted from those before."""
        scores = self(windows[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())
