# SPDX-License-Identifier: Apache-2.0
"""One form for every error, "X must be Y, got Z. Use W.": the rule, the value that broke it, and the remedy."""

import math
import pickle
from collections.abc import Collection, Iterable
from numbers import Real
from typing import Any

import torch


__all__ = ["is_rate", "refusal", "require", "require_known", "require_one_of", "require_picklable", "within"]


def refusal(rule: str, value: object, remedy: str) -> ValueError:
    """Return the error to raise. Checks that run at every step call it only where they fail.

    Args:
        rule: What must hold, as a sentence without its end.
        value: The value that was given.
        remedy: What to pass or to do instead, as one or more full sentences.
    """
    return ValueError(f"{rule}, got {_shown(value)}. {remedy}")


def _shown(value: object) -> str:
    """Return a value for an error. YAML 1.1 reads 1e-3 as text and 1.0e-3 as a number, which look the same."""
    try:
        is_number = isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        is_number = False
    return f"{value!r} as text" if is_number else f"{value!r}"


def require(ok: object, rule: str, value: object, remedy: str) -> None:
    """Raise a :func:`refusal` unless a condition holds. Write it so that NaN fails: ``lr >= 0``, not ``not lr < 0``."""
    if not ok:
        raise refusal(rule, value, remedy)


def require_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a ``ValueError`` that lists the choices unless the value of an argument is one of them."""
    choices = tuple(allowed)
    require(value in choices, f"{name} must be one of the known names", value, f"Choose from {', '.join(choices)}.")


def require_known(names: Iterable[str], known: Collection[str]) -> None:
    """Raise a ``TypeError`` that lists the known options unless all names of keyword arguments are among them."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise TypeError(
            f"keyword arguments must be options, got {', '.join(unknown)}. Choose from {', '.join(known)}."
        )


def within(value: Any, low: float, high: float = math.inf) -> bool:
    """Return whether ``low <= value < high``; NaN and what is no real number or scalar tensor, such as "1e-3", are not."""
    is_number = isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.ndim == 0)
    return is_number and bool(low <= value < high)


def is_rate(value: Any) -> bool:
    """Return whether a value is a learning rate, which is >= 0 and may be a tensor of one element in any shape."""
    one_element = isinstance(value, torch.Tensor) and value.numel() == 1
    return within(value.reshape(()) if one_element else value, 0)


def require_picklable(name: str, value: object) -> None:
    """Raise a ``PicklingError`` that names an option which pickle cannot carry, such as a lambda or a process group."""
    try:
        pickle.dumps(value)
    except Exception as error:
        raise pickle.PicklingError(
            f"{name} must be None or something that pickle can carry, got {value!r} ({error}). Use a function of a "
            "module, or save the optimizer's state_dict() and make a new optimizer."
        ) from error
