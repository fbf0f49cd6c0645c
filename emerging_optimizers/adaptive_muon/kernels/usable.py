# SPDX-License-Identifier: Apache-2.0
"""Where Triton kernels can be used."""

from functools import cache
from typing import Any

import torch
from absl import logging


__all__ = ["kernels_usable"]

# The oldest GPU generation that the kernels are compiled for in the tests: A100's.
_OLDEST = (8, 0)
# Triton 3.2, which is torch 2.6's, leaves compile-time arguments out of what a compiled kernel takes; launch.py passes them.
_OLDEST_TRITON = (3, 3)


def kernels_usable(device: torch.device) -> bool:
    """Return whether the Triton kernels of this package run on a device; the first call for a GPU tries one there.

    No module that defines kernels may be imported before: an environment may be without Triton.
    """
    return device.type == "cuda" and _runs_on(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _runs_on(index: int) -> bool:
    """Return whether a kernel that does next to nothing compiles and runs. Triton needs a C compiler, for example."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < _OLDEST:
        return False
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
            raise RuntimeError(f"Triton must be >= 3.3, got {triton.__version__}. Install torch 2.7 or newer.")
        from emerging_optimizers.adaptive_muon.kernels.trial import set_one_kernel

        kernel: Any = set_one_kernel
        with torch.cuda.device(index):
            kernel[1,](torch.zeros(1, device="cuda"))
    except Exception as error:  # whatever a toolchain may raise
        logging.warning("Triton kernels cannot be used on GPU %d; going on with torch's: %s", index, error)
        return False
    return True
