# SPDX-License-Identifier: Apache-2.0
"""Train with FSDP2 in plain PyTorch: meta-device init, a schedule, gradient clipping, checkpoints in runs/fsdp2.

torchrun --nproc_per_node 2 examples/fsdp2.py    # again, on any number of ranks: resumes from the last checkpoint
"""

import os
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


STEPS, SAVE_EVERY, WIDTH, VOCABULARY, FOLDER = 20, 10, 64, 256, Path("runs/fsdp2")
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.set_default_device(device := "cuda" if torch.cuda.is_available() else "cpu")
dist.init_process_group()
with torch.device("meta"):  # no memory yet
    layers = [nn.TransformerEncoderLayer(WIDTH, 4, dropout=0.0, batch_first=True) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *layers, nn.Linear(WIDTH, VOCABULARY, bias=False))
for layer in layers:
    fully_shard(layer)
fully_shard(model).to_empty(device=device)
torch.manual_seed(dist.get_rank())  # every rank draws its own shards
for name, p in model.named_parameters():
    nn.init.normal_(p, std=0.02) if p.ndim == 2 else nn.init.constant_(p, "norm" in name and "weight" in name)
# After fully_shard and to_empty, which replace parameters. lr is the rate of the hidden matrices, scalar_lr that of everything else, which AdamW trains.
optimizer = HybridAdaptiveMuon.from_model(model, lr=2e-2, scalar_lr=2e-3, moment2_method="namo_d", nesterov=True)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / STEPS))
if saved := sorted(FOLDER.glob("step-*")):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    states = {"model": of_model, "optimizer": of_optimizer, "schedule": schedule.state_dict()}
    checkpoint.load(states, checkpoint_id=saved[-1])  # in place
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    schedule.load_state_dict(states["schedule"])
for step in range(schedule.last_epoch, STEPS):
    torch.manual_seed(step * dist.get_world_size() + dist.get_rank())  # every step and rank has its own tokens
    tokens = torch.randint(VOCABULARY, (8, 32))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (3 * tokens.flatten() + 1) % VOCABULARY)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step + 1} loss {loss.item()}")
    if (step + 1) % SAVE_EVERY == 0:
        of_model, of_optimizer = get_state_dict(model, optimizer)
        states = {"model": of_model, "optimizer": of_optimizer, "schedule": schedule.state_dict()}
        checkpoint.save(states, checkpoint_id=FOLDER / f"step-{step + 1:06}")
dist.destroy_process_group()
