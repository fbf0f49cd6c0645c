# SPDX-License-Identifier: Apache-2.0
"""The English of pages, docstrings and errors, and that tools/prose.py finds what it is for."""

import re
from pathlib import Path

import pytest
from tree import ROOT, tool


PROSE = tool("prose")
PAGE = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
MODULE = '''"""A module."""


def double(number: int) -> int:
    """Return twice a number."""
    if number < 0:
        raise ValueError(f"number must be >= 0, got {number}. Use 1.")
    return 2 * number
'''
CHECKS = '''"""A module."""

from emerging_optimizers.adaptive_muon.checks import refusal, require

_REMEDY = "Use 1."


def double(number: int) -> int:
    """Return twice a number."""
    require(number >= 0, "number must be >= 0", number, f"Use {1}, or {2}.")
    if number > 9:
        raise refusal("number must be < 10", number, _REMEDY + " Then add.")
    return 2 * number
'''


def test_nothing_to_complain_of() -> None:
    assert not PROSE.complaints()


def test_words_are_those_of_text_and_of_tables_by_hand() -> None:
    page = """<!-- SPDX-License-Identifier: Apache-2.0 -->
# Two words

Four more [words](https://example.org/a/b) - 5 and $x + y$.

```python
not = "counted"
```

$$
a = b
$$

| four | in |
|---|---|
| `a` | table 7 |

<!-- options, by tools/option_tables.py -->

| not | counted |

<!-- end of options -->

<!-- methods -->
| not | counted |
|---|---|
"""
    assert PROSE.count(page) == 2 + 4 + 4
    assert PROSE.count(page.replace("<!-- end of options -->", "")) > 10


PLANTED = {
    "The optimizer says which.": '"says": write',
    "The optimizer\ntells which.": '"tells": write',
    "It takes 4 bytes a parameter.": '"bytes a parameter": write per',
    "A checkpoint is refused.": '"refused": write reject',
    "Training goes on.": '"goes on": write continue',
    "Each piece is sent.": '"piece": write shard',
    "## What goes where": "must name a task",
    "## Limits.": "must name a task",
    "## A heading of very many words that nobody reads": "must name a task",
    " ".join(["word"] * 41) + ".": "a sentence of 41 words",
    "- First. " + " ".join(["word"] * 41): "a sentence of 41 words",
    "```python\n" + "x" * 89 + "\n```": "code of 89 columns",
}


@pytest.mark.parametrize(("line", "complaint"), PLANTED.items())
def test_what_is_planted_in_a_page_is_found(line: str, complaint: str) -> None:
    assert not list(PROSE.of_page(PAGE))
    [(number, found)] = PROSE.of_page(f"{PAGE}\n{line}\n")
    assert complaint in found and PAGE.count("\n") < number <= PAGE.count("\n") + 4


@pytest.mark.parametrize("line", ["`says`", '"refused"', "$a piece$", "`Piece`", " ".join(["word"] * 40) + "."])
def test_names_and_quotes_are_not(line: str) -> None:
    assert not list(PROSE.of_page(f"{PAGE}\n{line}\n"))


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("Return twice", "Tell twice", '"Tell"'),
        ("Return twice", "The double of", "begin with a verb"),
        ("Return twice", "Whether it is twice", "begin with a verb"),
        ("Use 1", "Negative ones are refused", '"refused"'),
        ("A module.", "A module that knows.", '"knows"'),
        ("number must be >= 0, got", "no number below 0, got", "must have the rule"),
        ('ValueError(f"number must be >= 0', 'RuntimeError(f"no number below 0', "must have the rule"),
        (". Use 1.", ": use 1", 'must read "X must be Y, got Z. Use W."'),
        (". Use 1.", ": use 1. It is valid.", "must read"),
        (". Use 1.", ". use 1.", "must read"),
        (". Use 1.", ". Use 1", "must read"),
        (". Use 1.", "", "must read"),
        (", got {number}. Use 1.", "", "must read"),
    ],
)
def test_what_is_planted_in_a_module_is_found(before: str, after: str, complaint: str) -> None:
    assert not list(PROSE.of_module(MODULE))
    [(_, found)] = PROSE.of_module(MODULE.replace(before, after))
    assert complaint in found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('f"Use {1}, or {2}."', '"use 1"'),
        ('f"Use {1}, or {2}."', 'f"use {1}."'),
        ('f"Use {1}, or {2}."', 'f"Use {1}, or {2}"'),
        ('f"Use {1}, or {2}."', 'f"Use {1}: set it."'),
        ('f"Use {1}, or {2}."', '"Use 1; or 2."'),
        ('_REMEDY = "Use 1."', '_REMEDY = "use 1"'),
        (' Then add."', ' Then add"'),
    ],
)
def test_a_remedy_that_is_no_sentence_is_found(before: str, after: str) -> None:
    assert not list(PROSE.of_module(CHECKS)) and before in CHECKS
    [(_, found)] = PROSE.of_module(CHECKS.replace(before, after))
    assert "must be sentences" in found


def test_errors_of_other_code_have_the_form_too(tmp_path: Path) -> None:
    for name in ("docs/apidocs", "emerging_optimizers", "examples"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "examples" / "train.py").write_text('parser.error(f"--lr must be > 0, got {lr}: use 1")')
    [found] = PROSE.complaints(tmp_path)
    assert found.startswith("examples/train.py:1: ") and "must read" in found


def test_too_many_words_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 5000 < PROSE.total_words() <= PROSE.ALL_WORDS == 8000
    monkeypatch.setattr(PROSE, "ALL_WORDS", 100)
    assert re.search(r"docs: \d+ words", PROSE.complaints()[0])


def test_every_page_is_in_the_site() -> None:
    """A page that no list of pages names is not counted by mistake only."""
    listed = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    pages = [path.relative_to(ROOT / "docs") for path in PROSE.pages()]
    assert {str(path) for path in pages} - {"index.md"} <= set(listed)
