# SPDX-License-Identifier: Apache-2.0
"""The versions of emerging-optimizers that this package works with."""

import re

import emerging_optimizers


__all__ = ["require_supported_upstream", "upstream_version"]

# From the first, to below the second. setup.py asks pip for the same.
_SUPPORTED = (0, 3), (0, 6)


def upstream_version() -> str:
    """Return the version of emerging-optimizers that Python has imported; "none" where only our part of it is there."""
    return str(getattr(emerging_optimizers, "__version__", "none"))


def require_supported_upstream() -> None:
    """Raise an ``ImportError`` unless the version of emerging-optimizers is supported."""
    found = upstream_version()
    low, high = _SUPPORTED
    if not low <= tuple(map(int, re.findall(r"\d+", found)[:2])) < high:
        lowest, beyond = (".".join(map(str, version)) for version in (low, high))
        raise ImportError(
            f"emerging-optimizers must be >= {lowest} and < {beyond}, got {found}: "
            f'install "emerging-optimizers>={lowest},<{beyond}"'
        )
