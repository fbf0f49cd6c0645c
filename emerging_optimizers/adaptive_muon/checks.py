# SPDX-License-Identifier: Apache-2.0
"""One form for every refusal: the rule, the value that broke it, and the remedy."""

import math
import pickle
from collections.abc import Collection, Iterable
from typing import Any


__all__ = ["refusal", "require", "require_known", "require_one_of", "require_picklable", "within"]


def refusal(rule: str, value: object, remedy: str) -> ValueError:
    """Returns the error to raise; where checks run at every step, this spares them making a message nobody reads.

    Args:
        rule: What must hold, as a sentence without its end.
        value: The value that was given.
        remedy: What to pass instead, or what to do about it.
    """
    return ValueError(f"{rule}, got {value!r}: {remedy}")


def require(ok: object, rule: str, value: object, remedy: str) -> None:
    """Raises a ``ValueError`` unless ``ok`` holds.

    Args:
        ok: The condition, already evaluated. Write it so that NaN fails: ``lr >= 0``, not ``not lr < 0``.
        rule: What must hold, as a sentence without its end.
        value: The value that was given.
        remedy: What to pass instead, or what to do about it.
    """
    if not ok:
        raise refusal(rule, value, remedy)


def require_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raises a ``ValueError`` that lists the choices unless ``value`` is one of them.

    Args:
        name: The argument's name.
        value: The value that was given.
        allowed: The valid choices.
    """
    choices = tuple(allowed)
    require(value in choices, f"{name} must be one of the known names", value, f"choose from {', '.join(choices)}")


def require_known(names: Iterable[str], known: Collection[str]) -> None:
    """Raise a ``TypeError`` that lists the known options unless all names are among them.

    Args:
        names: The names of keyword arguments.
        known: The names of the options.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise TypeError(f"keyword arguments must be options, got {', '.join(unknown)}: choose from {', '.join(known)}")


def within(value: Any, low: float, high: float = math.inf) -> bool:
    """Returns whether ``low <= value < high``; NaN and what is no number, such as the string "1e-3", are not."""
    try:
        return bool(low <= value < high)
    except TypeError:
        return False


def require_picklable(name: str, value: object) -> None:
    """Raises a ``PicklingError`` that names an option which pickle cannot carry, such as a lambda or a process group."""
    try:
        pickle.dumps(value)
    except Exception as error:
        raise pickle.PicklingError(
            f"{name} must be None or something that pickle can carry, got {value!r} ({error}): use a function of a "
            "module, or save the optimizer's state_dict() and make the optimizer anew"
        ) from error
