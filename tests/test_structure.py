# SPDX-License-Identifier: Apache-2.0
"""The structure of the package, read from its source: sizes, import circles, layers, and private names."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import pytest
from tree import ROOT, own_files


PACKAGE = "emerging_optimizers.adaptive_muon"
MOST_LINES = {ast.ClassDef: 250, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}
# A part of the package may import what stands in a later line, and nothing else. "" is the package's __init__.py.
LEVELS = (
    {"adaptive_muon_discovery", "launch"},
    {"integrations"},
    {""},
    {"hybrid"},
    {"optimizer", "routing", "adamw"},
    {"options"},
    {"pipeline"},
    {"planner", "update"},
    {"diagnostics"},
    {"passes", "exchange", "state", "rounding"},
    {"sharding", "orthogonalize", "moment2"},
    {"parameters", "modes", "identity", "weight_decay", "hooks"},
    {"checks", "kernels", "versions"},
    {"noise"},
)
# These parts may import less than the levels allow.
ONLY = {"routing": {"options", "sharding", "parameters", "identity", "checks"}, "moment2": set[str]()}
# Private names of other packages that have no public counterpart, as patterns, with the reason to read them.
FOREIGN = {
    "torch._compile": "the import of torch._dynamo, which torch.compiler.disable needs, takes a second",
    "_disable_dynamo": "as torch._compile",
    "torch.utils._python_dispatch": "is_traceable_wrapper_subclass has no public place",
    "torch.distributed.tensor._utils": "the offset of a DTensor's local shard has no public function",
    "_comm_hooks": "the hooks that DistributedDataParallel has; no public function tells",
    "_batches_that_stepped": "the step of Lightning's loggers; global_step counts that of every optimizer",
    "_trainer": "a LightningModule's public trainer raises an error where it has none",
    "_foreach_*": "torch's optimizers are built on these; torch documents no others",
    "_get_capturable_supported_devices": "the devices on which torch's AdamW takes capturable=True",
    "_ConvNd": "torch's convolutions have no other base in common",
    "_C": "the getter and setter of the new precision switches, which no attribute reaches for all backends",
    "_get_fp32_precision_getter": "as _C",
    "_set_fp32_precision_setter": "as _C",
    "_is_amx_tile_supported": "what the CPU has; torch.cpu has no public question for it",
    "_is_avx512_bf16_supported": "as _is_amx_tile_supported",
    "_fsdp_flattened": "the mark of FSDP1's flat parameters",
    "_megatron_fsdp_model": "the mark of Megatron-FSDP's flat parameters",
    "_COEFFICIENT_SETS": "upstream's table of coefficients has no accessor",
    "_OPTIMIZERS": "upstream's register_optimizer refuses a name twice",
    "_EMERGING_OPTIMIZERS": "Megatron's table has no function that replaces an entry",
    "_GLOBAL_ARGS": "Megatron's get_args raises where no command line was parsed",
    "_option_string_actions": "argparse cannot look up or widen a flag otherwise",
    "_trainable_params_or_groups": "Automodel's configs share it with their subclasses",
}
# Private names of the package that its tests read, for want of a public way.
TESTED = {
    "_init_group": "upstream's, which Megatron calls before it loads a checkpoint",
    "_muon": "options of HybridAdaptiveMuon's matrices that no group shows",
}


class Module(NamedTuple):
    """A module of the project: its dotted name, whether it is a package, and its syntax tree."""

    name: str
    is_package: bool
    tree: ast.Module


class Import(NamedTuple):
    """An import statement for one name: the module, the name taken from it or "", and the statement's marks."""

    module: str
    name: str
    in_function: bool
    relative: bool


def modules() -> dict[str, Module]:
    found = {}
    for path in own_files(ROOT / "emerging_optimizers"):
        if path.suffix == ".py":
            parts = [*path.relative_to(ROOT).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            found[name] = Module(name, is_package, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imports(module: Module) -> list[Import]:
    """The imports of a module, wherever they stand: under ``TYPE_CHECKING`` and in functions too."""
    nested = {
        node
        for function in ast.walk(module.tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    package = module.name.split(".")[: None if module.is_package else -1]
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, "", node in nested, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            target = ".".join([*above, *([node.module] if node.module else [])])
            found += [Import(target, alias.name, node in nested, node.level > 0) for alias in node.names]
    return found


def imported(module: Module, known: dict[str, Module]) -> list[tuple[str, Import]]:
    """The modules of the project that a module imports."""
    found = []
    for each in imports(module):
        submodule = f"{each.module}.{each.name}"
        target = submodule if submodule in known else each.module
        if target in known:
            found.append((target, each))
    return found


def part(name: str) -> str:
    """The part of the package that a module belongs to, as :data:`LEVELS` calls it."""
    below = name.removeprefix("emerging_optimizers.").removeprefix("adaptive_muon.").split(".")[0]
    return "" if below == "adaptive_muon" else below


# ------------------------------------------------------------------------------------------- rules, and what breaks them


def too_long(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        most = MOST_LINES.get(type(node))
        if most is not None:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = node.end_lineno - first + 1
            if lines > most:
                yield f"{module.name}.{node.name} has {lines} lines, more than {most}"


def circle(known: dict[str, Module]) -> list[str]:
    """Modules that import each other in a circle. An integration may import another one in a function."""
    graph = {
        name: {
            target
            for target, each in imported(module, known)
            if target != name and not (each.in_function and part(target) == "integrations")
        }
        for name, module in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def upwards(module: Module, known: dict[str, Module]) -> Iterator[str]:
    level = {name: index for index, names in enumerate(LEVELS) for name in names}
    own = part(module.name)
    if own not in level:
        yield f"{module.name} belongs to no level; add it to LEVELS"
        return
    for target, relative in dict.fromkeys((target, each.relative) for target, each in imported(module, known)):
        other = part(target)
        if own == "moment2" and other == own and not relative:
            yield f"{module.name} imports {target} by its full name; moment2 is copied upstream as it is"
        if other != own and (other not in level or level[other] <= level[own] or other not in ONLY.get(own, level)):
            yield f"{module.name} imports {target}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_private_names(module: Module) -> set[str]:
    """Private names that a module defines itself: its globals, its classes' members, and attributes of ``self``."""
    names = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_self(node: ast.expr) -> bool:
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    if isinstance(node, ast.Call):
        node = node.func
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "super")


def private_reads(module: Module) -> Iterator[tuple[int, str]]:
    """Private names that a module takes from elsewhere, with their lines."""
    own = own_private_names(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_self(node.value):
            if node.attr not in own:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            name = node.args[1] if len(node.args) > 1 else None  # getattr, hasattr, setattr, monkeypatch.setattr
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and not is_self(node.args[0]):
                yield node.lineno, str(name.value)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if any(map(is_private, a.name.split("."))))
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if any(map(is_private, target.split("."))):
                yield node.lineno, target
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))


def private_names(module: Module) -> Iterator[str]:
    for line, name in private_reads(module):
        if not any(fnmatchcase(name, pattern) for pattern in FOREIGN):
            yield f"{module.name}, line {line}, reads {name}"


# ------------------------------------------------------------------------------------------------- the package keeps them


def check(problems: list[str]) -> None:
    """Fails with all problems, one a line."""
    assert not problems, "\n" + "\n".join(problems)


def test_classes_and_functions_are_short() -> None:
    check([problem for module in modules().values() for problem in too_long(module)])


def test_no_import_circle() -> None:
    check(circle(modules()))


def test_imports_go_down() -> None:
    known = modules()
    check([problem for module in known.values() for problem in upwards(module, known)])


def test_private_names_stay_in_their_module() -> None:
    check([problem for module in modules().values() for problem in private_names(module)])


def test_tests_use_public_names() -> None:
    of_package = {name for module in modules().values() for name in own_private_names(module)} - TESTED.keys()
    tests = [
        Module(path.stem, False, ast.parse(path.read_text(encoding="utf-8")))
        for path in own_files(ROOT / "tests")
        if path.suffix == ".py"
    ]
    check([each for test in tests for each in private_names(test) if each.split()[-1] in of_package])


def test_every_exception_is_needed() -> None:
    read = {name for module in modules().values() for _, name in private_reads(module)}
    unused = [pattern for pattern in FOREIGN if not any(fnmatchcase(name, pattern) for name in read)]
    check([f"FOREIGN lists {pattern}, which no module reads: remove it" for pattern in unused])


# ------------------------------------------------------------------------------------------------ and the rules see faults


def made(sources: dict[str, str]) -> dict[str, Module]:
    """Modules of the package made of sources."""
    names = {f"{PACKAGE}.{name}": source for name, source in sources.items()}
    return {name: Module(name, False, ast.parse(source)) for name, source in names.items()}


def test_a_long_class_or_function_is_seen() -> None:
    for kind, most in (("class A:", 250), ("def f():", 60), ("async def f():", 60), ("@g\ndef f():", 60)):
        for lines in (most, most + 1):
            body = "    pass\n" * (lines - len(kind.splitlines()))
            [module] = made({"checks": f"{kind}\n{body}"}).values()
            assert len([*too_long(module)]) == lines - most, (kind, lines)


@pytest.mark.parametrize(
    "source",
    [
        "from emerging_optimizers.adaptive_muon.sharding.b import y",
        "from emerging_optimizers.adaptive_muon.sharding import b",
        "import emerging_optimizers.adaptive_muon.sharding.b",
        "from .b import y",
        "from . import b",
        "if TYPE_CHECKING:\n    from .b import y",
        "def f():\n    from .b import y",
    ],
)
def test_a_circle_is_seen(source: str) -> None:
    assert circle(made({"sharding.a": source, "sharding.b": "from .a import x"}))
    assert not circle(made({"sharding.a": source, "sharding.b": ""}))


def test_integrations_may_import_each_other_in_functions() -> None:
    source = "def f():\n    from emerging_optimizers.adaptive_muon.integrations.b import y"
    assert not circle(made({"integrations.a": source, "integrations.b": "from .a import x"}))


@pytest.mark.parametrize(
    ("name", "source", "seen"),
    [
        ("checks", "from emerging_optimizers.adaptive_muon.parameters import x", True),
        ("parameters", "from emerging_optimizers.adaptive_muon.checks import x", False),
        ("sharding.a", "from ..exchange.x import y", True),
        ("sharding.a", "if TYPE_CHECKING:\n    from ..exchange.x import y", True),
        ("sharding.a", "from ..orthogonalize.x import y", True),
        ("sharding.a", "from .x import y", False),
        ("exchange.x", "from ..sharding.x import y", False),
        ("optimizer", "from .routing.x import y", True),
        ("routing.x", "from ..exchange.x import y", True),
        ("routing.x", "from ..parameters import y", False),
        ("moment2.x", "from ..checks import y", True),
        ("moment2.x", f"from {PACKAGE}.moment2.y import z", True),
        ("moment2.x", "from .y import z", False),
        ("unheard_of", "", True),
    ],
)
def test_an_import_upwards_is_seen(name: str, source: str, seen: bool) -> None:
    others = ("checks", "parameters", "exchange.x", "orthogonalize.x", "sharding.x", "routing.x", "moment2.y")
    known = made(dict.fromkeys(others, "") | {name: source})
    assert bool([*upwards(known[f"{PACKAGE}.{name}"], known)]) is seen


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("from torch import _x", True),
        ("import torch._x", True),
        ("from torch._x import y", True),
        ("from .base import _x", True),
        ("other._x", True),
        ("other._x = 1", True),
        ("getattr(other, '_x')", True),
        ("hasattr(other, '_x')", True),
        ("patch.setattr(other, '_x', 1)", True),
        ("class A:\n    def f(self, other):\n        return self._x, cls._x, super()._x", False),
        ("class A:\n    def f(self, other):\n        self._x = other._x", False),
        ("class A:\n    def _x(self, other):\n        return other._x", False),
        ("class A:\n    _x: int = 0\nA._x", False),
        ("other.__dict__, __name__", False),
        ("torch._foreach_add_, torch._C", False),
    ],
)
def test_a_private_name_is_seen(source: str, seen: bool) -> None:
    [module] = made({"checks": source}).values()
    assert bool([*private_names(module)]) is seen
