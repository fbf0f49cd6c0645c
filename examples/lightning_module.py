# SPDX-License-Identifier: Apache-2.0
"""Train a LightningModule, checkpoints in runs/lightning_module.

python examples/lightning_module.py    # again: resumes from the last checkpoint
"""

from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


STEPS, WIDTH, VOCABULARY, FOLDER = 20, 64, 256, Path("runs/lightning_module")


class LanguageModel(lightning.LightningModule):
    """A small transformer."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(WIDTH, 4, dropout=0.0, batch_first=True) for _ in range(2)]
        self.model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *layers, nn.Linear(WIDTH, VOCABULARY))

    def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        logits = self.model(tokens).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, (3 * tokens.flatten() + 1) % VOCABULARY)
        print(f"step {self.global_step + 1} loss {loss.item()}")
        return loss

    def configure_optimizers(self) -> dict:
        """Make the optimizer and its schedule."""
        # Make it here, not earlier: under the strategy "ddp" from_model sees which ranks can share the work.
        # lr is the rate of the hidden matrices, scalar_lr that of everything else, which AdamW trains.
        optimizer = HybridAdaptiveMuon.from_model(
            self, lr=2e-2, scalar_lr=2e-3, moment2_method="namo_d", nesterov=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    lightning.seed_everything(0)
    rows = torch.randint(VOCABULARY, (160, 32))  # ten batches an epoch
    # Lightning 2.4 repeats the first batch after it resumes. The StatefulDataLoader of torchdata prevents this.
    saving = ModelCheckpoint(FOLDER, filename="{step:06}", save_top_k=-1)
    trainer = lightning.Trainer(max_steps=STEPS, gradient_clip_val=1.0, callbacks=[saving], logger=False)
    saved = sorted(FOLDER.glob("*.ckpt"))
    trainer.fit(LanguageModel(), DataLoader(rows, batch_size=16), ckpt_path=saved[-1] if saved else None)
