# SPDX-License-Identifier: Apache-2.0
"""The names of the second-moment methods: the only place where a method's name means anything."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

from .base import Moment2


__all__ = ["METHODS", "Moment2MethodT", "make_moment2", "register_moment2"]

# Each name is also the module of this package that defines the method.
Moment2MethodT = Literal["adamuon", "normuon", "namo", "namo_d"]

METHODS: dict[str, type[Moment2]] = {}


def register_moment2(name: str) -> Callable[[type[Moment2]], type[Moment2]]:
    """Return a decorator that enters a :class:`Moment2` subclass under ``name``.

    Raises:
        TypeError: If the class lacks what it observes or how its scale grows, or contradicts itself.
    """

    def enter(cls: type[Moment2]) -> type[Moment2]:
        needed = ("observed", "momentum_degree", "moment2_degree")
        missing = [attribute for attribute in needed if not hasattr(cls, attribute)]
        if missing:
            raise TypeError(
                f"{cls.__name__} must set {' and '.join(needed)}, got no {' and no '.join(missing)}. See Moment2."
            )
        if cls.scales_momentum and (cls.momentum_degree or cls.moment2_degree or cls.adaptive_decay):
            degrees = cls.momentum_degree, cls.moment2_degree
            raise TypeError(
                f"{cls.__name__} scales the momentum and must have degrees of 0 and no adaptive_decay, got {degrees} "
                f"and {cls.adaptive_decay}. Change these attributes, or set scales_momentum to False."
            )
        if "orthogonalized" in (cls.observed if cls.scales_momentum else cls.observed[:-1]):
            raise TypeError(
                f"{cls.__name__} must observe what is orthogonalized last, or not if it scales the momentum, got "
                f'{cls.observed}. Move "orthogonalized" to the end, or remove it.'
            )
        METHODS[name] = cls
        return cls

    return enter


def make_moment2(name: str, **options: Any) -> Moment2:
    """Make the method called ``name``.

    Args:
        name: A name of ``Moment2MethodT``.
        **options: The options of all methods. Each method takes the ones it has a field for. Options of the methods
            that are not chosen are checked too.

    Raises:
        ValueError: If the name is unknown or an option is out of its range.
    """
    if name not in METHODS:
        choices = ", ".join(METHODS)
        raise ValueError(f"moment2_method must be one of the known names, got {name!r}. Choose from {choices}.")
    made = {
        key: cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})
        for key, cls in METHODS.items()
    }
    return made[name]
