# SPDX-License-Identifier: Apache-2.0
"""One record of options: what is added to it is found everywhere, and what is committed says the same."""

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn
from tree import ROOT, tool

import emerging_optimizers
from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon, optimizer
from emerging_optimizers.adaptive_muon.checks import within
from emerging_optimizers.adaptive_muon.integrations.options import AdaptiveMuonOptions, config_keys
from emerging_optimizers.adaptive_muon.moment2.adamuon import AdaMuon
from emerging_optimizers.adaptive_muon.options import Options, OptionsDict, Rule, option_field, options_of
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import syrk_is_usable


TABLES = tool("option_tables")
POSITIONAL = ["lr", "momentum", "weight_decay"]


@dataclass(frozen=True, kw_only=True)
class Extended(Options):
    """The record with one more option."""

    warmth: int = option_field(
        7, "How warm the matrices are.", rule=Rule("at least 3", lambda value: within(value, 3), "Use 4."), flag=True
    )


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "Options", Extended)


def matrix() -> nn.Parameter:
    p = nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    return p


# ------------------------------------------------------------------------------------------------ one more option


@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
@pytest.mark.usefixtures("extended")
def test_the_constructors_take_and_check_it(make: Callable[..., Any]) -> None:
    make([matrix()], warmth=3).step()
    with pytest.raises(ValueError, match="warmth must be at least 3, got 2. Use 4."):
        make([matrix()], warmth=2)
    with pytest.raises(TypeError, match="got heat. Choose from lr, momentum, .*capturable, warmth"):
        make([matrix()], heat=2)


@pytest.mark.usefixtures("extended")
def test_no_group_may_set_it() -> None:
    made = AdaptiveMuon([matrix()])
    with pytest.raises(
        ValueError, match=r"options of a group must be among lr, momentum, weight_decay, beta2, eps, got \['warmth'\]"
    ):
        made.add_param_group({"params": [matrix()], "warmth": 4})


@pytest.mark.usefixtures("extended")
def test_ranks_compare_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ranks compare is what the optimizer hands to its sharding."""
    given: list[Any] = []
    sharding = optimizer.Sharding

    def recorded(*arguments: Any) -> Any:
        given.extend(arguments)
        return sharding(*arguments)

    monkeypatch.setattr(optimizer, "Sharding", recorded)
    made = AdaptiveMuon([matrix()], warmth=5)
    assert made.options.synced["warmth"] == 5 and made.options.synced in given


def test_megatron_has_a_flag_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.core", reason="needs pip install '.[megatron]'")
    from megatron.training import global_vars

    from emerging_optimizers.adaptive_muon.integrations.megatron import arguments

    monkeypatch.setattr(arguments, "Options", Extended)
    parser = arguments.add_adaptive_muon_args(argparse.ArgumentParser())
    assert "How warm the matrices are." in parser.format_help()
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", parser.parse_args(["--adaptive-muon-warmth", "5"]))
    assert arguments.from_command_line() == {"warmth": 5}


def test_configuration_files_have_a_key_for_it() -> None:
    @config_keys(Extended)
    class Keys:
        """The keys.

        Args:
            {options}
        """

        betas: float = option_field(0.9, "The other part's.")

    warmth, betas = fields(Keys)[-2:]
    assert (warmth.name, warmth.type, warmth.default, betas.name) == ("warmth", int, 7, "betas")
    assert Keys.__doc__ is not None and "warmth: How warm the matrices are. Must be at least 3." in Keys.__doc__
    assert "{options}" not in Keys.__doc__
    assert "| `warmth` | `7` | `warmth` |" in TABLES.keys(Keys)


def test_the_tables_have_a_row_for_it() -> None:
    assert TABLES.keywords(Extended).endswith("| `warmth` | `7` | at least 3 | How warm the matrices are. |")
    row = "| `--adaptive-muon-warmth` | | `warmth` |"
    assert row in TABLES.flags(Extended).splitlines()


@pytest.mark.parametrize("framework", ["nemo", "automodel"])
def test_nemo_and_automodel_have_the_keys(framework: str) -> None:
    """With these defaults, in these types, beside the framework's own."""
    if framework == "nemo":
        pytest.importorskip("nemo.core", reason="needs pip install '.[nemo]'")
        from emerging_optimizers.adaptive_muon.integrations.nemo import AdaptiveMuonParams as of_framework
    else:
        pytest.importorskip("nemo_automodel", reason="needs pip install '.[automodel]'")
        from emerging_optimizers.adaptive_muon.integrations.automodel import AdaptiveMuonConfig as of_framework
    theirs = {field.name: (field.type, field.default) for field in fields(of_framework)}
    ours = {key.name: (key.type, key.default) for key in fields(AdaptiveMuonOptions)}
    assert theirs | ours == theirs and "lr" in theirs
    expected = {option.key or option.name: option.default for option in options_of(Options) if option.in_files}
    assert {name: ours[name][1] for name in expected} == expected


# ---------------------------------------------------------------------------------------- what is written by hand


def test_the_typed_dict_is_the_record() -> None:
    annotations = {field.name: field.type for field in fields(Options) if field.name not in POSITIONAL}
    assert get_type_hints(OptionsDict) == annotations
    assert not OptionsDict.__required_keys__
    assert [option.name for option in options_of(Options)] == [*POSITIONAL, *annotations]


def test_the_signature_is_the_record() -> None:
    parameters = inspect.signature(AdaptiveMuon).parameters
    shown = [(p.name, p.default, p.annotation) for p in parameters.values()][1:]
    assert shown == [(option.name, option.default, option.type) for option in options_of(Options)]
    kinds = [p.kind for p in parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 4 + [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - 4)

    class Own(AdaptiveMuon):
        """With a constructor of its own, whose signature it shows."""

        def __init__(self, params: Any, heat: int) -> None:
            super().__init__(params, lr=heat)

    assert list(inspect.signature(Own).parameters) == ["params", "heat"]


def test_the_docstring_has_every_option() -> None:
    lines = inspect.cleandoc(AdaptiveMuon.__doc__ or "").splitlines()
    assert "    lr: Learning rate. The default is that of upstream's Muon. Must be >= 0." in lines
    assert all(any(line.startswith(f"    {option.name}: ") for line in lines) for option in options_of(Options))
    assert all(len(line) < 119 for line in lines)


# The tables have the names of upstream's release that the repository is developed with.
PINNED = f"emerging-optimizers=={emerging_optimizers.__version__}" in (ROOT / "constraints.txt").read_text().split()


@pytest.mark.skipif(not PINNED, reason="needs the emerging-optimizers of constraints.txt")
@pytest.mark.parametrize("page", TABLES.TABLES)
def test_the_committed_tables_are_the_record(page: str) -> None:
    text = (ROOT / "docs" / "apidocs" / page).read_text(encoding="utf-8")
    assert TABLES.with_table(text, "options", TABLES.TABLES[page]()) == text, "run make option-tables"


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 times"):
        TABLES.with_table("# Options\n", "options", "| option |")


# ------------------------------------------------------------------------------------------------- the record


def test_every_default_is_valid_and_every_option_is_described() -> None:
    for option in options_of(Options):
        option.check(option.default)
        assert option.text.endswith(".") and "|" not in option.text
        assert option.choices == () or option.default in option.choices


def test_options_are_resolved_once() -> None:
    assert Options(moment2_method="namo_d").synced["bias_correction"] is True
    assert Options(moment2_method="namo").synced["bias_correction"] is False
    assert Options(moment2_method="namo", bias_correction=True).synced["bias_correction"] is True
    assert Options(use_syrk=True).use_syrk is syrk_is_usable()
    made = AdaptiveMuon([matrix()], moment2_method="namo_d", namo_d_clamp=0.5, num_ns_steps=3)
    assert made.options.moment2.namo_d_clamp == 0.5
    assert made.scaled_orthogonalize_fn.num_steps == 3


@pytest.mark.parametrize("asked", [None, True, False])
def test_what_replaces_a_method_resolves_anew(asked: bool | None) -> None:
    before = Options(moment2_method="namo_d", namo_d_clamp=0.5, bias_correction=asked)
    _ = before.moment2, before.corrects_bias
    after = replace(before, moment2_method="adamuon")
    assert after == Options(moment2_method="adamuon", namo_d_clamp=0.5, bias_correction=asked)
    assert (before.corrects_bias, after.corrects_bias) == ((True, False) if asked is None else (asked, asked))
    assert isinstance(after.moment2, AdaMuon)


@pytest.mark.parametrize("value", ["false", 1, None])
def test_a_switch_is_true_or_false(value: Any) -> None:
    """A configuration file's "false" would count as true."""
    with pytest.raises(ValueError, match=f"nesterov must be True or False, got {value!r}. Use False, the default."):
        AdaptiveMuon([matrix()], nesterov=value)
