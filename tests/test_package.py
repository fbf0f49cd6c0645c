# SPDX-License-Identifier: Apache-2.0
"""The overlay package: what the wheel holds, what an import does, what a method file may say."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import get_args

import pytest
from tree import ROOT, own_files

import emerging_optimizers.adaptive_muon as package
from emerging_optimizers.adaptive_muon import Moment2MethodT
from emerging_optimizers.adaptive_muon.moment2 import METHODS


SOURCES = Path(package.__file__).parent


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter, away from the checkout, and returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy keeps the build's leftovers out of the checkout
    shutil.copytree(
        ROOT / "emerging_optimizers", source / "emerging_optimizers", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    # Not in the checkout, whose folder named build would be run.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_never_holds_upstreams_file(wheel):
    assert "emerging_optimizers/__init__.py" not in wheel
    assert all(
        re.match(r"emerging_optimizers(/adaptive_muon(_discovery)?/|_adaptive_muon-[^/]+\.dist-info/)", name)
        for name in wheel
    )


def test_wheel_holds_every_source_and_the_type_marker(wheel):
    sources = {str(path.relative_to(SOURCES)) for path in own_files(SOURCES) if path.suffix in (".py", ".typed")}
    sources |= {"py.typed"}
    assert {f"emerging_optimizers/adaptive_muon/{name}" for name in sources} <= wheel.keys()
    assert "emerging_optimizers/adaptive_muon_discovery/__init__.py" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_wheel_metadata(wheel):
    (metadata,) = (text.decode() for name, text in wheel.items() if name.endswith("METADATA"))
    assert "Name: emerging-optimizers-adaptive-muon\n" in metadata
    required = set(re.findall(r"Requires-Dist: ([^;\n]+)\n", metadata))
    assert required == {"torch>=2.6", "absl-py", "emerging-optimizers<0.6,>=0.3"}
    assert {"megatron", "nemo", "automodel", "huggingface", "test", "docs"} <= set(
        re.findall(r"Provides-Extra: (\S+)", metadata)
    )


def test_wheel_is_found_by_lightning(wheel):
    (entry_points,) = (text.decode() for name, text in wheel.items() if name.endswith("entry_points.txt"))
    assert entry_points.split("\n")[:2] == [
        "[lightning.pytorch.callbacks_factory]",
        "adaptive_muon = emerging_optimizers.adaptive_muon_discovery:lightning_callbacks",
    ]


def test_discovery_imports_next_to_nothing():
    code = "import sys; before = set(sys.modules); from emerging_optimizers import adaptive_muon_discovery as found\n"
    code += "assert found.lightning_callbacks() == []\n"
    code += "print(sorted(n for n in set(sys.modules) - before if '.' not in n or n.startswith('emerging')))"
    imported = set(eval(run_python(code)))
    ours = {"emerging_optimizers", "emerging_optimizers.package_info", "emerging_optimizers.adaptive_muon_discovery"}
    assert ours <= imported
    assert not imported & {"torch", "absl", "numpy", "nemo", "lightning"}
    assert {name for name in imported if name.startswith("emerging")} == ours


def test_checkout_has_no_init_at_the_top():
    assert not (ROOT / "emerging_optimizers" / "__init__.py").exists()


def test_every_file_names_its_license():
    kept = ["emerging_optimizers", "tests", "examples", "benchmarks", "experiments", "tools", "docs", ".ci"]
    kept += ["setup.py", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in"]
    kept = [name for name in kept if (ROOT / name).exists()]
    files = [path for name in kept for path in ([ROOT / name] if (ROOT / name).is_file() else own_files(ROOT / name))]
    files = [f for f in files if f.suffix in (".py", ".toml", ".md") or f.name in ("Makefile", "MANIFEST.in", "run")]
    without = [
        str(f.relative_to(ROOT))
        for f in files
        if "SPDX-License-Identifier: Apache-2.0" not in f.read_text(encoding="utf-8")
    ]
    assert len(files) > 20 and not without


def test_import_pulls_in_no_framework():
    names = ("megatron", "nemo", "lightning", "pytorch_lightning", "transformers", "accelerate", "matplotlib")
    code = f"import sys, emerging_optimizers.adaptive_muon; print([n for n in {names} if n in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("version", ["0.2.9", "0.6.0a0", "0.10.1", "1.0", None])
def test_an_unsupported_upstream_is_refused_by_its_number(version):
    """Before anything else is imported; pip is asked for the same versions, see above."""
    code = "import sys, emerging_optimizers as upstream\n"
    code += f"upstream.__version__ = {version!r}\n" if version else "del upstream.__version__\n"
    code += "try:\n    import emerging_optimizers.adaptive_muon\nexcept ImportError as error:\n    print(error)\n"
    code += "assert 'torch' not in sys.modules"
    should = f'must be >= 0.3 and < 0.6, got {version or "none"}. Install "emerging-optimizers>=0.3,<0.6".'
    assert run_python(code) == f"emerging-optimizers {should}"


@pytest.mark.parametrize("version", ["0.3.0", "0.3.99", "0.4.0", "0.5.0a0", "0.5.2.post1"])
def test_a_supported_upstream_is_not(version):
    code = "import emerging_optimizers as upstream\n"
    code += f"upstream.__version__ = {version!r}\n"
    assert (
        run_python(code + "from emerging_optimizers.adaptive_muon.versions import *\nrequire_supported_upstream()")
        == ""
    )


OLD_TRITON = """
import sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name == "emerging_optimizers.orthogonalized_optimizers":
            raise RuntimeError("0 active drivers ([]). There should only be one.")

sys.meta_path.insert(0, Refuses())
try:
    import emerging_optimizers.adaptive_muon
except ImportError as error:
    print(error)
"""


def test_an_old_triton_without_a_gpu_is_said():
    """That of torch 2.6 and 2.7, with which upstream cannot be imported there."""
    said = run_python(OLD_TRITON)
    assert "must find a GPU where Triton is older than 3.4, got RuntimeError('0 active drivers" in said
    assert said.endswith("or install torch 2.8 or newer.")


WITHOUT_TRITON = """
import sys, types

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")

sys.meta_path.insert(0, Blocked())
try:
    import emerging_optimizers.triton_kernels
except ModuleNotFoundError:  # before 0.4.0, which has what follows
    kernels = sys.modules["emerging_optimizers.triton_kernels"] = types.ModuleType("triton_kernels")
    kernels.HAS_TRITON_340 = False

import torch
from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.kernels.usable import kernels_usable
from emerging_optimizers.adaptive_muon.moment2 import METHODS

for method in METHODS:
    for algorithm in ("auto", "gram", "standard"):
        model = torch.nn.Sequential(torch.nn.Linear(400, 200), torch.nn.Linear(200, 400))
        optimizer = HybridAdaptiveMuon.from_model(
            model, lr=1e-3, moment2_method=method, ns_algorithm=algorithm, use_syrk=True, routes={"*weight": "adaptive_muon"}
        )
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(2, 400)).square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))
torch.version.cuda, torch.cuda.get_device_capability = "13.0", lambda index: (9, 0)
assert not kernels_usable(torch.device("cuda", 0))
print("triton" in sys.modules)
"""


def test_all_but_the_kernels_works_without_triton():
    """Upstream needs it no more since 0.4.0."""
    assert run_python(WITHOUT_TRITON) == "False"


OURS = "import emerging_optimizers.adaptive_muon as ours"
THEIRS = "import emerging_optimizers.orthogonalized_optimizers as theirs"
ASK = "from emerging_optimizers import registry; print(registry.get_optimizer_cls('adaptive_muon').__module__)"


@pytest.mark.parametrize(
    "imports",
    [
        [OURS],
        [OURS, THEIRS],
        [THEIRS, OURS],
        [OURS, "import importlib; importlib.reload(ours)"],
        [OURS, "import sys; [sys.modules.pop(n) for n in list(sys.modules) if 'adaptive_muon.' in n]", OURS],
    ],
    ids=["ours", "ours first", "upstream first", "reloaded", "imported anew"],
)
def test_registry_gives_our_class(imports):
    assert run_python("\n".join([*imports, ASK])) == "emerging_optimizers.adaptive_muon.optimizer"


def test_registry_configures_our_class():
    code = f"""{OURS}
from emerging_optimizers import registry
import torch
make = registry.get_configured_optimizer_cls("adaptive_muon", moment2_method="namo_d", lr=0.5)
print(make([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0]["lr"])"""
    assert run_python(code) == "0.5"


def test_every_name_is_a_registered_method_in_its_own_file():
    assert set(METHODS) == set(get_args(Moment2MethodT))
    for name, method in METHODS.items():
        assert method.__module__.endswith(f".moment2.{name}")


@pytest.mark.parametrize("path", [*(SOURCES / "moment2").glob("*.py")], ids=lambda path: path.name)
def test_method_files_know_nothing_of_sharding(path):
    assert not re.search(r"\b(rank|group|world|all_reduce|distributed)\b", path.read_text(encoding="utf-8"))
