# SPDX-License-Identifier: Apache-2.0
"""Hooks around the weight update, as upstream has them since 0.5."""

from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.versions import upstream_version


__all__ = ["WeightUpdateHook", "check_upstream_has_hooks", "is_hook"]


@runtime_checkable
class WeightUpdateHook(Protocol):
    """What upstream's hooks are: HyperballHook, RadialBrakeHook, RelativeUpdateHook, and your own."""

    def pre_weight_update_inplace(self, p: torch.Tensor, update: torch.Tensor) -> Any:
        """Change both in place, if at all, before ``p -= lr * update``, when the weight has decayed.

        Returns:
            What :meth:`post_weight_update_inplace` gets.
        """

    def post_weight_update_inplace(self, p: torch.Tensor, pre_update_state: Any) -> None:
        """Change ``p`` in place, if at all, after the update and after ``post_weight_update_fn_inplace``."""


def is_hook(value: Any) -> bool:
    """Return whether a value has a hook's methods. A class of hooks, which is to be called first, is none."""
    return isinstance(value, WeightUpdateHook) and not isinstance(value, type)


def check_upstream_has_hooks(hook: WeightUpdateHook | None) -> None:
    """Raise a ``ValueError`` for a hook where the version of upstream has none."""
    require(
        hook is None or find_spec("emerging_optimizers.weight_update_hooks"),
        f"weight_update_hook must be None with emerging-optimizers {upstream_version()}, which has no such hooks",
        hook,
        "Install emerging-optimizers 0.5 or newer.",
    )
