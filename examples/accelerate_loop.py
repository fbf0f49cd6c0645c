# SPDX-License-Identifier: Apache-2.0
"""Train in a loop of your own with Hugging Face's Accelerate, checkpoints in runs/accelerate_loop.

accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py    # again: resumes from the last checkpoint
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


STEPS, SAVE_EVERY, WIDTH, VOCABULARY, FOLDER = 20, 10, 64, 256, Path("runs/accelerate_loop")


def main() -> None:
    """Train the model."""
    accelerator = Accelerator()
    set_seed(0)
    layers = [nn.TransformerEncoderLayer(WIDTH, 4, dropout=0.0, batch_first=True) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *layers, nn.Linear(WIDTH, VOCABULARY))
    rows = torch.randint(VOCABULARY, (1280, 32))  # each token's target is 3 times the token plus 1

    # First the model: with several processes Accelerate wraps it, and from_model sees which ranks can share the work.
    # lr is the rate of the hidden matrices, scalar_lr that of everything else, which AdamW trains.
    model = accelerator.prepare(model)
    optimizer = HybridAdaptiveMuon.from_model(model, lr=2e-2, scalar_lr=2e-3, moment2_method="namo_d", nesterov=True)
    # Accelerate steps a schedule once per process, so its length is that of all processes together.
    steps = STEPS * accelerator.num_processes
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    optimizer, loader, schedule = accelerator.prepare(optimizer, DataLoader(rows, batch_size=16), schedule)

    done = 0
    if saved := sorted(FOLDER.glob("step-*")):
        accelerator.load_state(saved[-1])
        done = int(saved[-1].name.removeprefix("step-"))
    for step, tokens in zip(range(done + 1, STEPS + 1), accelerator.skip_first_batches(loader, done), strict=False):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (3 * tokens.flatten() + 1) % VOCABULARY)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step} loss {loss.item()}")
        if step % SAVE_EVERY == 0:
            accelerator.save_state(FOLDER / f"step-{step:06}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
