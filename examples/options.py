# SPDX-License-Identifier: Apache-2.0
"""The command-line options that both scripts share, checked before anything slow begins."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from methods import METHODS
from text import Text, load


def parser(description: str, *, seed: int) -> argparse.ArgumentParser:
    """Returns a parser with the shared options.

    Args:
        description: What the script does.
        seed: Default of ``--seed``.
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--data", type=Path, help="your text, a file or a directory (default: Python's standard library)"
    )
    made.add_argument(
        "--method",
        action="append",
        type=_names,
        help=f"one or several of {', '.join(METHODS)}, separated by commas or by repeating the option (default: all)",
    )
    made.add_argument(
        "--steps", type=_positive(int), default=300, help="training steps per method (default: %(default)s)"
    )
    made.add_argument("--seed", type=int, default=seed, help="of weights and batches (default: %(default)s)")
    made.add_argument("--device", type=_device, default="cpu", help="cpu or cuda (default: %(default)s)")
    return made


def parse(made: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str], Text]:
    """Returns the arguments, the methods in the order of METHODS, and the text; or ends the program with a message."""
    arguments = made.parse_args()
    asked = {name for names in arguments.method or [list(METHODS)] for name in names}
    try:
        text = load(arguments.data)
    except ValueError as error:
        made.error(str(error))
    return arguments, [name for name in METHODS if name in asked], text


def positive_float(value: str) -> float:
    """Converts an option's value to a number above zero."""
    return _positive(float)(value)


def _positive[T: (int, float)](kind: type[T]) -> Callable[[str], T]:
    def convert(value: str) -> T:
        try:
            number = kind(value)
        except ValueError:
            number = kind(0)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(
                f"must be {kind.__name__} and above zero, got {value!r}. Leave it out for the default."
            )
        return number

    return convert


def _names(value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"must be known methods, got {value!r}. Choose from {', '.join(METHODS)}.")
    return names


def _device(value: str) -> str:
    if value == "cpu" or (value == "cuda" and torch.cuda.is_available()):
        return value
    raise argparse.ArgumentTypeError(
        f"must be cpu, or cuda where torch finds one, got {value!r}. Leave it out for cpu."
    )
