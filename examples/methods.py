# SPDX-License-Identifier: Apache-2.0
"""The six methods: for each name, the settings it is run with and the optimizers they make."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt import GPT
from torch import Tensor
from torch.optim import AdamW, Optimizer

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.orthogonalized_optimizers import Muon


ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
MUON: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": True,
    "weight_decay": 0.1,
    "scale_mode": "spectral",
    "extra_scale_factor": 0.2,
    "fp32_matmul_prec": "highest",  # exact, and the fastest on a CPU, which multiplies bfloat16 slowly
}
# arXiv:2602.17080: slower second moment, corrected bias, decay scaled like the update.
PAPER: dict[str, Any] = {"beta2": 0.99, "bias_correction": True, "weight_decay_method": "adaptive"}


@dataclass(frozen=True)
class Method:
    """One way to train the model.

    Attributes:
        build: Makes the optimizers from (model, matrices' rate, rate of all else, settings).
        settings: The keyword arguments that distinguish this method.
        rates: Where the sweep of learning rates begins; it goes on while the best is at an end.
    """

    build: Callable[[GPT, float, float, dict[str, Any]], list[Optimizer]]
    settings: dict[str, Any]
    rates: tuple[float, ...]

    def optimizers(self, model: GPT, lr: float, scalar_lr: float) -> list[Optimizer]:
        """Returns the optimizers that together hold each parameter once.

        Args:
            model: The model to train.
            lr: Learning rate of the hidden matrices.
            scalar_lr: Learning rate of the embeddings and norms, which AdamW trains in every method.
        """
        return self.build(model, lr, scalar_lr, self.settings)


def _split(model: GPT) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the hidden matrices, and all the rest: embeddings (one is the head too) and norms."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def _adamw(model: GPT, lr: float, scalar_lr: float, settings: dict[str, Any]) -> list[Optimizer]:
    matrices, rest = _split(model)
    decayed = {"params": matrices, "lr": lr, "weight_decay": settings["weight_decay"]}
    return [AdamW([decayed, {"params": rest, "weight_decay": 0.0}], lr=scalar_lr, **ADAM)]


def _upstream_muon(model: GPT, lr: float, scalar_lr: float, settings: dict[str, Any]) -> list[Optimizer]:
    matrices, rest = _split(model)
    return [Muon(matrices, lr=lr, **settings), AdamW(rest, lr=scalar_lr, weight_decay=0.0, **ADAM)]


def _adaptive_muon(model: GPT, lr: float, scalar_lr: float, settings: dict[str, Any]) -> list[Optimizer]:
    scalars = {"scalar_lr": scalar_lr, "scalar_eps": ADAM["eps"], "scalar_weight_decay": 0.0, "betas": ADAM["betas"]}
    return [HybridAdaptiveMuon.from_model(model, lr=lr, **settings, **scalars)]


def _doubling(first: float) -> tuple[float, ...]:
    return tuple(first * 2**k for k in range(5))


METHODS: dict[str, Method] = {
    "adamw": Method(_adamw, {"weight_decay": 0.1}, _doubling(1e-3)),
    "muon": Method(_upstream_muon, MUON, _doubling(2e-3)),
    "adamuon": Method(_adaptive_muon, MUON | {"moment2_method": "adamuon", "beta2": 0.95}, _doubling(4e-4)),
    "normuon": Method(_adaptive_muon, MUON | {"moment2_method": "normuon", "beta2": 0.95}, _doubling(4e-3)),
    "namo": Method(_adaptive_muon, MUON | PAPER | {"moment2_method": "namo"}, _doubling(2e-2)),
    "namo_d": Method(
        _adaptive_muon, MUON | PAPER | {"moment2_method": "namo_d", "namo_d_clamp": 0.75}, _doubling(2e-2)
    ),
}
