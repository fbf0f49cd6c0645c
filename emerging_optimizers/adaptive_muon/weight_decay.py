# SPDX-License-Identifier: Apache-2.0
"""The weight decay methods: what each takes from the weight, or adds to the gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


__all__ = ["WEIGHT_DECAYS", "WeightDecay"]

Number = float | torch.Tensor


@dataclass(frozen=True)
class WeightDecay:
    """A way of weight decay.

    Args:
        share: Returns the share of itself that a weight loses, given learning rate and coefficient; None where the decay
            is added to the gradient instead.
        scaled: Whether the adaptive scale D scales the decay too, as in the paper's NAMO and NAMO-D.
    """

    share: Callable[[Number, float], Number] | None
    scaled: bool = False


# All but the last are those of upstream's WeightDecayMixin.
WEIGHT_DECAYS = {
    "decoupled": WeightDecay(lambda lr, coefficient: lr * coefficient),
    "independent": WeightDecay(lambda lr, coefficient: coefficient),
    "l2": WeightDecay(None),
    "palm": WeightDecay(lambda lr, coefficient: lr * lr * coefficient),
    "adaptive": WeightDecay(lambda lr, coefficient: lr * coefficient, scaled=True),
}
