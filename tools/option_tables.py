# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of options in the documentation, from the record of options."""

import re
from pathlib import Path
from typing import Any

from marked_tables import table_of, with_table

from emerging_optimizers.adaptive_muon.integrations.options import ARGUMENTS, AdaptiveMuonOptions
from emerging_optimizers.adaptive_muon.options import Option, Options, SplitOptions, options_of


PAGES = Path(__file__).parents[1] / "docs" / "apidocs"
YAML = {None: "null", True: "true", False: "false"}


def keywords(record: type = Options) -> str:
    """Return the table of AdaptiveMuon's keyword arguments."""
    rows = [(f"`{option.name}`", _code(option.default), *_about(option)) for option in options_of(record)]
    return table_of(("option", "default", "values", "what it sets"), rows)


def flags(record: type = Options, of_split: type = SplitOptions) -> str:
    """Return the table of Megatron's flags about Muon, its own and ours, and of the options that they set."""
    rows = []
    for option in (*(option for option in options_of(of_split) if option.flag), *options_of(record)):
        field = option.megatron_field
        if option.flag or field not in ("", option.name):  # one with the option's name is of all Megatron's optimizers
            flag = "adaptive_muon_" + option.name if option.flag else field
            names = f"`--{flag.replace('_', '-')}`" + ", `--no-...`" * (option.flag and option.is_switch)
            rows.append((names, field and f"`{field}`", _code(option.name)))
    return table_of(("flag", "field of `OptimizerConfig`", "option"), rows)


def keys(config: type = AdaptiveMuonOptions) -> str:
    """Return the table of keys in a configuration file of NeMo or Automodel, and of the options that they set."""
    rows = []
    for option in options_of(config):
        default = option.default
        text = YAML[default] if default is None or isinstance(default, bool) else default
        shown = _code(list(text) if isinstance(text, tuple) else text)
        rows.append((_code(option.name), shown, _code(ARGUMENTS.get(option.name, option.name))))
    return table_of(("key", "default", "option"), rows)


TABLES = {"adaptive-muon.md": keywords, "megatron.md": flags, "nemo.md": keys}


def _about(option: Option) -> tuple[str, str]:
    """Return the valid values of an option, and what it sets."""
    rule = option.rule.text if option.rule and option.scope != "rank" else ""
    return ", ".join(map(_code, option.choices)) or rule, re.sub(r'"(\w+)"', r"`\1`", option.text)


def _code(value: Any) -> str:
    return f"`{value}`"


if __name__ == "__main__":
    for name, table in TABLES.items():
        page = PAGES / name
        page.write_text(with_table(page.read_text(encoding="utf-8"), "options", table()), encoding="utf-8")
