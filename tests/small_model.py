# SPDX-License-Identifier: Apache-2.0
"""A small language model with one of everything that is routed, and its training."""

import torch
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.query, self.out_proj = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(2, 4))

    def forward(self, x):
        return x + self.out_proj(self.query(self.norm(x)) + self.pos_bias_u.sum())


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.positions = nn.Embedding(13, 8), nn.Embedding(8, 8)
        self.table = nn.Parameter(torch.zeros(1, 5, 8))
        self.conv, self.lstm = nn.Conv1d(8, 8, 1), nn.LSTM(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scores = nn.Linear(8, 13, bias=False)
        if tied:
            self.scores.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(tokens % 8) + self.table[:, :1]
        x = self.conv(x.mT).mT
        x = x + self.lstm(x)[0]
        for block in self.blocks:
            x = block(x)
        return self.scores(x)


def train(model, optimizer, steps):
    for step in steps:
        tokens = torch.randint(13, (2, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1).flatten()).backward()
        optimizer.step()


def model_and_optimizer(method="namo_d", tied=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model(tied).to(dtype)
    return model, HybridAdaptiveMuon.from_model(model, lr=1e-2, moment2_method=method, scalar_lr=1e-3, **options)


def names_of(optimizer, use_muon):
    return {n for g in optimizer.param_groups if g["use_muon"] is use_muon for n in g["param_names"]}


MATRICES = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("query", "out_proj")}
