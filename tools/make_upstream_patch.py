# SPDX-License-Identifier: Apache-2.0
"""Makes the pull request to Emerging-Optimizers out of this repository's sources.

In a git repository of upstream it commits, on a branch that starts at a revision of yours and without touching the
work tree, what gives upstream's own AdaptiveMuon the fourth method, the paper's options and statistics of whole
matrices; and writes that commit as a patch, and the text of the pull request. The formulas are taken from here, so
they cannot differ.
"""

import argparse
import ast
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path


HERE = Path(__file__).parent / "upstream"
OURS = Path(__file__).parents[1] / "emerging_optimizers/adaptive_muon"
METHODS = ("adamuon", "normuon", "namo", "namo_d")

PACKAGE = "emerging_optimizers/orthogonalized_optimizers"
OPTIMIZER, MOMENT2 = f"{PACKAGE}/adaptive_muon.py", f"{PACKAGE}/moment2.py"
# What is edited only where it is: an installed package has neither.
OLD_TEST, PAGE = "tests/test_adaptive_muon.py", "docs/apidocs/orthogonalized-optimizers.md"

HEADER = """\
# SPDX-FileCopyrightText: Copyright (c) 2026 NVIDIA CORPORATION & AFFILIATES. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
# http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""

SUBJECT = "Add NAMO-D, the paper's options and sharded statistics to AdaptiveMuon"
BODY = """\
AdaptiveMuon gets moment2_method="namo_d" (arXiv:2602.17080), correct_bias, namo_d_clamp and
weight_decay_method="adaptive". With tp_group, parameters that have partition_dim are orthogonalized, averaged and
scaled as the whole matrices they are strips of. Formulas move to moment2.py, one class a method.
"""


class Unknown(ValueError):
    """A source is not as this program knows it."""


def replaced(text: str, changes: Mapping[str, str], name: str) -> str:
    """Returns a text with every key, which must occur once, replaced by its value."""
    for old, new in changes.items():
        if text.count(old) != 1:
            raise Unknown(
                f"{name} must have this once, and has it {text.count(old)} times:\n{old}\n"
                "It has changed since this program was written: look at the change, then mend the program."
            )
        text = text.replace(old, new)
    return text


def definition(source: str, *path: str) -> str:
    """Returns the source of a function or a class, with its decorators, or of one within a class."""
    lines, (first, last) = source.splitlines(keepends=True), _lines(source, *path)
    return "".join(lines[first:last])


def without(source: str, *path: str) -> str:
    """Returns a source without a definition, and without the empty lines before it."""
    lines, (first, last) = source.splitlines(keepends=True), _lines(source, *path)
    while not lines[first - 1].strip():
        first -= 1
    return "".join(lines[:first] + lines[last:])


def _lines(source: str, *path: str) -> tuple[int, int]:
    """From which line a definition goes to which."""
    body: list[ast.stmt] = ast.parse(source).body
    found: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | None = None
    for name in path:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        named = [each for each in body if isinstance(each, kinds) and each.name == name]
        if len(named) != 1:
            raise Unknown(f"There must be one definition of {'.'.join(path)}, and there are {len(named)}: look.")
        found, body = named[0], named[0].body
    assert found is not None and found.end_lineno is not None
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return first - 1, found.end_lineno


_OUR_METHODS = """\
    A method is one file of this package that defines one subclass under ``@register_moment2(name)``, and one word in
    ``Moment2MethodT``. Its dataclass fields, if any, are its own options; for users to set them,
    :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon` takes them as arguments by the same name. Formulas reduce
    through the layout only and along the last two dimensions, which makes them right for a matrix in pieces and for a
    stack of matrices; they ask for what they need at once in one call, since an answer may have to travel.
"""
_UPSTREAMS_METHODS = """\
    A method is one subclass under ``@register_moment2(name)``, and one word in ``Moment2MethodT``. Its dataclass
    fields, if any, are its own options; for users to set them, ``AdaptiveMuon`` takes them as arguments by the same
    name. Formulas reduce through the layout only, which makes them right for a matrix in strips.
"""


def moment2() -> str:
    """Returns upstream's new moment2.py: our formulas, which there wait for nothing, for matrices whole or in strips."""
    layout, base, registry = (
        (OURS / name).read_text() for name in ("sharding/layout.py", "moment2/base.py", "moment2/registry.py")
    )
    whole = replaced(
        without(without(definition(layout, "Layout"), "Layout", "first"), "Layout", "nonzero"),
        {
            "shape ``(..., rows, columns)``: leading dimensions, if any, stack independent\n    matrices. Reductions keep the"
            " reduced dimensions with size 1, so results broadcast against it.": (
                "shape ``(rows, columns)``. Reductions keep the reduced dimensions\n"
                "    with size 1, so results broadcast against it."
            ),
        },
        "Layout",
    )
    method = replaced(
        definition(base, "Moment2"),
        {_OUR_METHODS: _UPSTREAMS_METHODS},
        "Moment2",
    )
    make = replaced(
        definition(registry, "make_moment2"),
        {
            '    require_one_of("moment2_method", name, METHODS)\n': (
                "    if name not in METHODS:\n"
                '        raise TypeError(f"Invalid second moment method: {name!r}, choose from {list(METHODS)}")\n'
            ),
            "        ValueError: If the name is unknown or an option is out of its range.\n": (
                "        TypeError: If the name is unknown.\n        ValueError: If an option is out of its range.\n"
            ),
        },
        "make_moment2",
    )
    register = replaced(
        definition(registry, "register_moment2"), {"(name: Moment2MethodT)": "(name: str)"}, "register_moment2"
    )
    of_methods = [_method(name) for name in METHODS]
    text = "\n\n\n".join(
        part.strip("\n")
        for part in (
            HEADER
            + '"""Second moments of orthogonalized optimizers: which statistic is averaged, and which scale is made of it."""\n\n'
            "from abc import ABC, abstractmethod\n"
            "from collections.abc import Callable\n"
            "from dataclasses import dataclass, fields\n"
            "from typing import Any, ClassVar, final, override\n\n"
            "import torch",
            '__all__ = ["METHODS", "Layout", "Moment2", "Seen", "StripLayout", "make_moment2", "register_moment2"]\n\n'
            "Average = Callable[[torch.Tensor], torch.Tensor]",
            whole,
            definition((HERE / "strip_layout.py").read_text(), "StripLayout"),
            definition(layout, "_norm"),
            definition(base, "Seen"),
            method,
            "METHODS: dict[str, type[Moment2]] = {}",
            register,
            make,
            *of_methods,
        )
    )
    text = re.sub(r"\basync def ", "def ", text)
    text = re.sub(r"\bawait ", "", text)
    return text.replace("bias_correction", "correct_bias") + "\n"


def _method(name: str) -> str:
    """A method of ours, whose checks are upstream's plain ones."""
    source = (OURS / f"moment2/{name}.py").read_text()
    [method] = [each.name for each in ast.parse(source).body if isinstance(each, ast.ClassDef)]
    text = definition(source, method)
    return re.sub(
        r'( +)require\((?P<ok>.*), "(?P<rule>.*)", (?P<value>[\w.]+), "(?P<remedy>.*)"\)\n',
        lambda m: (
            f"{m[1]}if not {m['ok']}:\n"
            f'{m[1]}    raise ValueError(f"{m["rule"]}, got {{{m["value"]}}}: {m["remedy"]}")\n'
        ),
        text,
    )


def optimizer(source: str) -> str:
    """Returns upstream's adaptive_muon.py with the change.

    Args:
        source: The file as it is.
    """
    mine = (HERE / "adaptive_muon_methods.py").read_text()
    for name, known in _REPLACED.items():
        found = hashlib.sha256(definition(source, "AdaptiveMuon", name).encode()).hexdigest()[:16]
        if found != known:
            raise Unknown(
                f"{OPTIMIZER} must have the {name} that this program replaces, {known}, and has another, {found}.\n"
                "It has changed since this program was written: take the change over, then note its new hash here."
            )
    for gone in ("_match_frobenius_norm", "_apply_moment2_normalization"):
        source = without(source, "AdaptiveMuon", gone)
    for name in ("_init_group", "step"):
        source = replaced(
            source,
            {definition(source, "AdaptiveMuon", name): definition(mine, "AdaptiveMuon", name)},
            OPTIMIZER,
        )
    of_state = definition(mine, "AdaptiveMuon", "_init_group")
    before, after = (
        "".join(definition(mine, "AdaptiveMuon", name) + "\n" for name in names)
        for names in (("_moment2", "_corrects_bias", "layout", "orthogonalize"), ("_adaptive_scale",))
    )
    source = replaced(source, {of_state: before + of_state + "\n" + after.rstrip("\n") + "\n"}, OPTIMIZER)
    return replaced(source, _EDITS, OPTIMIZER)


# The definitions of upstream's that are replaced as a whole, by a hash of their text: 0.3.0's, and main's since.
_REPLACED = {
    "_match_frobenius_norm": "b911e66eedf5062e",
    "_apply_moment2_normalization": "70a421923f7ec242",
    "_init_group": "c67e45e74b6e663d",
    "step": "f0ce27b6c14ae224",
}

_EDITS = {
    "from typing import TYPE_CHECKING, Callable, Literal, override\n": (
        "from functools import cached_property\n"
        "from typing import TYPE_CHECKING, Any, Callable, Literal, cast, override\n"
    ),
    "from emerging_optimizers.orthogonalized_optimizers import muon, muon_utils\n": (
        "from emerging_optimizers.orthogonalized_optimizers import moment2, muon, muon_utils\n"
    ),
    '__all__ = ["AdaptiveMuon", "Moment2MethodT"]\n': '__all__ = ["AdaptiveMuon", "AdaptiveWeightDecayT", "Moment2MethodT"]\n',
    'Moment2MethodT = Literal["adamuon", "normuon", "namo"]\n': (
        'Moment2MethodT = Literal["adamuon", "normuon", "namo", "namo_d"]\n'
        'AdaptiveWeightDecayT = Literal["decoupled", "independent", "l2", "palm", "adaptive"]\n'
    ),
    "(AdaMuon/NorMuon/NAMO variants)": "(AdaMuon/NorMuon/NAMO/NAMO-D variants)",
    "        weight_decay_method: The weight decay method to use.\n": (
        '        weight_decay_method: The weight decay method to use. "adaptive" is the NAMO paper\'s, for "namo" and "namo_d":\n'
        "            decoupled and multiplied by the same adaptive scale as the update.\n"
    ),
    '("adamuon", "normuon", or "namo").': '("adamuon", "normuon", "namo" or "namo_d").',
    '            - "namo": Scalar adaptive scaling via Frobenius-norm ratio.\n': (
        '            - "namo": Scalar adaptive scaling via Frobenius-norm ratio.\n'
        '            - "namo_d": The same for each column, clamped around the mean of the columns.\n'
    ),
    "        eps: Small constant for numerical stability.\n    ": (
        "        eps: Small constant for numerical stability.\n"
        "        correct_bias: Whether the adaptive scale is corrected for its moving averages having started at zero. None\n"
        '            means what the method\'s source does: yes for "namo_d", no for the others.\n'
        '        namo_d_clamp: c in (0, 1] of "namo_d": column scales stay within [c, 1/c] of their mean.\n'
        "        tp_group: Process group over which parameters with ``partition_dim`` 0 (rows) or 1 (columns) lie in strips, in\n"
        "            the order of the ranks. Statistics, shape factors and the orthogonalization are then the whole matrix's.\n"
        '        tp_mode: How strips are orthogonalized, "duplicated" or "distributed", see\n'
        "            :func:`~emerging_optimizers.orthogonalized_optimizers.muon_utils.newton_schulz_tp`.\n"
        "    "
    ),
    '    """\n\n    def __init__(\n': (
        '    """\n\n'
        "    # For subclasses that set moment2_method without calling __init__.\n"
        "    correct_bias: bool | None = None\n"
        "    namo_d_clamp: float = 0.75\n"
        "    tp_group: torch.distributed.ProcessGroup | None = None\n"
        "    _decays_adaptively: bool = False\n\n"
        "    def __init__(\n"
    ),
    '        weight_decay_method: opt_mixin.WeightDecayT = "decoupled",\n': (
        '        weight_decay_method: AdaptiveWeightDecayT = "decoupled",\n'
    ),
    "        eps: float = 1e-8,\n    ):\n": (
        "        eps: float = 1e-8,\n"
        "        correct_bias: bool | None = None,\n"
        "        namo_d_clamp: float = 0.75,\n"
        "        tp_group: torch.distributed.ProcessGroup | None = None,\n"
        '        tp_mode: Literal["duplicated", "distributed"] = "duplicated",\n'
        "    ):\n"
        "        self.moment2_method = moment2_method\n"
        "        self.correct_bias = correct_bias\n"
        "        self.namo_d_clamp = namo_d_clamp\n"
    ),
    '        if moment2_method == "namo" and weight_decay_method == "l2":\n': (
        '        if self._moment2.reads_gradient and weight_decay_method == "l2":\n'
    ),
    '            raise ValueError(\'moment2_method="namo" is incompatible with weight_decay_method="l2"\')\n': (
        '            raise ValueError(f\'moment2_method="{moment2_method}" is incompatible with weight_decay_method="l2"\')\n'
        '        if weight_decay_method == "adaptive" and not self._moment2.adaptive_decay:\n'
        "            raise ValueError(f'weight_decay_method=\"adaptive\" is for namo and namo_d, got {moment2_method=}')\n"
        '        if tp_mode not in ("duplicated", "distributed"):\n'
        '            raise ValueError(f\'tp_mode must be "duplicated" or "distributed", got {tp_mode!r}\')\n'
    ),
    "        self.scale_mode = scale_mode\n": (
        "        self.tp_group = tp_group\n"
        '        self.tp_mode: Literal["duplicated", "distributed"] = tp_mode\n'
        "        self._layouts: dict[torch.Tensor, moment2.Layout] = {}\n"
        '        self._decays_adaptively = weight_decay_method == "adaptive"\n'
        "        self.num_ns_steps = num_ns_steps\n"
        "        self.coefficient_type: NSCoeffT = coefficient_type\n"
        "        self.scale_mode = scale_mode\n"
    ),
    "            weight_decay_method=weight_decay_method,\n": (
        "            weight_decay_method=cast(opt_mixin.WeightDecayT, weight_decay_method),\n"
    ),
    "        )\n        self.moment2_method = moment2_method\n": "        )\n",
}

_OLD_TEST_EDITS = {
    # The factor that keeps the norm is multiplied with the rows' scales before these meet O: a last bit may differ.
    """                expected_update,
                atol=0.0,
                rtol=0.0,
""": """                expected_update,
                atol=1e-6,
                rtol=1e-6,
""",
    # An unknown method was found out at the first step only.
    """        adaptive_opt = AdaptiveMuon(
            [test_param],
            lr=0.01,
            momentum=0.9,
            weight_decay=0.0,
            moment2_method="unknown",
        )

        with self.assertRaises(TypeError):
            adaptive_opt.step()
""": """        with self.assertRaises(TypeError):
            AdaptiveMuon(
                [test_param],
                lr=0.01,
                momentum=0.9,
                weight_decay=0.0,
                moment2_method="unknown",
            )
""",
}

_PAGE_EDITS = {
    ".. autoclass:: AdaptiveMuon\n    :members:\n": (
        ".. autoclass:: AdaptiveMuon\n    :members:\n\n"
        ".. automodule:: emerging_optimizers.orthogonalized_optimizers.moment2\n"
        ".. currentmodule:: emerging_optimizers.orthogonalized_optimizers.moment2\n\n"
        ".. autoclass:: Moment2\n    :members:\n\n"
        ".. autoclass:: Layout\n    :members:\n\n"
        ".. autoclass:: StripLayout\n\n"
        ".. currentmodule:: emerging_optimizers.orthogonalized_optimizers\n"
    ),
}


def change(repository: "Repository", revision: str) -> dict[str, str]:
    """Returns the files of the pull request by their paths in upstream's repository."""
    files = {OPTIMIZER: optimizer(repository.read(revision, OPTIMIZER)), MOMENT2: moment2()}
    for path, edits in ((OLD_TEST, _OLD_TEST_EDITS), (PAGE, _PAGE_EDITS)):
        if repository.has(revision, path):
            files[path] = replaced(repository.read(revision, path), edits, path)
    for test in sorted((HERE / "tests").glob("*.py")):
        body = test.read_text().removeprefix("# SPDX-License-Identifier: Apache-2.0\n")
        files[f"tests/{test.name}"] = HEADER + body
    return files


class Repository:
    """A git repository, written to without its work tree.

    Args:
        path: Its directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def git(self, *arguments: str, given: str | None = None, **environment: str) -> str:
        """Returns what a git command prints.

        Raises:
            ValueError: If it fails.
        """
        ran = subprocess.run(
            ["git", "-C", str(self.path), *arguments],
            input=given,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
        if ran.returncode:
            raise ValueError(f"git {' '.join(arguments)} failed in {self.path}: {ran.stderr.strip()}")
        return ran.stdout

    def has(self, revision: str, path: str) -> bool:
        """Returns whether a revision has a file."""
        return bool(self.git("ls-tree", "--name-only", revision, path).strip())

    def read(self, revision: str, path: str) -> str:
        """Returns a file of a revision."""
        return self.git("show", f"{revision}:{path}")

    def commit(self, revision: str, files: Mapping[str, str], message: str) -> str:
        """Commits files on top of a revision, signed off, and returns the new commit."""
        try:
            author = f"{self.git('config', 'user.name').strip()} <{self.git('config', 'user.email').strip()}>"
        except ValueError:
            raise ValueError(
                f"A sign-off needs a name and an address, and git knows none in {self.path}: set them with "
                "git config user.name and git config user.email."
            ) from None
        with tempfile.TemporaryDirectory() as scratch:
            index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
            self.git("read-tree", revision, **index)
            for path, text in files.items():
                blob = self.git("hash-object", "-w", "--stdin", given=text).strip()
                self.git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", **index)
            tree = self.git("write-tree", **index).strip()
        signed = f"{message.rstrip()}\n\nSigned-off-by: {author}\n"
        return self.git("commit-tree", tree, "-p", revision, given=signed).strip()


def formatted(files: Mapping[str, str]) -> dict[str, str]:
    """Returns the Python files as ruff formats them, with upstream's line length."""

    def through_ruff(path: str, text: str) -> str:
        command = [
            sys.executable,
            "-m",
            "ruff",
            "format",
            "--isolated",
            "--line-length",
            "119",
            "--stdin-filename",
            path,
            "-",
        ]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout

    return {path: through_ruff(path, text) if path.endswith(".py") else text for path, text in files.items()}


def main(arguments: Iterable[str] | None = None) -> None:
    """Makes the branch, the patch and the text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="git repository of Emerging-Optimizers")
    parser.add_argument("--base", default="HEAD", help="revision to start from (default: %(default)s)")
    parser.add_argument("--branch", default="adaptive-muon-namo-d", help="new branch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("upstream-patch"), help="directory for patch and text")
    given = parser.parse_args(None if arguments is None else list(arguments))
    repository = Repository(given.path)
    try:
        if repository.git("branch", "--list", given.branch).strip():
            raise ValueError(f"The branch must be new, and {given.branch} is there: delete it, or name another.")
        files = formatted(change(repository, given.base))
        commit = repository.commit(given.base, files, f"{SUBJECT}\n\n{BODY}")
        repository.git("branch", given.branch, commit)
        patch = repository.git("format-patch", "-1", "--stdout", commit)
    except ValueError as error:
        parser.error(str(error))
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "0001-adaptive-muon-namo-d.patch").write_text(patch)
    text = (HERE / "PULL_REQUEST.md").read_text().split("\n", 1)[1]  # without the licence of this repository's files
    (given.output / "PULL_REQUEST.md").write_text(text)
    print(f"Branch {given.branch} of {given.path}; patch and PULL_REQUEST.md in {given.output}.")


if __name__ == "__main__":
    main()
