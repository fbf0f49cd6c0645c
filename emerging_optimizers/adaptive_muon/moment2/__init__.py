# SPDX-License-Identifier: Apache-2.0
"""Second-moment methods: which statistic V averages, and which adaptive scale D is made of V."""

from importlib import import_module
from typing import get_args

from .base import Moment2, Observed
from .registry import METHODS, Moment2MethodT, make_moment2, register_moment2
from .sums import sum_of_squared_products, sum_of_squares, sums_of_products


__all__ = [
    "METHODS",
    "Moment2",
    "Moment2MethodT",
    "Observed",
    "make_moment2",
    "register_moment2",
    "sum_of_squared_products",
    "sum_of_squares",
    "sums_of_products",
]

for _name in get_args(Moment2MethodT):
    import_module(f"{__name__}.{_name}")
