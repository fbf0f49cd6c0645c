# SPDX-License-Identifier: Apache-2.0
"""NeMo: ``optim.name: adaptive_muon``, its dataclass of parameters, and its parameters routed by NeMo's modules."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, override
from weakref import WeakSet

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.core.classes import NeuralModule
from nemo.core.config.optimizers import OptimizerParams
from nemo.core.neural_types import LogitsType, LogprobsType, NeuralType
from nemo.core.optim import optimizers
from nemo.utils import logging
from omegaconf import OmegaConf
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.checks import refusal, require
from emerging_optimizers.adaptive_muon.integrations.options import AdaptiveMuonOptions


__all__ = ["AdaptiveMuonParams", "RoutingCallback", "adaptive_muon", "register", "remember"]

# Keys that a module may have in ``optim_param_groups``, and the names HybridAdaptiveMuon has for them in a group.
_GROUP_KEYS = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "beta2": "beta2",
    "betas": "betas",
    "eps": "scalar_eps",
    "scalar_lr": "scalar_lr",
    "scalar_weight_decay": "scalar_weight_decay",
}

# The models an optimizer may be asked for. NeMo hands over parameters only, without their names or modules.
_models: WeakSet[nn.Module] = WeakSet()


@dataclass
class AdaptiveMuonParams(AdaptiveMuonOptions, OptimizerParams):
    """The keys of NeMo's ``optim`` block, and of its ``args.params``.

    ``lr``, NeMo's own, is the learning rate of the matrices; for the others see
    :class:`~emerging_optimizers.adaptive_muon.integrations.options.AdaptiveMuonOptions`.
    """


def register() -> None:
    """Makes NeMo know the optimizer ``adaptive_muon``. Where the package is installed, it happens by itself.

    Raises:
        ValueError: If NeMo has another optimizer of that name.
    """
    if optimizers.AVAILABLE_OPTIMIZERS.get("adaptive_muon") is not adaptive_muon:
        optimizers.register_optimizer("adaptive_muon", adaptive_muon, AdaptiveMuonParams)


def remember(model: nn.Module) -> None:
    """Lets :func:`adaptive_muon` route a model's parameters by its modules. A ``Trainer`` does it by itself.

    Args:
        model: The model, for as long as it lives.
    """
    _models.add(model)


class RoutingCallback(Callback):
    """Lightning's callback that remembers the model a ``Trainer`` is about to make an optimizer for."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remembers the model."""
        remember(pl_module)


def adaptive_muon(params: Iterable[dict[str, Any]], **optim: Any) -> HybridAdaptiveMuon:
    """Makes the optimizer: what NeMo calls for ``optim.name: adaptive_muon``.

    Frozen parameters are left out. A line in NeMo's log says how many parameters and elements went where.

    Args:
        params: NeMo's parameter groups.
        **optim: Keys of :class:`AdaptiveMuonParams`.

    Raises:
        ValueError: If a key is unknown, a value is out of its range, or the parameters' model was not remembered.
    """
    valid = [field.name for field in fields(AdaptiveMuonParams)]
    options = AdaptiveMuonParams(**{key: optim[_known(key, valid, "optim")] for key in optim})
    groups = list(params)
    model = _owner({p for group in groups for p in group["params"]})
    _tag_heads(model)
    optimizer = options.make_optimizer(model, map(_trained, groups), options.lr)
    frozen = sum(not p.requires_grad for group in groups for p in group["params"])
    logging.info(f"adaptive_muon: {optimizer.describe(each=False)}\nleft out: {frozen} frozen parameters")
    return optimizer


def _owner(params: set[nn.Parameter]) -> nn.Module:
    """The remembered model that has all these parameters."""
    for model in _models:
        if params <= set(model.parameters()):
            return model
    raise refusal(
        "adaptive_muon must know the model, to route its parameters by their modules",
        f"{len(params)} parameters of a model that no Trainer has set up",
        "train it with a Lightning Trainer, "
        "or call emerging_optimizers.adaptive_muon.integrations.nemo.remember(model) before",
    )


def _trained(group: dict[str, Any]) -> dict[str, Any]:
    """A group of NeMo's, of ``optim_param_groups`` perhaps, without frozen parameters, in HybridAdaptiveMuon's words."""
    # A list of the YAML's is a ListConfig here, which does not belong in an optimizer's state.
    options = OmegaConf.to_container(OmegaConf.create({key: group[key] for key in group if key != "params"}))
    renamed = {_GROUP_KEYS[_known(key, _GROUP_KEYS, "optim_param_groups")]: value for key, value in options.items()}
    return {**renamed, "params": [p for p in group["params"] if p.requires_grad]}


def _known(key: str, valid: Iterable[str], place: str) -> str:
    """The key itself, if it is a valid one."""
    require(key in valid, f"{place} of adaptive_muon must have known keys", key, f"choose from {', '.join(valid)}")
    return key


def _tag_heads(model: nn.Module) -> None:
    """Tags the output heads that NeMo's modules show: the last linear layer of one that returns logits."""
    for module in model.modules():
        outputs = (module.output_types or {}).values() if isinstance(module, NeuralModule) else ()
        types = [output.elements_type for output in outputs if isinstance(output, NeuralType)]
        if any(isinstance(of_output, LogitsType | LogprobsType) for of_output in types):
            linears = [m for name, m in module.named_modules() if isinstance(m, nn.Linear) and "adapter" not in name]
            for head in linears[-1:]:
                head.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
