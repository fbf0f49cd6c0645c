# SPDX-License-Identifier: Apache-2.0
"""NeMo Automodel: an optimizer config that its recipes build."""

from dataclasses import dataclass
from typing import Any, ClassVar, override

import torch
from absl import logging
from nemo_automodel.components.optim.optimizer import OptimizerConfig, _trainable_params_or_groups
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from emerging_optimizers.adaptive_muon.integrations.options import AdaptiveMuonOptions
from emerging_optimizers.adaptive_muon.options import Options


__all__ = ["AdaptiveMuonConfig"]


@dataclass
class AdaptiveMuonConfig(AdaptiveMuonOptions, OptimizerConfig):
    """The keys of Automodel's ``optimizer`` block, whose ``_target_`` is this class.

    ``lr`` is the learning rate of the matrices; for the others see
    :class:`~emerging_optimizers.adaptive_muon.integrations.options.AdaptiveMuonOptions`, and Automodel's
    ``OptimizerConfig`` for ``param_group_overrides``.
    """

    # It would take Megatron-FSDP's flat pieces of a matrix for the matrix.
    supports_megatron_fsdp_sharding: ClassVar[bool] = False

    lr: float = Options.lr

    @override
    def build(
        self, model: nn.Module, *, device_mesh: DeviceMesh | None = None, is_peft: bool = False
    ) -> list[torch.optim.Optimizer]:
        """Builds one optimizer for each part of the model. Frozen parameters are left out.

        Args:
            model: The model, sharded or not; or its pipeline stages, in ``model.parts``.
            device_mesh: Not needed: DTensors know their mesh.
            is_peft: Not needed.

        Raises:
            ValueError: As :class:`~emerging_optimizers.adaptive_muon.HybridAdaptiveMuon`.
        """
        return [self._of_part(part) for part in getattr(model, "parts", [model])]

    def _of_part(self, part: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of one part."""
        optimizer = self.make_optimizer(part, _trainable_params_or_groups(part, self.param_group_overrides), self.lr)
        first = optimizer.param_groups[0]
        for group in optimizer.param_groups:
            # Automodel's scheduler sets each group's rate to lr_mult times that of the first group.
            _scale(group, "lr_mult", group["lr"], first["lr"])
            _scale(group, "wd_mult", group["weight_decay"], first["weight_decay"])
        logging.info("adaptive_muon: %s", optimizer.describe(each=False))
        return optimizer


def _scale(group: dict[str, Any], multiplier: str, own: float, base: float) -> None:
    """Makes a group's multiplier, if it has one, keep what its value is beside the base value."""
    if multiplier in group and base:
        group[multiplier] *= own / base
