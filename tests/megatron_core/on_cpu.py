# SPDX-License-Identifier: Apache-2.0
"""Runs a script that needs Megatron and GPUs on the CPU: torchrun --nproc_per_node 2 tests/megatron_core/on_cpu.py SCRIPT."""

import os
import runpy
import sys

import cuda_is_cpu
import torch


if __name__ == "__main__":
    cuda_is_cpu.install()  # before Megatron is imported
    from megatron.core.tensor_parallel import random

    torch.cuda.set_device = lambda _: None
    # The generators are those of CUDA devices otherwise.
    random.model_parallel_cuda_manual_seed = lambda _: random.initialize_rng_tracker(
        inference_rng_tracker=True, force_reset=True
    )
    runpy.run_path(sys.argv[1], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo groups that something still refers to may abort in Python's clean-up
