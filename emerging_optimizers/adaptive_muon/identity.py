# SPDX-License-Identifier: Apache-2.0
"""A key by which a parameter is recognized without being kept alive.

The key is an attribute of the parameter. Unlike a weak reference it lets ``torch.utils.swap_tensors`` work. It is plain
text, so that ``torch.load`` takes a parameter that has one. Pickle carries it; a deep copy of a tensor has it too.
"""

from uuid import uuid4

import torch


__all__ = ["give_key", "identity", "key_of"]

_ATTRIBUTE = "_muon_key"


def key_of(p: torch.Tensor) -> str:
    """Return the key of a parameter, or "" where it has none."""
    key: str = getattr(p, _ATTRIBUTE, "")
    return key


def give_key(p: torch.Tensor) -> str:
    """Give a parameter a new key in place, and return the key."""
    key = uuid4().hex
    setattr(p, _ATTRIBUTE, key)
    return key


def identity(p: torch.Tensor) -> tuple[int, str]:
    """Return the ``id`` and the key of a parameter, which gets a key if it has none.

    The ``id`` tells a copy from its original, and the key tells a parameter from a later one at the same address.
    """
    return id(p), key_of(p) or give_key(p)
