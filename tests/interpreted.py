# SPDX-License-Identifier: Apache-2.0
"""For tests of Triton kernels: on a GPU where there is one, and everywhere in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or Triton's interpreter"
)
starts_the_interpreter = pytest.mark.skipif(INTERPRETED, reason="is what started this process")


def run_in_the_interpreter(file: str) -> None:
    """Runs a file's tests in Triton's interpreter, and fails with their output if one does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
