# SPDX-License-Identifier: Apache-2.0
"""Trains a CTC model, as any script of NeMo's does: nothing here knows of adaptive_muon, only the YAML names it."""

import lightning.pytorch as pl
from nemo.collections.asr.models import EncDecCTCModel
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
from nemo.utils.trainer_utils import resolve_trainer_cfg
from omegaconf import DictConfig


@hydra_runner(config_path=".", config_name="conformer_ctc")
def main(cfg: DictConfig) -> None:
    """Trains the model of a configuration."""
    trainer = pl.Trainer(**resolve_trainer_cfg(cfg.trainer))
    exp_manager(trainer, cfg.get("exp_manager", None))
    model = EncDecCTCModel(cfg=cfg.model, trainer=trainer)
    model.maybe_init_from_pretrained_checkpoint(cfg)
    trainer.fit(model)


if __name__ == "__main__":
    main()
