# SPDX-License-Identifier: Apache-2.0
"""Megatron's command line and config: the flags of adaptive_muon, and the arguments that are read from both."""

import argparse
import sys
from dataclasses import fields
from typing import Any

from megatron.core.optimizer import OptimizerConfig

from emerging_optimizers.adaptive_muon.options import Option, Options, SplitOptions, options_of


__all__ = ["CONFIG_FIELDS", "add_adaptive_muon_args", "from_command_line", "from_config"]

# Arguments of TensorParallelAdaptiveMuon that are no options of AdaptiveMuon, and the fields of Megatron's
# OptimizerConfig that they come from.
CONFIG_FIELDS = {"use_decoupled_weight_decay": "decoupled_weight_decay", "split_qkv": "muon_split_qkv"}


def from_config(config: Any) -> dict[str, Any]:
    """Return the arguments that an ``OptimizerConfig`` sets, without those whose field the installed version lacks."""
    names = CONFIG_FIELDS | {
        option.name: option.megatron_field for option in options_of(Options) if option.megatron_field
    }
    return {name: getattr(config, field) for name, field in names.items() if hasattr(config, field)}


def from_command_line() -> dict[str, Any]:
    """Return the options of the flags that Megatron does not copy into its config, where it has parsed a command line."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    args = getattr(global_vars, "_GLOBAL_ARGS", None)
    names = [option.name for option in _with_flags() if option.flag and option.megatron_field != _dest(option)]
    values = {name: getattr(args, "adaptive_muon_" + name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def add_adaptive_muon_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that Megatron lacks for adaptive_muon, for ``extra_args_provider``; see the documentation's table.

    Where ``--optimizer adaptive_muon`` is on the command line, the default of ``--muon-tp-mode`` becomes
    "layer_sharded". Flags that Megatron's parser has already stay as they are, but take the names that AdaptiveMuon
    takes.

    Args:
        parser: Megatron's parser, which is changed in place.

    Returns:
        The same parser.
    """
    known = parser._option_string_actions  # argparse has no public way to look up or to widen a flag
    group = parser.add_argument_group(title="adaptive muon")
    defaults = {field.name: field.default for field in fields(OptimizerConfig)}
    for option in _with_flags():
        flag = _flag(_dest(option))
        if option.flag and flag not in known:
            text = option.text.replace("%", "%%")  # argparse formats it
            group.add_argument(flag, help=text, default=defaults.get(_dest(option)), **_values(option))
        action = known.get(_flag(option.megatron_field))
        if action is not None and action.choices is not None:
            action.choices = [*action.choices, *(name for name in option.choices if name not in action.choices)]
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--optimizer")
    if chosen.parse_known_args()[0].optimizer == "adaptive_muon":
        parser.set_defaults(muon_tp_mode=Options.tp_mode)
    return parser


def _with_flags() -> tuple[Option, ...]:
    """Return the options of all records, of which some have flags."""
    return options_of(Options) + options_of(SplitOptions)


def _dest(option: Option) -> str:
    """Return the argument of our flag, and the name of Megatron's field where that is of adaptive_muon only."""
    return "adaptive_muon_" + option.name


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _values(option: Option) -> dict[str, Any]:
    """Return argparse's arguments that read the values of an option."""
    if option.is_switch:
        return {"action": argparse.BooleanOptionalAction}
    return {"choices": option.choices} if option.choices else {"type": option.value_type}
