# SPDX-License-Identifier: Apache-2.0
"""Writes the documentation's table of neighbors' versions, from the records of the runs."""

import json
from pathlib import Path
from typing import Any

from marked_tables import table_of, with_table


DOCS = Path(__file__).parents[1] / "docs"
RECORDS = DOCS / "versions.json"
PAGE = DOCS / "apidocs" / "versions.md"
# In the order of the table.
NAMES = {
    "torch": "torch",
    "emerging-optimizers": "Emerging-Optimizers",
    "megatron-core": "Megatron-Core",
    "nemo-toolkit": "NeMo",
    "lightning": "Lightning",
    "nemo-automodel": "NeMo Automodel",
}


def records() -> list[dict[str, Any]]:
    """Return the records of all runs, in the order of the table."""
    rows: list[dict[str, Any]] = json.loads(RECORDS.read_text(encoding="utf-8"))
    return sorted(rows, key=_order)


def record(row: dict[str, Any]) -> None:
    """Write a run into the records, in place of an earlier one of the same versions, and write the table."""
    rows = [each for each in records() if _order(each) != _order(row)] + [row]
    lines = [json.dumps(each) for each in sorted(rows, key=_order)]
    RECORDS.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    write()


def write() -> None:
    """Write the table into its page."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), "versions", table(records())), encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of runs."""
    head = ("neighbor", "version", "from", "beside", "passed", "skipped", "date", "remark")
    return table_of(head, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    beside = ", ".join(f"{NAMES[name]} {version}" for name, version in row["beside"].items())
    passed, skipped = (_by_processes({n: counts[i] for n, counts in row["tests"].items()}) for i in (0, 1))
    first = (NAMES[row["neighbor"]], row["version"], row["source"], beside)
    return *first, passed, skipped, row["date"], row.get("note", "")


def _by_processes(numbers: dict[str, int]) -> str:
    """One number for each number of processes, with that number where it is more than one."""
    return ", ".join(f"{count}" + f" in {n}" * (n != "1") for n, count in numbers.items() if count or n == "1")


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in row["version"].split("."))
    return [*NAMES].index(row["neighbor"]), numbers, row["version"], sorted(row["beside"].items())


if __name__ == "__main__":
    write()
