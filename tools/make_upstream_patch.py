# SPDX-License-Identifier: Apache-2.0
"""Makes the pull request to Emerging-Optimizers: a branch in a repository of yours, a patch and the text.

The program copies the second-moment methods of this repository and the new files of tools/upstream, and applies
tools/upstream/changes.diff, made against upstream's main of 2026-08-20 (fd77292). The work tree is not touched.

To renew the diff on a newer main, run ``git apply --3way --unidiff-zero`` with it in a checkout and resolve conflicts.
Store ``git diff --cached --full-index -U0 -- emerging_optimizers``, and the same with ``-U2 -- docs tests``.
"""

import argparse
import os
import subprocess
import tempfile
from itertools import takewhile
from pathlib import Path


HERE = Path(__file__).parent / "upstream"
OURS = Path(__file__).parents[1] / "emerging_optimizers/adaptive_muon"
PACKAGE = "emerging_optimizers/orthogonalized_optimizers"
COPIES = {
    **{file: f"{PACKAGE}/moment2" for file in sorted((OURS / "moment2").glob("*.py"))},
    HERE / "shard.py": PACKAGE,
    **{file: "tests" for file in sorted((HERE / "tests").glob("*.py"))},
}
DIFF, TEXT = HERE / "changes.diff", HERE / "PULL_REQUEST.md"
BODY = """\
AdaptiveMuon gets moment2_method="namo_d" (arXiv:2602.17080), correct_bias, namo_d_clamp and
weight_decay_method="adaptive". With tp_group, parameters that have partition_dim are orthogonalized, averaged and
scaled as the whole matrices they are shards of. Formulas move to moment2, one file a method.
"""


def git(path: Path, *arguments: str, given: str | None = None, **environment: str) -> str:
    """Return what a git command prints; raise ``ValueError`` if the command fails."""
    command, environment = ["git", "-C", str(path), *arguments], {**os.environ, **environment}
    ran = subprocess.run(command, input=given, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise ValueError(f"git {' '.join(arguments)} failed in {path}: {ran.stderr.strip()}")
    return ran.stdout.strip("\n")


def check_unchanged(path: Path, base: str, diff: str) -> None:
    """Raise ``ValueError`` if upstream's code is not, byte by byte, what the diff was made against.

    A change beside the diff's passages could give them another meaning. A test or a page may change there.
    """
    lines = diff.splitlines()
    names = [line.removeprefix("--- a/") for line in lines if line.startswith("--- a/")]
    blobs = [line.split()[1].partition("..")[0] for line in lines if line.startswith("index ")]
    for name, blob in zip(names, blobs, strict=True):
        found = git(path, "rev-parse", f"{base}:{name}")
        if name.startswith("emerging_optimizers/") and found != blob:
            raise ValueError(
                f"{name} must be the blob {blob} that {DIFF.name} was made from, got {found}. "
                f"Read git diff {blob} {found}, then renew the diff, see {Path(__file__).name}."
            )


def commit(path: Path, base: str, diff: str, message: str) -> str:
    """Commit the diff and the copies on top of a revision, signed off, and return the new commit."""
    name, address = (git(path, "config", "--default=", "--get", f"user.{key}") for key in ("name", "email"))
    if not name or not address:
        raise ValueError(
            f"A sign-off must have user.name and user.email, got none. Set them with git config in {path}."
        )
    code = git(path, "show", f"{base}:{PACKAGE}/adaptive_muon.py").splitlines(keepends=True)
    license_lines = "".join(takewhile(lambda line: line.startswith("#"), code)).replace("2025", "2026")
    with tempfile.TemporaryDirectory() as scratch:
        index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        git(path, "read-tree", base, **index)
        git(path, "apply", "--cached", "--unidiff-zero", "--whitespace=nowarn", given=diff, **index)
        for file, folder in COPIES.items():
            text = license_lines + file.read_text().removeprefix("# SPDX-License-Identifier: Apache-2.0\n")
            blob = git(path, "hash-object", "-w", "--stdin", given=text)
            git(path, "update-index", "--add", "--cacheinfo", f"100644,{blob},{folder}/{file.name}", **index)
        tree = git(path, "write-tree", **index)
    return git(path, "commit-tree", tree, "-p", base, given=f"{message}\nSigned-off-by: {name} <{address}>\n")


def main() -> None:
    """Make the branch, the patch and the text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="git repository of Emerging-Optimizers")
    parser.add_argument("--base", default="HEAD", help="revision to start from (default: %(default)s)")
    parser.add_argument("--branch", default="adaptive-muon-namo-d", help="new branch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("upstream-patch"), help="directory for patch and text")
    given = parser.parse_args()
    diff, text = DIFF.read_text(), TEXT.read_text().split("\n", 1)[1]  # without this repository's license line
    title = text.split("\n", 1)[0].removeprefix("# ")
    try:
        if git(given.path, "branch", "--list", given.branch):
            raise ValueError(f"--branch must be new, got {given.branch}. Delete that branch, or name another.")
        check_unchanged(given.path, given.base, diff)
        git(given.path, "branch", given.branch, commit(given.path, given.base, diff, f"{title}\n\n{BODY}"))
        patch = git(given.path, "format-patch", "-1", "--stdout", given.branch) + "\n"
    except ValueError as error:
        parser.error(str(error))
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "0001-adaptive-muon-namo-d.patch").write_text(patch)
    (given.output / "PULL_REQUEST.md").write_text(text)
    print(f"Branch {given.branch} of {given.path}; patch and PULL_REQUEST.md in {given.output}.")


if __name__ == "__main__":
    main()
