# SPDX-License-Identifier: Apache-2.0
"""Train a small Conformer-CTC with NeMo on speech made of tones, with data in runs/nemo_minimal.

python examples/nemo/minimal.py

The model and its optimizer are those of conformer_ctc.yaml, whose ``optim.name`` is adaptive_muon. No line here is about
the optimizer: NeMo finds it by its name. speech_to_text_ctc.py does the same with Hydra's command line.
"""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from nemo.collections.asr.models import EncDecCTCModel
from omegaconf import OmegaConf
from wavs import write_manifests


STEPS, FOLDER = 20, Path("runs/nemo_minimal")


class PrintLoss(Callback):
    """Prints the loss of every step."""

    def on_train_batch_end(self, trainer: pl.Trainer, model: pl.LightningModule, outputs: dict, *_: object) -> None:
        """Print the loss of a batch."""
        print(f"step {trainer.global_step} loss {outputs['loss'].item()}")


def main() -> None:
    """Train the model."""
    write_manifests(FOLDER, train=32, validation=4, letters=(3, 3))
    cfg = OmegaConf.load(Path(__file__).with_name("conformer_ctc.yaml"))
    cfg.model.train_ds.manifest_filepath = str(FOLDER / "train.json")
    cfg.model.validation_ds.manifest_filepath = str(FOLDER / "validation.json")

    pl.seed_everything(0)
    options = {"gradient_clip_val": 1.0, "enable_checkpointing": False, "logger": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(max_steps=STEPS, check_val_every_n_epoch=10, callbacks=[PrintLoss()], **options)
    model = EncDecCTCModel(cfg=cfg.model, trainer=trainer)
    trainer.fit(model)


if __name__ == "__main__":
    main()
