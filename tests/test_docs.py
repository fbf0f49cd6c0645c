# SPDX-License-Identifier: Apache-2.0
"""The documentation's code runs as it stands, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


ROOT = Path(__file__).parent.parent
OF_ROOT = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [*OF_ROOT, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "apidocs").glob("*.md"))]
BLOCKS = [(page, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
SCRIPTS = [(page, block) for page, block in BLOCKS if "import" in block]
CALLS = [(page, block) for page, block in BLOCKS if "import" not in block]


def name(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else "code"


@pytest.mark.parametrize(("page", "block"), SCRIPTS, ids=name)
def test_scripts_run(page, block):
    if method := re.search(r'@register_moment2\("(\w+)"\)', block):  # a new method: use it as a user would
        block += f"""
import torch
from emerging_optimizers.adaptive_muon import AdaptiveMuon
p = torch.nn.Parameter(torch.eye(3, 2))
p.grad = torch.ones_like(p)
AdaptiveMuon([p], lr=0.1, weight_decay=0, moment2_method="{method[1]}", bias_correction=True).step()
assert p.isfinite().all() and (p != torch.eye(3, 2)).all()
"""
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "block"), CALLS, ids=name)
def test_calls_run(page, block):
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    exec(block, {"HybridAdaptiveMuon": HybridAdaptiveMuon, "model": model, "torch": torch})


def test_there_is_code_to_run():
    assert len(SCRIPTS) >= 3 and len(CALLS) >= 1


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_repository(page):
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_a_dead_link_of_the_site_is_found(tmp_path):
    """What CI asks of the built site; a place within a page counts, what is outside does not."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<a id="here" href="sub/">x</a><a href="#here">x</a><a href="sub/index.html#there">x</a><a href="https://a.b/c">x</a>'
    )
    (tmp_path / "sub" / "index.html").write_text(
        '<p id="there"><a href="../index.html#here">x</a><img src="../p.png">'
    )
    (tmp_path / "p.png").write_bytes(b"")
    command = [sys.executable, ROOT / "tools" / "check_site.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "No dead link in 2 pages.\n"
    (tmp_path / "p.png").unlink()
    (tmp_path / "index.html").write_text('<a href="sub/index.html#nowhere">x</a><a href="gone.html">x</a>')
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "index.html: gone.html",
        "index.html: sub/index.html#nowhere",
        "sub/index.html: ../index.html#here",
        "sub/index.html: ../p.png",
    ]
    done = subprocess.run([*command[:-1], tmp_path / "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Build it first" in done.stderr
