# SPDX-License-Identifier: Apache-2.0
"""The versions of emerging-optimizers that this package works with."""

import re
from importlib import import_module

import emerging_optimizers


__all__ = ["require_supported", "require_supported_upstream", "upstream_version"]

# From the first, to below the second. setup.py asks pip for the same.
_SUPPORTED = (0, 3), (0, 6)


def upstream_version() -> str:
    """Return the version of emerging-optimizers that Python has imported; "none" where only our part of it is there."""
    return str(getattr(emerging_optimizers, "__version__", "none"))


def require_supported_upstream() -> None:
    """Raise an ``ImportError`` unless the version of emerging-optimizers is supported, and can be imported here."""
    found = upstream_version()
    require_supported("emerging-optimizers", found, _SUPPORTED, ImportError)
    try:
        import_module("emerging_optimizers.orthogonalized_optimizers")
    except RuntimeError as error:  # from Triton 3.2 and 3.3, which torch 2.6 and 2.7 bring along
        raise ImportError(
            f"emerging-optimizers {found} must find a GPU where Triton is older than 3.4, got {error!r}. Import it on "
            "a machine with a GPU, or install torch 2.8 or newer."
        ) from error


def require_supported(
    package: str, found: str, supported: tuple[tuple[int, ...], tuple[int, ...]], kind: type[Exception]
) -> None:
    """Raise an error of a kind, with the remedy, unless a package's version is supported.

    Args:
        package: Its name on the index.
        found: Its version.
        supported: The numbers of the first version, and those of the one below which support ends.
        kind: The kind of error.
    """
    low, high = supported
    if not low <= tuple(map(int, re.findall(r"\d+", found)[:3])) < high:
        lowest, beyond = (".".join(map(str, each)) for each in supported)
        raise kind(
            f'{package} must be >= {lowest} and < {beyond}, got {found}. Install "{package}>={lowest},<{beyond}".'
        )
