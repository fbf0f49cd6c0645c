# SPDX-License-Identifier: Apache-2.0
"""Real text in three parts that share no file: one to train on, one to choose rates on, one only to report."""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


PARTS = ("train", "tuning", "validation")
MINIMUM_BYTES = 20_000  # a part; below this the evaluation windows overlap each other
NOT_PROSE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """The three parts, each a vector of bytes (uint8), and a line that says what they are made of."""

    source: str
    train: Tensor
    tuning: Tensor
    validation: Tensor

    def describe(self) -> dict[str, str | int]:
        """Returns the source, and size and fingerprint of each part: enough to see that two runs read the same."""
        facts: dict[str, str | int] = {"source": self.source}
        for part in PARTS:
            content = getattr(self, part).numpy().tobytes()
            facts |= {f"{part}_bytes": len(content), f"{part}_sha256": hashlib.sha256(content).hexdigest()[:16]}
        return facts


def load(path: Path | None = None) -> Text:
    """Reads the user's text, or by default the source of Python's standard library, which every machine has.

    Many files are dealt to the parts by a hash of their relative path, so that a new file moves no other; one file is
    cut into 80 % train, 10 % tuning and 10 % validation, in this order.

    Args:
        path: A file, a directory (its UTF-8 files are read), or None for the standard library.

    Raises:
        ValueError: If the path does not exist or a part gets too little text.
    """
    if path is None:
        text = _from_files("Python's standard library", Path(sysconfig.get_paths()["stdlib"]), _standard_library())
    elif path.is_dir():
        text = _from_files("a directory", path, _visible_files(path))
    elif path.is_file():
        text = _from_one_file(path)
    else:
        raise ValueError(f"--data must be a file or a directory, got {str(path)!r}. Check the spelling.")
    for part in PARTS:
        if len(getattr(text, part)) < MINIMUM_BYTES:
            raise ValueError(
                f"The {part} part must have {MINIMUM_BYTES} bytes or more, got {len(getattr(text, part))} from "
                f"{text.source}. Give more text. Join a few files into one, which is cut 80/10/10."
            )
    return text


def random_windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Returns windows (count, length) that start anywhere in the text."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def spaced_windows(text: Tensor, count: int, length: int) -> Tensor:
    """Returns windows (count, length) spread evenly over the text: the same ones at each call."""
    starts = torch.linspace(0, len(text) - length, count, dtype=torch.float64).long()[:, None]
    return text[starts + torch.arange(length)].long()


def _standard_library() -> list[Path]:
    """Modules as people wrote them: no tests, no tables of character sets, no record of how Python was built."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not NOT_PROSE & set(p.relative_to(root).parts))
    return sorted(p for p in files if not p.name.startswith("_sysconfigdata"))


def _visible_files(root: Path) -> list[Path]:
    files = (p for p in root.rglob("*") if p.is_file())
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts))


def _from_files(source: str, root: Path, files: list[Path]) -> Text:
    parts: dict[str, list[bytes]] = {part: [] for part in PARTS}
    for name, content in _readable(root, files):
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 10
        parts[{0: "validation", 1: "tuning"}.get(bucket, "train")].append(content)
    # A zero byte, which text does not contain, tells the model where a file begins.
    joined = {part: _to_tensor(b"\0".join(contents)) for part, contents in parts.items()}
    return Text(f"{source}, {sum(map(len, parts.values()))} files", **joined)


def _readable(root: Path, files: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        content = path.read_bytes()
        try:
            content.decode()
        except UnicodeDecodeError:
            continue
        yield path.relative_to(root).as_posix(), content


def _from_one_file(path: Path) -> Text:
    content = _to_tensor(path.read_bytes())
    first, second = len(content) * 8 // 10, len(content) * 9 // 10
    return Text("one file", content[:first], content[first:second], content[second:])


def _to_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
