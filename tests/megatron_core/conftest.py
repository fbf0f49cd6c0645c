# SPDX-License-Identifier: Apache-2.0
"""Tests with Megatron-Core that run in four processes; tests/test_megatron.py starts them."""

import os

import cuda_is_cpu
from rank import *  # noqa: F403  hooks and fixtures


if "RANK" in os.environ:
    cuda_is_cpu.install()  # before Megatron is imported
