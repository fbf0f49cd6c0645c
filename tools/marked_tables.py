# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, and the marks between which a page has one that a tool writes."""

import re


def table_of(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def with_table(page: str, kind: str, table: str) -> str:
    """Return a page's text with the table between its two marks replaced.

    Args:
        page: The page's text.
        kind: What the marks name: ``options`` for those of tools/option_tables.py.
        table: The table in Markdown.
    """
    marked = re.compile(rf"(<!-- {kind}, by tools/[\w.]+ -->\n\n).*?(\n\n<!-- end of {kind} -->)", re.DOTALL)
    text, count = marked.subn(lambda marks: marks[1] + table + marks[2], page)
    if count != 1:
        raise ValueError(f"a page must have the marks of its table once, got {count} times. See docs/apidocs/nemo.md.")
    return text
