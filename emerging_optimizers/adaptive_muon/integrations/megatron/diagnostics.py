# SPDX-License-Identifier: Apache-2.0
"""Megatron's TensorBoard and Weights & Biases get the diagnostics, under the names of the model's parameters."""

import sys
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from emerging_optimizers.adaptive_muon.diagnostics.face import Diagnosed
from emerging_optimizers.adaptive_muon.diagnostics.summary import PREFIX, flat


__all__ = ["ModelNames", "write_diagnostics"]


class ModelNames:
    """The names of the parameters of Megatron's model chunks, which the groups of its optimizers lack.

    Args:
        model_chunks: The chunks. They are not kept alive.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module]) -> None:
        self._names: MutableMapping[torch.Tensor, str] = WeakTensorKeyDictionary()
        for number, chunk in enumerate(model_chunks):
            prefix = f"chunk{number}." if len(model_chunks) > 1 else ""
            for name, p in chunk.named_parameters():
                self._names[p] = prefix + name.removeprefix("module.").removeprefix("module.")

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelNames":
        """Return the names themselves: a copy's parameters are others, and have none."""
        return self

    def replaced(self, named: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameters with their names in the model, where they have one there; or their model parameters have."""
        names: dict[int, str] = {}
        for q, name in self._names.items():
            names[id(q)] = names[id(getattr(q, "main_param", q))] = name
        for name, p in named:
            yield names.get(id(p), name), p


def write_diagnostics(optimizer: Diagnosed, *_: Any) -> None:
    """Write what was measured last, after a step at which Megatron logs, on the rank that has its writers: the last one.

    It is for ``register_step_post_hook``. Where Megatron's training loop does not run, nothing happens.
    """
    global_vars = sys.modules.get("megatron.training.global_vars")
    args = getattr(global_vars, "_GLOBAL_ARGS", None)
    iteration = getattr(args, "curr_iteration", None)
    if global_vars is None or args is None or iteration is None or (iteration + 1) % args.tensorboard_log_interval:
        return
    tensorboard, wandb = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
    if tensorboard is None and not wandb:
        return
    of_experts = [group.get("is_expert_parallel", False) for group in optimizer.param_groups if group["params"]]
    prefix = f"{PREFIX}_experts" if all(of_experts) else PREFIX  # which have an optimizer of their own
    metrics = flat(optimizer.diagnostics(), prefix=prefix)
    for name, value in metrics.items() if tensorboard is not None else ():
        tensorboard.add_scalar(name, value, iteration + 1)
    if wandb and metrics:
        wandb.log(metrics, iteration + 1)
