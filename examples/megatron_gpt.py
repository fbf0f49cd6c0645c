# SPDX-License-Identifier: Apache-2.0
"""Train a small GPTModel with Megatron-Core, tensor-parallel over all GPUs. The losses are the same on any number.

torchrun --nproc_per_node 2 examples/megatron_gpt.py

Megatron needs GPUs. The tests run this script on the CPU, with a shim in place of CUDA (tests/megatron_core/on_cpu.py).
"""

import os

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import distributed as dist

from emerging_optimizers.adaptive_muon.integrations.megatron import register


STEPS, VOCABULARY, LENGTH = 20, 256, 32
torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group()
parallel_state.initialize_model_parallel(tp := dist.get_world_size())
torch.manual_seed(0)
model_parallel_cuda_manual_seed(0)
# use_cpu_initialization makes the weights the same at every tensor-parallel size
options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "tensor_model_parallel_size": tp}
config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, use_cpu_initialization=True, **options)
gpt = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=VOCABULARY, max_sequence_length=LENGTH)
model = DistributedDataParallel(config, DistributedDataParallelConfig(), gpt.cuda())

register(tp_mode="layer_sharded")  # before the optimizer is made; all that Megatron's config lacks goes here
optimizer_config = OptimizerConfig(
    optimizer="adaptive_muon",
    adaptive_muon_moment2_method="namo_d",
    muon_nesterov=True,
    min_lr=0.0,  # which the schedule requires
    lr=2e-3,  # of all parameters: Megatron has one rate
    muon_extra_scale_factor=10.0,  # times this for the hidden matrices
    clip_grad=1.0,
)
optimizer = get_megatron_optimizer(optimizer_config, [model], config_overrides={})
schedule = OptimizerParamScheduler(optimizer, 0.0, 2e-3, 0.0, 5, STEPS, "cosine", 0.01, 0.01, STEPS, "constant")
positions = torch.arange(LENGTH).expand(8, LENGTH).cuda()
for step in range(STEPS):
    tokens = torch.randint(VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(step)).cuda()
    model.zero_grad_buffer()
    loss = model(tokens, positions, None, labels=(3 * tokens + 1) % VOCABULARY).float().mean()
    loss.backward()
    model.finish_grad_sync()
    optimizer.step()
    schedule.step(1)
    if dist.get_rank() == 0:
        print(f"step {step + 1} loss {loss.item()}")
dist.destroy_process_group()
