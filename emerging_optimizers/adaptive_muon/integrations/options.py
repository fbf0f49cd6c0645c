# SPDX-License-Identifier: Apache-2.0
"""The keys of a configuration file for adaptive_muon, and the optimizer of a model made from them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from typing import Any, Optional

from torch import nn
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.checks import within
from emerging_optimizers.adaptive_muon.options import Options, Rule, SplitOptions, document, option_field, options_of


__all__ = ["ARGUMENTS", "AdaptiveMuonOptions", "config_keys"]


def config_keys[T: type](*records: type) -> Callable[[T], T]:
    """Return a decorator that makes a dataclass of the keys for the options of records and of a class's own fields.

    The types are those that OmegaConf's structured configs take.
    """

    def decorate(cls: T) -> T:
        keys: dict[str, Any] = {}
        for option in chain.from_iterable(map(options_of, records)):
            if option.in_files:
                key = option.key or option.name
                of_values = str if option.choices else option.value_type
                keys[key] = Optional[of_values] if option.default is None else of_values  # noqa: UP045
                setattr(cls, key, option_field(option.default, option.text, rule=option.rule, names=option.choices))
        cls.__annotations__ = keys | cls.__annotations__
        dataclass(cls)
        document(cls, options_of(cls))
        return cls

    return decorate


# Where a key's name is not that of HybridAdaptiveMuon's argument.
ARGUMENTS = {"eps": "scalar_eps"} | {option.key: option.name for option in options_of(Options) if option.key}


@config_keys(Options, SplitOptions)
class AdaptiveMuonOptions:
    """The keys of a configuration file. Those that a stock AdamW has keep the meaning they have there.

    Args:
        {options}
    """

    betas: tuple[float, float] = option_field((0.9, 0.999), "Decay rates of the AdamW part.")
    eps: float = option_field(
        1e-8,
        "Constant added to the denominator of the AdamW part.",
        rule=Rule(">= 0", partial(within, low=0), "Use 1e-8, the default."),
    )
    scalar_lr: float | None = option_field(None, "Learning rate of the AdamW part. None takes that of the matrices.")
    scalar_weight_decay: Optional[float] = option_field(  # noqa: UP045
        None, "Coefficient of the weight decay of the AdamW part. None takes that of the matrices."
    )
    routes: Optional[dict[str, str]] = option_field(  # noqa: UP045
        None, 'Name pattern (as in fnmatch) to "adaptive_muon" or "adamw", before all other rules.'
    )

    def make_optimizer(self, model: nn.Module, params: ParamsT, lr: float) -> HybridAdaptiveMuon:
        """Make the optimizer of a model whose parameters a framework has put into groups.

        Args:
            model: The model that has the parameters. Its modules decide where each goes.
            params: Parameters, or groups of them with HybridAdaptiveMuon's names of options.
            lr: Learning rate of the matrices.

        Raises:
            ValueError: As :meth:`~emerging_optimizers.adaptive_muon.HybridAdaptiveMuon.from_model`.
        """
        for option in options_of(type(self)):
            option.check(getattr(self, option.name))  # by the name of its key
        keys = [key.name for key in fields(AdaptiveMuonOptions)]  # type: ignore[arg-type]
        arguments = {ARGUMENTS.get(key, key): getattr(self, key) for key in keys}
        return HybridAdaptiveMuon.from_model(model, lr, params=params, **arguments)
