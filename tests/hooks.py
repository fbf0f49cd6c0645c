# SPDX-License-Identifier: Apache-2.0
"""Hooks around the weight update: upstream's where it has some, and one of our own, which uses all that a hook may."""

from importlib.util import find_spec
from typing import Any

import torch


UPSTREAM_HAS_HOOKS = find_spec("emerging_optimizers.weight_update_hooks") is not None


class Restrained:
    """Makes the update as long as the weight, and goes half the way to the weight's new norm."""

    def pre_weight_update_inplace(self, p: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        norm = _norm(p)
        update.mul_((norm / _norm(update)).to(update.dtype))
        return norm

    def post_weight_update_inplace(self, p: torch.Tensor, pre_update_state: torch.Tensor) -> None:
        norm = _norm(p)
        p.mul_(((norm + pre_update_state) / (2 * norm)).to(p.dtype))


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


HOOKS: dict[str, Any] = {"ours": Restrained()}
if UPSTREAM_HAS_HOOKS:
    from emerging_optimizers.weight_update_hooks import HyperballHook, RadialBrakeHook, RelativeUpdateHook

    HOOKS |= {
        "hyperball": HyperballHook(3.0),
        "radial brake": RadialBrakeHook(outward_scale=0.25, inward_scale=0.5),
        "relative update": RelativeUpdateHook(),
    }
