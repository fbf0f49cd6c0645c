# SPDX-License-Identifier: Apache-2.0
"""The pull request to upstream, of the installed package's files: it applies, and what it makes passes its tests."""

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
OPTIMIZER = "emerging_optimizers/orthogonalized_optimizers/adaptive_muon.py"
# What upstream's configuration asks of its code (0.3.0 and main of August 2026).
RUFF = ["--isolated", "--line-length", "119", "--target-version", "py312"]
RULES = ["--select", "F541,F841,F401,E741,F821,I,G004"]
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


# What is edited in a checkout only, which a package is not: a frame for the passages that are expected there.
EDITED = {tool.OLD_TEST: tool._OLD_TEST_EDITS, tool.PAGE: tool._PAGE_EDITS}
FRAMES = {
    tool.OLD_TEST: """\
class Test:
    def test(self):
        for _ in range(2):
            torch.testing.assert_close(
                applied_update,
{}            )
{}""",
    tool.PAGE: "{}",
}


def git(repository, *arguments):
    done = run("git", *arguments, cwd=repository)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(repository, *arguments):
    return run(sys.executable, TOOL, repository, *arguments, cwd=repository)


def new_repository(path):
    """A repository with upstream's package as it is installed, without this project's part of it."""
    [installed] = [Path(each) for each in find_spec("emerging_optimizers").submodule_search_locations][:1]
    ours = shutil.ignore_patterns("adaptive_muon", "adaptive_muon_discovery", "__pycache__")
    shutil.copytree(installed, path / "emerging_optimizers", ignore=ours)
    for name, edits in EDITED.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(FRAMES[name].format(*edits))
    git(path, "init", "--quiet", "--initial-branch", "main")
    git(path, "config", "commit.gpgsign", "false")
    git(path, "config", "user.name", "Ada")
    git(path, "config", "user.email", "ada@example.com")
    git(path, "add", ".")
    git(path, "commit", "--quiet", "--message", "as installed")
    return path


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    return new_repository(tmp_path_factory.mktemp("upstream"))


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
    assert git(upstream, "rev-list", "--count", "main").strip() == "1"


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
    assert set(EDITED) < set(files)
    files = sorted(set(files) - set(EDITED))
    assert len(files) == 4 and all(
        (patched / name).read_text().startswith("# SPDX-FileCopyrightText") for name in files
    )
    ruff = (sys.executable, "-m", "ruff")
    config = [part for setting in ISORT for part in ("--config", setting)]
    for command in (["check", *RUFF, *RULES, *config], ["format", "--check", *RUFF, "--config", ISORT[1]]):
        done = run(*ruff, *command, *files, cwd=patched)
        assert done.returncode == 0, done.stdout
    assert not [line for name in files for line in (patched / name).read_text().splitlines() if len(line) > 119]


@pytest.mark.parametrize("name", EDITED)
def test_edits_of_what_only_a_checkout_has(patched, name):
    assert (patched / name).read_text() == FRAMES[name].format(*EDITED[name].values())


def test_types(patched):
    strict = [
        "--disallow-untyped-defs",
        "--disallow-untyped-decorators",
        "--check-untyped-defs",
        "--warn-redundant-casts",
    ]
    strict += ["--enable-error-code", "possibly-undefined", "--enable-error-code", "explicit-override"]
    files = [OPTIMIZER, "emerging_optimizers/orthogonalized_optimizers/moment2.py"]
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
    ("old", "new"),
    [
        ("eps: float = 1e-8,\n    ):", "eps: float = 1e-7,\n    ):"),
        ("p.add_(update, alpha=-group", "p.add_(update, alpha=-2 * group"),
        ("denom = moment2.sqrt() + eps", "denom = (moment2 + eps).sqrt()"),
    ],
    ids=["a default", "the step", "a formula"],
)
def test_an_upstream_that_has_changed_is_refused(tmp_path, old, new):
    repository = new_repository(tmp_path)
    file, before = repository / OPTIMIZER, (repository / OPTIMIZER).read_text()
    assert before.count(old) == 1
    file.write_text(before.replace(old, new))
    git(repository, "commit", "--quiet", "--all", "--message", "another default")
    done = make(repository)
    assert done.returncode == 2 and "has changed since this program was written" in done.stderr
    assert git(repository, "branch", "--list", "adaptive-muon-namo-d") == ""
    assert not (repository / "upstream-patch").exists()


def test_what_is_no_repository_is_refused(tmp_path):
    done = make(tmp_path)
    assert done.returncode == 2 and "git" in done.stderr
