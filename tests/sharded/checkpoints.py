# SPDX-License-Identifier: Apache-2.0
"""What the tests of torch.distributed.checkpoint save and load, as a training script does."""

import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


# tests/test_sharded.py gives one directory to its runs with four, two and one processes, in this order.
DIRECTORY = os.environ.get("CHECKPOINTS")
needs_directory = pytest.mark.skipif(DIRECTORY is None, reason="needs a directory that outlives the run: CHECKPOINTS")


def states(model: nn.Module, optimizer: torch.optim.Optimizer, flat: bool) -> dict[str, Any]:
    """What a training script saves."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def set_states(model: nn.Module, optimizer: torch.optim.Optimizer, loaded: dict[str, Any], flat: bool) -> None:
    """Puts what was loaded into the model and the optimizer."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_model_state_dict(model, loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=options)
