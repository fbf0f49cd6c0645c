# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/apidocs/parts.md: the models of tests/test_parts.py, and what from_model finds in them."""

import sys
from pathlib import Path
from typing import Any

from marked_tables import table_of, with_table
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.routing.fused import FUSED_CLASSES
from emerging_optimizers.adaptive_muon.routing.gate_up import GATED_CLASSES


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "apidocs" / "parts.md"


def attention_table(rows: list[tuple[str, Any, str, dict[str, str]]], make: Any) -> str:
    """Return a table of types of models: what split_heads makes of the weights of their first attention.

    Args:
        rows: The models, as tests/test_parts.py has them.
        make: Returns the tiny model of a type.
    """
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for kind, change, name, _ in rows:
        parts = parts_of(make(kind, change), name)
        found.setdefault((kind, parts), (f"{kind}, `{name}`", parts))
    return table_of(("`model_type`, class", "with `split_heads=True`, here of a tiny model"), [*found.values()])


def parts_of(model: nn.Module, name: str) -> str:
    """Return what is found in the weights of the first module of a class."""
    prefix = next(path for path, module in model.named_modules() if type(module).__name__ == name)
    routes = HybridAdaptiveMuon.from_model(model, split_heads=True).routes
    texts = {
        path.removeprefix(prefix + ".").removesuffix(".weight"): route.parts.text
        for path, _, route in routes
        if path.startswith(prefix + ".") and route.parts is not None
    }
    return "<br>".join(f"`{leaf}`: {text}" for leaf, text in texts.items())


def experts_table(rows: list[tuple[str, Any, str, tuple[str, str], str]], make: Any) -> str:
    """Return a table of types of models: what stacked_experts and split_gate_up make of the first experts' weights.

    Args:
        rows: The models, as tests/test_experts.py has them.
        make: Returns the tiny model of a type.
    """
    switches = {"stacked_experts": True, "split_gate_up": True}
    found: dict[str, list[str]] = {}
    for kind, change, name, leaves, _ in rows:
        found.setdefault(texts_of(make(kind, change), name, leaves, switches), []).append(f"{kind}, `{name}`")
    of_texts = [("<br>".join(kinds), texts) for texts, kinds in found.items()]
    return table_of(("`model_type`, class", "weights, here of a tiny model"), of_texts)


def texts_of(model: nn.Module, name: str, leaves: tuple[str, ...], switches: dict[str, bool]) -> str:
    """Return what is said of some weights of the first module of a class, with their shapes."""
    prefix = next(path for path, module in model.named_modules() if type(module).__name__ == name)
    routes = {path: (p, route) for path, p, route in HybridAdaptiveMuon.from_model(model, **switches).routes}
    texts = []
    for leaf in leaves:
        p, route = routes[f"{prefix}.{leaf}"]
        texts.append(f"`{leaf}`, {' x '.join(map(str, p.shape))}: {route.text.replace('stack of hidden', 'experts,')}")
    return "<br>".join(texts)


def class_list() -> str:
    """Return the classes whose fused weights are known, by package."""
    lines = []
    for title, classes in (("queries, keys and values", FUSED_CLASSES), ("gate and up projection", GATED_CLASSES)):
        for package in ("transformers", "nemo", "nemo_automodel"):
            names = sorted(each.partition(".")[2] for each in classes if each.startswith(package + "."))
            if names:
                lines.append(f"- {title}, in {package}: {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines)


def with_tables(page: str, tables: dict[str, str]) -> str:
    """Return a page's text with the tables between their marks replaced."""
    for name, table in tables.items():
        page = with_table(page, name, table)
    return page


def tables() -> dict[str, str]:
    """Return the tables of the page by their names."""
    sys.path.insert(0, str(ROOT / "tests"))
    import test_experts
    import test_parts
    import tiny_models

    return {
        "attention": attention_table(test_parts.ATTENTION, tiny_models.tiny),
        "experts": experts_table(test_experts.EXPERTS, tiny_models.tiny),
        "classes": class_list(),
    }


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables()), encoding="utf-8")
