# SPDX-License-Identifier: Apache-2.0
"""A model's weights against the same model with separate weights, one for each matrix that they hold."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import tiny_models
import torch
from side_by_side import difference, smooth
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon


# Returns the matrices in a weight, or in the places of its elements.
Apart = Callable[[torch.Tensor], list[torch.Tensor]]


class Language(nn.Module):
    """A model of Hugging Face's that returns its loss."""

    def __init__(self, kind: str, change: Any = None) -> None:
        super().__init__()
        self.body = tiny_models.tiny(kind, change).float()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns a loss."""
        return self.body(input_ids=tokens).last_hidden_state.tanh().square().mean()


def apart_from(model: nn.Module, rules: Mapping[str, Apart], optimizer: HybridAdaptiveMuon) -> dict[str, Any]:
    """For each matrix of AdaptiveMuon: its parameter, and where the elements of each part are, by an other road."""
    places = {}
    for name, p, route in optimizer.routes:
        if route.algorithm == "adaptive_muon":
            stored = torch.arange(p.numel()).view(p.shape)
            index = stored.mT if route.transposed else stored
            ends = sorted((end for end in rules if name.endswith(end)), key=len)
            places[name] = p, (rules[ends[-1]](index) if ends else [index])
    assert all(any(name.endswith(end) for name in places) for end in rules)
    return places


def gradients(model: nn.Module, step: int) -> None:
    """The model's own, of a batch."""
    model.zero_grad()
    model(torch.randint(90, (2, 7), generator=torch.Generator().manual_seed(step))).backward()


def check_separate(
    make: Callable[[], nn.Module], switches: Mapping[str, bool], rules: Mapping[str, Apart], method: str
) -> None:
    """Checks three steps of a model, and of matrices that are its weights' parts, on the same gradients; saved and loaded.

    Args:
        make: Returns the model, which returns its loss for tokens.
        switches: What is passed to ``from_model``.
        rules: How each weight with such an end to its name is made of matrices: (out, in) ones.
        method: The second-moment method.
    """
    torch.manual_seed(0)
    model, rate = make(), 1e-2
    options = {"moment2_method": method, "weight_decay": 0.1, "fp32_matmul_prec": "highest", **smooth(method)}

    def optimizer_of(model: nn.Module) -> HybridAdaptiveMuon:
        return HybridAdaptiveMuon.from_model(model, rate, scalar_lr=0.0, **options, **switches)

    optimizer = optimizer_of(model)
    places = apart_from(model, rules, optimizer)
    parts = {name: [nn.Parameter(p.detach().flatten()[i]) for i in each] for name, (p, each) in places.items()}
    separate = AdaptiveMuon([part for each in parts.values() for part in each], rate, **options)
    for step in range(3):
        gradients(model, step)
        for name, (p, each) in places.items():
            for part, place in zip(parts[name], each, strict=True):
                part.grad = p.grad.flatten()[place].clone()
        if step == 2:  # with what was saved
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            optimizer = optimizer_of(model)
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        optimizer.step()
        separate.step()
    for name, (p, each) in places.items():
        for part, place in zip(parts[name], each, strict=True):
            assert difference(p.detach().flatten()[place], part.detach()) <= 1e-6, name
