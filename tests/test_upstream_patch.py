# SPDX-License-Identifier: Apache-2.0
"""The pull request to upstream: it applies, and what it makes passes its tests.

The tests make upstream's main from the installed 0.3.0, as far as the pull request needs it. Where you have a checkout
of main, run them on the checkout:

    UPSTREAM_CHECKOUT=../Emerging-Optimizers python -m pytest tests/test_upstream_patch.py
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "make_upstream_patch.py"
tool = module_from_spec(spec_from_file_location("make_upstream_patch", TOOL))
tool.__loader__.exec_module(tool)
CHECKOUT = os.environ.get("UPSTREAM_CHECKOUT")
OPTIMIZER = f"{tool.PACKAGE}/adaptive_muon.py"
# What main's file has otherwise than the installed one. The tool compares the result with the hash of main's file.
SINCE_030 = {
    'f"Orthogonalizing grad with {num_ns_steps} steps, {coefficient_type} coefficient"': (
        '"Orthogonalizing grad with %s steps, %s coefficient", num_ns_steps, coefficient_type'
    ),
    'f"Applying Muon scale factor {scale_factor}, extra_scale_factor={self.extra_scale_factor}"': (
        '"Applying Muon scale factor %s, extra_scale_factor=%s", scale_factor, self.extra_scale_factor'
    ),
}
# The files of the diff that an installed package does not have.
OLD_TEST, PAGE = "tests/test_adaptive_muon.py", "docs/apidocs/orthogonalized-optimizers.md"
# What upstream's configuration asks of its code (0.3.0 and main of August 2026).
RUFF = ["--isolated", "--line-length", "119", "--target-version", "py312"]
RULES = [
    "--select",
    "F541,F841,F401,E741,F821,I,G004,D101,D103",
    "--per-file-ignores",
    "tests/*.py:D101,tests/*.py:D103",
]
ISORT = ["lint.isort.known-first-party=['emerging_optimizers']", "lint.isort.lines-after-imports=2"]

# Runs the patched class and this repository's on the same gradients, in one process, and prints the largest distance.
SIDE_BY_SIDE = """
import importlib.util, itertools, sys
import torch
import emerging_optimizers
theirs = importlib.import_module("emerging_optimizers.orthogonalized_optimizers.adaptive_muon").AdaptiveMuon
assert emerging_optimizers.__file__.startswith(sys.argv[1])
emerging_optimizers.__path__.append(sys.argv[2])
from emerging_optimizers.adaptive_muon import AdaptiveMuon as ours
for name, corrected, nesterov, shape in itertools.product(
    ("adamuon", "normuon", "namo", "namo_d"), (True, False, None), (True, False), ((6, 9), (9, 6))
):
    start, weights = torch.randn(shape), []
    for cls, option in ((theirs, "correct_bias"), (ours, "bias_correction")):
        torch.manual_seed(0)
        p = torch.nn.Parameter(start.clone())
        decay = "adaptive" if name.startswith("namo") else "decoupled"
        kwargs = {option: corrected, "nesterov": nesterov, "weight_decay_method": decay, "moment2_method": name}
        optimizer = cls([p], lr=0.1, momentum=0.9, weight_decay=0.3, fp32_matmul_prec="highest", **kwargs)
        for _ in range(4):
            p.grad = torch.randn(shape)
            optimizer.step()
        weights.append(p.detach())
    off = (weights[0] - weights[1]).norm() / (weights[1] - start).norm()
    assert off < 2e-6, (name, corrected, nesterov, shape, off)
print("same")
"""


def run(*command, cwd, **environment):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # a collective that a rank does not join would wait for longer
    )


def passages(name, sign):
    """The passages of a file that the diff has, before ("-") or after ("+") the change."""
    [part] = [part for part in tool.DIFF.read_text().split("diff --git ") if part.startswith(f"a/{name} ")]
    hunks = [hunk.splitlines()[1:] for hunk in part.split("\n@@ ")[1:]]
    return ["".join(f"{line[1:]}\n" for line in hunk if line[0] in (" ", sign)) for hunk in hunks]


def git(repository, *arguments):
    done = run("git", *arguments, cwd=repository)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(repository, *arguments):
    return run(sys.executable, TOOL, repository, *arguments, cwd=repository)


def new_repository(path):
    """A repository with upstream's main: a clone of your checkout at its commit, or made from the installed package."""
    if CHECKOUT:
        git(ROOT, "clone", "--quiet", CHECKOUT, path)
        git(path, "checkout", "--quiet", "-B", "main", git(CHECKOUT, "rev-parse", "HEAD").strip())
        name_the_author(path)
        return path
    [installed] = [Path(each) for each in find_spec("emerging_optimizers").submodule_search_locations][:1]
    ours = shutil.ignore_patterns("adaptive_muon", "adaptive_muon_discovery", "__pycache__")
    shutil.copytree(installed, path / "emerging_optimizers", ignore=ours)
    text = (path / OPTIMIZER).read_text()
    for old, new in SINCE_030.items():
        text = text.replace(old, new)
    (path / OPTIMIZER).write_text(text)
    for name in (OLD_TEST, PAGE):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("...\n".join(passages(name, "-")))
    git(path, "init", "--quiet", "--initial-branch", "main")
    name_the_author(path)
    git(path, "add", ".")
    git(path, "commit", "--quiet", "--message", "as installed")
    return path


def name_the_author(repository):
    for key, value in (("commit.gpgsign", "false"), ("user.name", "Ada"), ("user.email", "ada@example.com")):
        git(repository, "config", key, value)


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    return new_repository(tmp_path_factory.mktemp("upstream") / "upstream")


@pytest.fixture(scope="module")
def output(upstream, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    done = make(upstream, "--output", output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def patched(upstream, output, tmp_path_factory):
    """A clone of what upstream has, to which the patch was applied as a maintainer would."""
    clone = tmp_path_factory.mktemp("clone") / "clone"
    git(upstream, "clone", "--quiet", "--branch", "main", upstream, clone)
    git(clone, "config", "user.name", "Maintainer")
    git(clone, "config", "user.email", "maintainer@example.com")
    git(clone, "am", "--quiet", output / "0001-adaptive-muon-namo-d.patch")
    return clone


def test_the_checkout_stays_as_it_is(upstream, output):
    assert git(upstream, "status", "--porcelain") == ""
    assert git(upstream, "rev-parse", "--abbrev-ref", "HEAD").strip() == "main"
    assert git(upstream, "rev-parse", "main") == git(upstream, "rev-parse", "adaptive-muon-namo-d~1")


def test_the_branch_is_one_signed_commit(upstream, output):
    assert git(upstream, "rev-list", "--count", "main..adaptive-muon-namo-d").strip() == "1"
    message = git(upstream, "log", "-1", "--format=%an|%ae|%B", "adaptive-muon-namo-d")
    assert message.startswith("Ada|ada@example.com|Add NAMO-D")
    assert message.rstrip().endswith("Signed-off-by: Ada <ada@example.com>")


def test_the_patch_makes_the_branch(upstream, patched):
    assert git(patched, "rev-parse", "HEAD^{tree}") == git(upstream, "rev-parse", "adaptive-muon-namo-d^{tree}")


def test_the_pull_request_says_what_it_is(output):
    text = (output / "PULL_REQUEST.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## The problem", "## The change", "## The evidence", "## Left out"]


def test_style(patched):
    files = git(patched, "diff", "--name-only", "HEAD~1").split()
    assert {OLD_TEST, PAGE} < set(files)
    files = sorted(set(files) - {OLD_TEST, PAGE})
    assert all((patched / name).read_text().startswith("# SPDX-FileCopyrightText") for name in files)
    ruff = (sys.executable, "-m", "ruff")
    config = [part for setting in ISORT for part in ("--config", setting)]
    for command in (["check", *RUFF, *RULES, *config], ["format", "--check", *RUFF, "--config", ISORT[1]]):
        done = run(*ruff, *command, *files, cwd=patched)
        assert done.returncode == 0, done.stdout
    assert not [line for name in files for line in (patched / name).read_text().splitlines() if len(line) > 119]


def test_the_methods_are_ours_under_upstreams_license(patched):
    folder = ROOT / "emerging_optimizers/adaptive_muon/moment2"
    names = [file.name for file in folder.glob("*.py")]
    assert len(names) >= 7
    assert sorted(names) == sorted(file.name for file in (patched / tool.PACKAGE / "moment2").glob("*.py"))
    for name in names:
        license_line, ours = (folder / name).read_text().split("\n", 1)
        license_lines, theirs = (
            (patched / tool.PACKAGE / "moment2" / name).read_text().split("limitations under the License.\n")
        )
        assert theirs == ours and license_line in license_lines.splitlines()


@pytest.mark.parametrize("name", [OLD_TEST, PAGE])
def test_edits_of_what_only_a_checkout_has(patched, name):
    text = (patched / name).read_text()
    assert all(text.count(passage) == 1 for passage in passages(name, "+"))


def test_the_page_names_what_there_is(patched):
    [passage] = passages(PAGE, "+")
    names = [line.split()[-1] for line in passage.splitlines() if line.startswith(".. autoclass::")]
    assert names and all(f'"{name}"' in (patched / tool.PACKAGE / "moment2/__init__.py").read_text() for name in names)


@pytest.mark.skipif(not CHECKOUT, reason="needs a checkout of upstream's main")
def test_upstreams_own_test_passes(patched):
    done = run(sys.executable, OLD_TEST, "--device=cpu", "--seed=42", cwd=patched, PYTHONPATH=patched)
    assert done.returncode == 0 and "OK" in done.stderr, done.stderr[-3000:]


def test_types(patched):
    strict = [
        "--disallow-untyped-defs",
        "--disallow-untyped-decorators",
        "--check-untyped-defs",
        "--warn-redundant-casts",
    ]
    strict += ["--enable-error-code", "possibly-undefined", "--enable-error-code", "explicit-override"]
    files = [OPTIMIZER, f"{tool.PACKAGE}/moment2", f"{tool.PACKAGE}/shard.py"]
    command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    done = run(*command, *strict, *files, cwd=patched)
    assert done.returncode == 0, done.stdout


def test_its_tests_pass_on_one_device(patched):
    done = run(
        sys.executable,
        "tests/test_adaptive_muon_moment2.py",
        "--device=cpu",
        "--seed=42",
        cwd=patched,
        PYTHONPATH=patched,
    )
    assert done.returncode == 0 and "OK" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.long)])
def test_its_tests_pass_in_several_processes(patched, ranks):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks)
    test = ("tests/test_distributed_adaptive_muon_cpu.py", "--device=cpu", "--seed=42")
    done = run(*torchrun, *test, cwd=patched, PYTHONPATH=patched)
    assert done.returncode == 0 and done.stderr.count("\nOK") == ranks, done.stderr[-3000:]


def test_its_formulas_are_ours(patched):
    ours = ROOT / "emerging_optimizers"
    done = run(sys.executable, "-c", SIDE_BY_SIDE, patched, ours, cwd=patched, PYTHONPATH=patched)
    assert done.returncode == 0 and done.stdout == "same\n", done.stderr[-3000:]


def test_a_branch_that_is_there_is_kept(upstream, output):
    before = git(upstream, "rev-parse", "adaptive-muon-namo-d")
    done = make(upstream, "--output", output)
    assert done.returncode == 2 and "must be new" in done.stderr
    assert git(upstream, "rev-parse", "adaptive-muon-namo-d") == before


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (OPTIMIZER, "beta2: float = 0.95", "beta2: float = 0.9", "that changes.diff was made from, got"),
        (
            OLD_TEST,
            "expected_moment2,\n                atol=0.0",
            "expected_moment2,\n                atol=1.0",
            "patch failed",
        ),
        (PAGE, ":hidden:`Newton-Schulz`", ":hidden:`NewtonSchulz`", "patch failed"),
    ],
    ids=["code beside the diff", "a test", "a page"],
)
def test_an_upstream_that_has_changed_is_refused(tmp_path, name, old, new, message):
    repository = new_repository(tmp_path / "upstream")
    file, before = repository / name, (repository / name).read_text()
    assert before.count(old) == 1
    file.write_text(before.replace(old, new))
    git(repository, "commit", "--quiet", "--all", "--message", "another default")
    done = run(sys.executable, TOOL, repository, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and name in done.stderr
    assert git(repository, "branch", "--list", "adaptive-muon-namo-d") == ""
    assert not (tmp_path / "upstream-patch").exists()


def test_what_is_no_repository_is_refused(tmp_path):
    done = make(tmp_path)
    assert done.returncode == 2 and "git" in done.stderr
