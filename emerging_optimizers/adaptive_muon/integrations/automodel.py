# SPDX-License-Identifier: Apache-2.0
"""NeMo Automodel: an optimizer config that its recipes build."""

import logging
from dataclasses import dataclass
from typing import ClassVar, override

import nemo_automodel
import torch
from nemo_automodel.components.optim.optimizer import OptimizerConfig, _trainable_params_or_groups
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from emerging_optimizers.adaptive_muon.integrations.options import AdaptiveMuonOptions
from emerging_optimizers.adaptive_muon.options import Options
from emerging_optimizers.adaptive_muon.versions import require_supported


__all__ = ["AdaptiveMuonConfig"]

_SUPPORTED = (0, 7), (0, 8)  # setup.py asks pip for the same
_logger = logging.getLogger(__name__)  # as Automodel's own modules log


@dataclass
class AdaptiveMuonConfig(AdaptiveMuonOptions, OptimizerConfig):
    """The keys of Automodel's ``optimizer`` block, whose ``_target_`` is this class.

    ``lr`` is the learning rate of the matrices. The other keys are those of
    :class:`~emerging_optimizers.adaptive_muon.integrations.options.AdaptiveMuonOptions`, and
    ``param_group_overrides`` of Automodel's ``OptimizerConfig``.
    """

    # It would take Megatron-FSDP's flat shards of a matrix for the matrix.
    supports_megatron_fsdp_sharding: ClassVar[bool] = False

    lr: float = Options.lr

    @override
    def build(
        self, model: nn.Module, *, device_mesh: DeviceMesh | None = None, is_peft: bool = False
    ) -> list[torch.optim.Optimizer]:
        """Build one optimizer for each part of the model. Frozen parameters are left out.

        Args:
            model: The model, sharded or not; or its pipeline stages, in ``model.parts``.
            device_mesh: Not used. A DTensor has its mesh.
            is_peft: Not used.

        Raises:
            RuntimeError: If the version of Automodel is not supported.
            ValueError: As :class:`~emerging_optimizers.adaptive_muon.HybridAdaptiveMuon`.
        """
        require_supported("nemo-automodel", str(nemo_automodel.__version__), _SUPPORTED, RuntimeError)
        return [self._build_part(part) for part in getattr(model, "parts", [model])]

    def _build_part(self, part: nn.Module) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer(part, _trainable_params_or_groups(part, self.param_group_overrides), self.lr)
        bases = dict(optimizer.param_groups[0])
        for group in optimizer.param_groups:
            # Automodel's scheduler sets each group's rate to lr_mult times that of the first group.
            for key, multiplier in (("lr", "lr_mult"), ("weight_decay", "wd_mult")):
                if multiplier in group and bases[key]:
                    group[multiplier] *= group[key] / bases[key]
        _logger.info("adaptive_muon: %s", optimizer.describe(each=False))
        return optimizer
