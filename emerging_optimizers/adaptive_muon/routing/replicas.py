# SPDX-License-Identifier: Apache-2.0
"""Which ranks hold the same parameters and gradients of a model, as the wrapper that keeps them the same shows."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary


__all__ = ["replica_group_of"]

# Torch's hooks that replace the all-reduce and still leave all ranks with the same gradients.
_SAME_GRADIENTS = {
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks": {
        "allreduce_hook",
        "fp16_compress_hook",
        "bf16_compress_hook",
    },
    "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook": {"powerSGD_hook", "batched_powerSGD_hook"},
}
# Others, such as Megatron's, derive from Lightning's and shard the model too.
_LIGHTNING = ("lightning.pytorch.strategies.ddp", "pytorch_lightning.strategies.ddp")


def replica_group_of(model: nn.Module) -> Callable[[torch.Tensor], ProcessGroup | None] | None:
    """Return the function that the option ``replica_group`` takes, or None where no parameter has replicas.

    Parameters have replicas where ``DistributedDataParallel`` wraps them: inside the model, around a part of it, or in
    Lightning's strategy "ddp", which wraps a ``LightningModule``. Those that it ignores have none, and neither has a model
    whose communication hook may leave ranks with gradients of their own, as local SGD's does.

    Args:
        model: The model.
    """
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    strategy = getattr(getattr(model, "_trainer", None), "strategy", None)
    if type(strategy).__name__ == "DDPStrategy" and type(strategy).__module__ in _LIGHTNING:
        wrapped = getattr(strategy, "model", None)
        wrappers += [wrapped] if isinstance(wrapped, DistributedDataParallel) else []
    groups = WeakTensorKeyDictionary()
    for wrapper in wrappers:
        if wrapper.process_group.size() > 1 and all(map(_leaves_gradients_the_same, wrapper._comm_hooks)):
            for name, p in wrapper.module.named_parameters():
                if name not in wrapper.parameters_to_ignore:
                    groups[p] = wrapper.process_group
    return groups.get if groups else None


def _leaves_gradients_the_same(hook_and_state: tuple[Callable[..., object], object]) -> bool:
    hook, _ = hook_and_state
    return getattr(hook, "__name__", "") in _SAME_GRADIENTS.get(getattr(hook, "__module__", ""), ())
