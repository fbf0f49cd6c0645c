# SPDX-License-Identifier: Apache-2.0
"""NeMo: ``optim.name: adaptive_muon``, its dataclass of parameters, and its parameters routed by NeMo's modules."""

from collections.abc import Collection, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import cache, wraps
from typing import Any

import nemo
from nemo.core.classes import ModelPT, NeuralModule
from nemo.core.config.optimizers import OptimizerParams
from nemo.core.neural_types import LogitsType, LogprobsType, NeuralType
from nemo.core.optim import optimizers
from nemo.utils import logging
from omegaconf import OmegaConf
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.checks import refusal, require
from emerging_optimizers.adaptive_muon.integrations.lightning import AdaptiveMuonDiagnostics
from emerging_optimizers.adaptive_muon.integrations.options import AdaptiveMuonOptions
from emerging_optimizers.adaptive_muon.versions import require_supported


__all__ = ["AdaptiveMuonParams", "adaptive_muon", "diagnostics_callback", "register"]

_SUPPORTED = (2, 7), (4, 0)  # setup.py asks pip for the same

# Keys that a module may have in ``optim_param_groups``. HybridAdaptiveMuon has another name for the last.
_GROUP_KEYS = ("lr", "weight_decay", "momentum", "beta2", "betas", "scalar_lr", "scalar_weight_decay", "eps")

# The model whose optimizer is being made. NeMo hands over its parameters only, without their names or modules.
_model: ContextVar[nn.Module | None] = ContextVar("model", default=None)


@dataclass
class AdaptiveMuonParams(AdaptiveMuonOptions, OptimizerParams):
    """The keys of NeMo's ``optim`` block, and of its ``args.params``.

    ``lr``, NeMo's own, is the learning rate of the matrices. The other keys are those of
    :class:`~emerging_optimizers.adaptive_muon.integrations.options.AdaptiveMuonOptions`.
    """


def register() -> None:
    """Register the optimizer ``adaptive_muon`` in NeMo. Every ``Trainer`` does it where the package is installed.

    From then on ``ModelPT.setup_optimization`` gives :func:`adaptive_muon` the model.

    Raises:
        ValueError: If NeMo has another optimizer of that name.
    """
    if optimizers.AVAILABLE_OPTIMIZERS.get("adaptive_muon") is not adaptive_muon:
        optimizers.register_optimizer("adaptive_muon", adaptive_muon, AdaptiveMuonParams)
    _wrap_setup()


def diagnostics_callback() -> AdaptiveMuonDiagnostics:
    """Return the callback that every ``Trainer`` has where NeMo is in use: it writes the summary if ``optim`` measures.

    NeMo instantiates no class of another package from its YAML, so ``diagnostics_every`` in ``optim`` is all there is to say.
    Pass a callback of that class to the ``Trainer`` for other matrices; this one then does nothing.
    """
    return AdaptiveMuonDiagnostics(required=False)


@cache
def _wrap_setup() -> None:
    """Make NeMo's models set ``_model`` while they make their optimizers. Done once."""
    of_nemo = ModelPT.setup_optimization

    @wraps(of_nemo)
    def setup_optimization(self: nn.Module, *args: Any, **options: Any) -> Any:
        before = _model.set(self)
        try:
            return of_nemo(self, *args, **options)
        finally:
            _model.reset(before)

    ModelPT.setup_optimization = setup_optimization


def adaptive_muon(params: Iterable[dict[str, Any]], **optim: Any) -> HybridAdaptiveMuon:
    """Make the optimizer: what NeMo calls for ``optim.name: adaptive_muon``.

    NeMo's log gets the numbers of parameters and elements of both algorithms, and of the frozen ones. Those are in the
    optimizer too, as in NeMo's others, and are trained if they are unfrozen later.

    Args:
        params: NeMo's parameter groups.
        **optim: Keys of :class:`AdaptiveMuonParams`.

    Raises:
        RuntimeError: If the version of NeMo is not supported.
        ValueError: If a key is unknown, a value is out of its range, or no model is making its optimizer.
    """
    require_supported("nemo-toolkit", str(nemo.__version__), _SUPPORTED, RuntimeError)
    _check_keys(optim, [field.name for field in fields(AdaptiveMuonParams)], "optim")
    options = AdaptiveMuonParams(**optim)
    model = _model.get()
    if model is None:
        raise refusal(
            "adaptive_muon must get the model, to route its parameters by their modules",
            "a call from elsewhere than ModelPT.setup_optimization",
            "Make the optimizer with HybridAdaptiveMuon.from_model(model).",
        )
    _tag_heads(model)
    optimizer = options.make_optimizer(model, map(_renamed, params), options.lr)
    logging.info(f"adaptive_muon: {optimizer.describe(each=False)}")
    return optimizer


def _renamed(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group of NeMo's, of ``optim_param_groups`` perhaps, with HybridAdaptiveMuon's names of its keys."""
    # A list of the YAML's is a ListConfig here, which does not belong in an optimizer's state.
    options = OmegaConf.to_container(OmegaConf.create({key: group[key] for key in group if key != "params"}))
    _check_keys(options, _GROUP_KEYS, "optim_param_groups")
    return {**{"scalar_eps" if key == "eps" else key: options[key] for key in options}, "params": group["params"]}


def _check_keys(given: Iterable[str], valid: Collection[str], place: str) -> None:
    """Raise a ``ValueError`` that names the first unknown key, if there is one."""
    for key in given:
        require(
            key in valid, f"{place} of adaptive_muon must have known keys", key, f"Choose from {', '.join(valid)}."
        )


def _tag_heads(model: nn.Module) -> None:
    """Tag the output heads that NeMo's modules show: the last linear layer of one that returns logits, or of a joint.

    Where such a module has convolutions only, as a CTC decoder has, it is the last of those. A transducer's joint returns the loss where it is fused with it, and has other linear layers after its joint_net.
    """
    for module in model.modules():
        outputs = (module.output_types or {}).values() if isinstance(module, NeuralModule) else ()
        types = [output.elements_type for output in outputs if isinstance(output, NeuralType)]
        net = getattr(module, "joint_net", module)
        if net is not module or any(isinstance(of_output, LogitsType | LogprobsType) for of_output in types):
            layers = [m for name, m in net.named_modules() if "adapter" not in name]
            kinds = nn.Linear, nn.modules.conv._ConvNd
            linears, convolutions = ([m for m in layers if isinstance(m, kind)] for kind in kinds)
            for head in (linears or convolutions)[-1:]:
                head.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
