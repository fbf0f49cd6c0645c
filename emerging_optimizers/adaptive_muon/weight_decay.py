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
        cautious: Whether only elements decay whose sign is that of the update, which then moves them to zero as well.
    """

    share: Callable[[Number, float], Number] | None
    scaled: bool = False
    cautious: bool = False


# All but the last two are those of upstream's WeightDecayMixin. "cautious" is from Chen et al., "Cautious Weight Decay",
# arXiv:2510.12402: x <- x - lr (u + coefficient [u x >= 0] x). An update of zero counts as one of the same sign.
WEIGHT_DECAYS = {
    "decoupled": WeightDecay(lambda lr, coefficient: lr * coefficient),
    "independent": WeightDecay(lambda lr, coefficient: coefficient),
    "l2": WeightDecay(None),
    "palm": WeightDecay(lambda lr, coefficient: lr * lr * coefficient),
    "adaptive": WeightDecay(lambda lr, coefficient: lr * coefficient, scaled=True),
    "cautious": WeightDecay(lambda lr, coefficient: lr * coefficient, cautious=True),
}
