# SPDX-License-Identifier: Apache-2.0
"""The files of the checkout that are the project's, which excludes what commands have written into it."""

import importlib
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
# The names of the folders that commands write.
WRITTEN: list[str] = SETTINGS["ruff"]["extend-exclude"]


def own_files(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path
        elif path.name != "__pycache__" and not any(fnmatch(path.name, name) for name in WRITTEN):
            yield from own_files(path)


def tool(name: str) -> ModuleType:
    """Imports a script of tools, which import each other by plain names."""
    if (folder := str(ROOT / "tools")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
