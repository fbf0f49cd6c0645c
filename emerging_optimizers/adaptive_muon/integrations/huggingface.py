# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Trainer: its ``optimizer_cls_and_kwargs``, with parameters routed by the model."""

import logging
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.checks import require


__all__ = ["TrainerAdaptiveMuon", "optimizer_cls_and_kwargs"]

_logger = logging.getLogger(__name__)


def optimizer_cls_and_kwargs(
    model: nn.Module, args: TrainingArguments, **options: Any
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the argument of Trainer of the same name, for the optimizer of a model.

    Trainer gives an optimizer class its parameters without their names. This class routes them by the model's modules, as
    :meth:`HybridAdaptiveMuon.from_model` does. Trainer's groups stay: one with weight decay and one without, each split
    in hidden matrices and everything else. Frozen parameters are left out, as in all of Trainer's optimizers.

    ``args`` sets these options, unless ``options`` has them:

    ======================  =========================================================
    ``learning_rate``       ``lr``, the learning rate of the matrices
    ``weight_decay``        weight decay of both parts; norms and biases have none
    ``adam_beta1``, 2       ``betas``, of the AdamW part
    ``adam_epsilon``        ``scalar_eps``, of the AdamW part
    ======================  =========================================================

    Under DistributedDataParallel every process computes the full update, because Trainer wraps the model after it has
    made the optimizer. Pass ``replica_group=torch.distributed.group.WORLD`` to share the work.

    Args:
        model: The model that Trainer gets. With ``model_init``, override ``Trainer.create_optimizer`` instead.
        args: The arguments that Trainer gets.
        **options: Options of :meth:`HybridAdaptiveMuon.from_model`, except ``params`` and ``weight_decay``.
            ``scalar_weight_decay`` applies where Trainer decays: not to norms and biases.

    Raises:
        ValueError: If ``options`` has ``params`` or ``weight_decay``.

    Example:
        >>> args = TrainingArguments(output_dir, learning_rate=4e-2)
        >>> keys = {"moment2_method": "namo", "extra_scale_factor": 0.2, "scalar_lr": 2e-3}
        >>> made = optimizer_cls_and_kwargs(model, args, **keys)
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=made)
    """
    require("params" not in options, "params must be left to Trainer", "params", "Leave it out.")
    require(
        "weight_decay" not in options,
        "weight_decay must be that of TrainingArguments, which Trainer writes into its groups",
        options.get("weight_decay"),
        "Set it in TrainingArguments.",
    )
    of_args = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "scalar_eps": args.adam_epsilon,
    }
    return TrainerAdaptiveMuon, {"routed_by": model, **of_args, **options}


class TrainerAdaptiveMuon(HybridAdaptiveMuon):
    """A class for Trainer to call, which makes a :class:`HybridAdaptiveMuon`. It has no instances of its own.

    Trainer takes what is no subclass of ``Optimizer`` for a factory, to which it gives no groups.
    """

    def __new__(  # type: ignore[misc]  # what it returns is of the base class
        cls,
        params: list[dict[str, Any]],
        *,
        routed_by: nn.Module,
        scalar_weight_decay: float | None = None,
        **options: Any,
    ) -> HybridAdaptiveMuon:
        """Return the optimizer of Trainer's groups.

        Args:
            params: Trainer's groups.
            routed_by: The model that has their parameters. Trainer would take a keyword ``model`` for the groups.
            scalar_weight_decay: Weight decay of the AdamW part, in groups that have any.
            **options: As :meth:`HybridAdaptiveMuon.from_model`.
        """
        own = {} if scalar_weight_decay is None else {"scalar_weight_decay": scalar_weight_decay}
        groups = [group | own if group["weight_decay"] else group for group in params]
        optimizer = HybridAdaptiveMuon.from_model(routed_by, params=groups, **options)
        _logger.info("adaptive_muon: %s", optimizer.describe(each=False))
        return optimizer
