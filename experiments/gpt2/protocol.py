# SPDX-License-Identifier: Apache-2.0
"""How every run trains: the paper's protocol (arXiv:2602.17080) at sizes for two CPU cores and for one GPU."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path


# The model, the text and the training loop are the demo's.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from gpt import Shape
from methods import METHODS
from training import Protocol


__all__ = ["METHODS", "ON_DEVICE", "SIZES", "PaperProtocol", "reported", "tuning"]


@dataclass(frozen=True)
class PaperProtocol(Protocol):
    """Warm-up over a fifth of the steps, then a constant rate, as the paper's sweeps have it."""

    warmup: float = 0.2

    def rate_factor(self, step: int) -> float:
        """Returns what the learning rate is multiplied by at a step counted from zero."""
        return min(1.0, (step + 1) / max(1, round(self.warmup * self.steps)))


SIZES = {
    "cpu": PaperProtocol(steps=400, batch=8, shape=Shape(layers=4, width=192, heads=6, context=128)),
    # GPT-2 small on bytes, 10 000 steps as in the paper's sweeps.
    "gpt2": PaperProtocol(steps=10_000, batch=32, shape=Shape(layers=12, width=768, heads=12, context=1024)),
    # The same model for as long as a few minutes on an H100 go.
    "gpt2-short": PaperProtocol(steps=300, batch=8, shape=Shape(layers=12, width=768, heads=12, context=1024)),
    # For tests: whether everything works together.
    "tiny": PaperProtocol(steps=4, batch=2, shape=Shape(layers=1, width=16, heads=2, context=16)),
}


# Settings of all methods by device. On a GPU full precision would take most of the time.
ON_DEVICE = {"cpu": {}, "cuda": {"fp32_matmul_prec": "medium"}}


def tuning(protocol: PaperProtocol) -> PaperProtocol:
    """Returns the protocol of a run that chooses a rate: one evaluation, after the last step."""
    return replace(protocol, evaluations=1, evaluation_windows=512)


def reported(protocol: PaperProtocol) -> PaperProtocol:
    """Returns the protocol of a run that is reported: a curve."""
    return replace(protocol, evaluations=8, evaluation_windows=256)
