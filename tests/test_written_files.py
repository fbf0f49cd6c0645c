# SPDX-License-Identifier: Apache-2.0
"""What commands write into a checkout changes no other command: lint, types, tests, sdist and wheel do not see it."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tree import ROOT, SETTINGS, WRITTEN


SOURCES = ("benchmarks", "docs", "emerging_optimizers", "examples", "experiments", "tests", "tools")

# Each of these files fails lint, format, types, collection or the tests, should a command take it for the project's.
SPOILED = {
    "__init__.py": "raise RuntimeError('imported by mistake')\n",
    "conftest.py": "raise RuntimeError('imported by mistake')\n",
    "test_spoiled.py": "import os, sys\ndef test_spoiled( ):\n    assert  False\n",
    "runs.py": "import os\nx:int = 'no int'\ndef f( :\n",
    "data.json": "{}",
    "page.md": "No license, and a [dead link](nowhere.md).",
}


def spoil(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in SPOILED.items():
        (folder / name).write_text(text, encoding="utf-8")


def copied(target: Path) -> Path:
    """Copies the tree without what commands have written into it, and without .gitignore, which an sdist lacks too."""
    target.mkdir()
    written = shutil.ignore_patterns("__pycache__", ".*", *WRITTEN)
    for path in ROOT.iterdir():
        if path.name in SOURCES:
            shutil.copytree(path, target / path.name, ignore=written)
        elif path.is_file() and not path.name.startswith(".git"):
            shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("clean") / "tree")


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which every command was run, from the top and from within, and left files that would hurt."""
    tree = copied(tmp_path_factory.mktemp("spoiled") / "tree")
    modules = [path.stem for name in SOURCES for path in (tree / name).rglob("*.py") if path.stem.isidentifier()]
    inside = [path for name in SOURCES for path in (tree / name).rglob("*") if path.is_dir()]
    metadata = "emerging_optimizers_adaptive_muon.egg-info"
    for name in WRITTEN:
        plain = name.replace("*.egg-info", metadata)
        for folder in (tree, *(tree / source for source in SOURCES), *inside):
            spoil(folder / plain)
        # Named as the modules that tests and examples import by plain names, and as packages.
        for module in (*modules, "emerging_optimizers", "emerging_optimizers/adaptive_muon", "torch", "tests"):
            spoil(tree / plain / module)
    for module in {*modules} - {"setup", "__init__"}:  # a folder that a user names with --out
        if not (tree / module).exists():
            spoil(tree / module)
    spoil(tree / "build/lib/emerging_optimizers")
    spoil(tree / "build/lib/emerging_optimizers/adaptive_muon/moment2")
    everything = [str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()]
    shutil.rmtree(tree / metadata)  # it is the wheel's, and setuptools adds to an sdist what this file lists
    (tree / metadata).mkdir()
    (tree / metadata / "SOURCES.txt").write_text("\n".join(everything))
    for name in ("benchmarks/results/step.json", "experiments/gpt2/results/tiny.json"):
        (tree / name).write_text("{}")
    return tree


def run(tree: Path, *command: str) -> str:
    """Runs Python in a tree, and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def test_all_names_are_in_each_list():
    """Of git, ruff, mypy, pytest and setuptools, none of which reads another's."""
    assert {"runs", "upstream-patch", "_build", "build", "dist", "lightning_logs", "nemo_experiments"} <= set(WRITTEN)
    assert all(re.search(SETTINGS["mypy"]["exclude"], f"a/{name.replace('*', 'x')}/b.py") for name in WRITTEN)
    assert set(WRITTEN) <= set(SETTINGS["pytest"]["ini_options"]["norecursedirs"])
    assert set(WRITTEN) <= set(SETTINGS["codespell"]["skip"].split(","))
    pruned = [line.removeprefix("prune **/") for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    assert set(WRITTEN) <= set(pruned)
    if (ROOT / ".gitignore").exists():
        assert {f"{name}/" for name in WRITTEN} <= set((ROOT / ".gitignore").read_text().splitlines())


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(spoiled, command):
    run(spoiled, "-m", "ruff", *command, "--no-cache", ".")


def test_ruff_looks_at_every_file(clean):
    found = run(clean, "-m", "ruff", "check", "--no-cache", "--show-files", ".").splitlines()
    assert {Path(path).resolve() for path in found} == {path.resolve() for path in clean.rglob("*.py")}


# Prints the files that mypy would check, which takes a minute where it does.
OF_MYPY = """
from mypy.main import process_options
sources, _ = process_options([])
print(*sorted(source.path for source in sources), sep="\\n")
"""


def test_mypy_checks_the_same(clean, spoiled):
    checked = [run(tree, "-c", OF_MYPY).splitlines() for tree in (clean, spoiled)]
    assert len(checked[0]) > 20 and checked[0] == checked[1]


# Collects the names of the test files alone: to import them takes half a minute, for the sake of the frameworks.
NAMES_ONLY = """
import pytest

class Name(pytest.Item):
    def runtest(self):
        pass

class File(pytest.File):
    def collect(self):
        yield Name.from_parent(self, name=self.path.name)

def pytest_pycollect_makemodule(module_path, parent):
    return File.from_parent(parent, path=module_path)
"""


def test_pytest_collects_the_same(clean, spoiled, tmp_path, monkeypatch):
    (tmp_path / "names_only.py").write_text(NAMES_ONLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = ("pytest", "--collect-only", "-p", "no:cacheprovider", "-p", "names_only")
    collected = [
        [line for line in run(tree, "-m", *command).splitlines() if "::" in line] for tree in (clean, spoiled)
    ]
    assert len(collected[0]) > 20 and collected[0] == collected[1]


def test_prose_of_what_is_written_is_not_read(spoiled):
    run(spoiled, "tools/prose.py")


def test_tests_about_the_tree_pass(spoiled):
    """Those that walk through it."""
    command = ("pytest", "-p", "no:cacheprovider", "tests/test_package.py", "tests/test_docs.py")
    out = run(spoiled, "-m", *command, "-k", "wheel or checkout or license or within_the_repository")
    assert "passed" in out


@pytest.fixture(scope="module")
def built(clean, spoiled, tmp_path_factory):
    """What is in sdist and wheel of both trees, each built in its tree, as by pip install ."""
    contents = []
    for tree in (clean, spoiled):
        folder = tmp_path_factory.mktemp("built")
        command = ("build", "--no-isolation", "--sdist", "--wheel", "--outdir", str(folder), str(tree))
        run(tree.parent, "-m", *command)  # in the tree "-m build" could be its folder of that name
        [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
        with tarfile.open(sdist) as archive:
            names = [member.name.partition("/")[2] for member in archive if member.isfile()]
        with zipfile.ZipFile(wheel) as archive:
            contents.append((sorted(names), sorted(archive.namelist())))
    return contents


def test_sdist_and_wheel_are_the_same(built):
    for names, others in zip(*built, strict=True):
        assert set(others) ^ set(names) == set()


def test_wheel_is_the_package(built, clean):
    sources = {str(path.relative_to(clean)) for path in (clean / "emerging_optimizers").rglob("*") if path.is_file()}
    assert {name for name in built[0][1] if ".dist-info/" not in name} == sources


def test_sdist_is_what_is_committed(built):
    """What git has, but for its own files and CI's."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    committed = {name for name in git.stdout.splitlines() if (ROOT / name).exists()}
    committed = {name for name in committed if not fnmatch.fnmatch(name, ".ci/*") and name != ".gitignore"}
    made = {"PKG-INFO", "setup.cfg", "emerging_optimizers_adaptive_muon.egg-info/SOURCES.txt"}
    missing = committed - {*built[0][0]}
    assert not missing, f"name them in MANIFEST.in: {sorted(missing)}"
    extra = {*built[0][0]} - committed - made
    new = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert extra <= set(new.stdout.splitlines())  # not committed yet
