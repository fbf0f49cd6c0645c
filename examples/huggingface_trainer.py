# SPDX-License-Identifier: Apache-2.0
"""Train a small GPT-2 with Hugging Face's Trainer, checkpoints in runs/huggingface_trainer.

python examples/huggingface_trainer.py    # again: resumes from the last checkpoint
"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from emerging_optimizers.adaptive_muon.integrations.huggingface import optimizer_cls_and_kwargs


FOLDER = Path("runs/huggingface_trainer")
FOLDER.mkdir(parents=True, exist_ok=True)
set_seed(0)
config = GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)

# Text that needs no download: every token is 3 times the one before plus 1.
rows = torch.randint(256, (640, 1))
for _ in range(31):
    rows = torch.cat([rows, (3 * rows[:, -1:] + 1) % 256], 1)

args = TrainingArguments(
    FOLDER,
    max_steps=20,
    per_device_train_batch_size=16,
    learning_rate=2e-2,  # of the hidden matrices; Trainer's default, 5e-5, is far too small for them
    weight_decay=0.01,
    lr_scheduler_type="cosine",
    warmup_steps=5,
    logging_steps=1,
    save_steps=10,
    report_to="none",
)
trainer = Trainer(
    model,
    args,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    # Not (HybridAdaptiveMuon, {...}): Trainer gives a class no names, so embeddings and heads would go to AdaptiveMuon.
    optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(
        model,
        args,
        scalar_lr=2e-3,  # of everything else, which AdamW trains
        moment2_method="namo_d",
        nesterov=True,
    ),
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(FOLDER))
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']} loss {entry['loss']}")
