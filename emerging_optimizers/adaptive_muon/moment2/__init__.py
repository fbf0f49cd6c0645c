# SPDX-License-Identifier: Apache-2.0
from importlib import import_module
from typing import get_args

from emerging_optimizers.adaptive_muon.moment2.base import Average, Moment2, Seen
from emerging_optimizers.adaptive_muon.moment2.registry import METHODS, Moment2MethodT, make_moment2, register_moment2


__all__ = ["METHODS", "Average", "Moment2", "Moment2MethodT", "Seen", "make_moment2", "register_moment2"]

for _name in get_args(Moment2MethodT):
    import_module(f"{__name__}.{_name}")
