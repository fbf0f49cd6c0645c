# SPDX-License-Identifier: Apache-2.0
"""The names of the second-moment methods: the only place where a method's name means anything."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

from emerging_optimizers.adaptive_muon.checks import require_one_of
from emerging_optimizers.adaptive_muon.moment2.base import Moment2


__all__ = ["METHODS", "Moment2MethodT", "make_moment2", "register_moment2"]

# Each name is also the module of this package that defines the method.
Moment2MethodT = Literal["adamuon", "normuon", "namo", "namo_d"]

METHODS: dict[str, type[Moment2]] = {}


def register_moment2(name: Moment2MethodT) -> Callable[[type[Moment2]], type[Moment2]]:
    """Returns a decorator that enters a :class:`Moment2` subclass under ``name``."""

    def enter(cls: type[Moment2]) -> type[Moment2]:
        if not hasattr(cls, "momentum_degree") or not hasattr(cls, "moment2_degree"):
            raise TypeError(
                f"{cls.__name__} must set momentum_degree and moment2_degree, which the bias correction needs"
            )
        METHODS[name] = cls
        return cls

    return enter


def make_moment2(name: str, **options: Any) -> Moment2:
    """Makes the method called ``name``.

    Args:
        name: A name of ``Moment2MethodT``.
        **options: The options of all methods. Each method takes the ones it has a field for; also those of the
            methods that are not chosen are checked.

    Raises:
        ValueError: If the name is unknown or an option is out of its range.
    """
    require_one_of("moment2_method", name, METHODS)
    made = {
        key: cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})
        for key, cls in METHODS.items()
    }
    return made[name]
