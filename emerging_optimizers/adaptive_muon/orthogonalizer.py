# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz orthogonalization: returns the (approximate) polar factor and never scales it."""

from dataclasses import dataclass
from typing import get_args

import torch
from absl import logging

from emerging_optimizers.adaptive_muon.checks import require, require_one_of
from emerging_optimizers.orthogonalized_optimizers import muon_utils
from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT
from emerging_optimizers.triton_kernels import HAS_TRITON_340  # type: ignore[attr-defined]


__all__ = ["NewtonSchulz", "syrk_is_usable"]

# The GPU generations for which upstream's Muon vouches for its Triton kernel.
_SYRK_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))


@dataclass(frozen=True)
class NewtonSchulz:
    """Orthogonalizes a matrix by upstream's Newton-Schulz iteration.

    The precision of the products is torch's float32 matmul precision at the time of the call ("medium" iterates in
    bfloat16), as in upstream.

    Args:
        coefficient_type: A coefficient set of upstream's table, see
            :func:`~emerging_optimizers.orthogonalized_optimizers.muon_utils.newton_schulz`.
        num_steps: Number of iterations, at least 1.
        use_syrk: Whether bfloat16 iterations on CUDA use upstream's Triton kernel for symmetric products.

    Raises:
        ValueError: If ``coefficient_type`` is unknown or ``num_steps`` is not a positive whole number.
    """

    coefficient_type: NSCoeffT
    num_steps: int
    use_syrk: bool = False

    def __post_init__(self) -> None:
        """Checks the values."""
        # "custom" stands in upstream's alias for a function argument that no optimizer has.
        require_one_of("coefficient_type", self.coefficient_type, (c for c in get_args(NSCoeffT) if c != "custom"))
        require(
            isinstance(self.num_steps, int) and self.num_steps >= 1,
            "num_ns_steps must be a whole number >= 1",
            self.num_steps,
            "upstream's default is 5",
        )

    def __call__(self, matrix: torch.Tensor) -> torch.Tensor:
        """Returns the orthogonalized matrix, in the shape and dtype of ``matrix``.

        Args:
            matrix: Shape ``(rows, columns)``, at least one of each; any floating dtype (iterated in float32 or, at
                "medium" precision, in bfloat16).
        """
        orthogonalized: torch.Tensor = muon_utils.newton_schulz(
            matrix.float(),
            steps=self.num_steps,
            coefficient_type=self.coefficient_type,
            use_syrk=self.use_syrk and _syrk_takes(matrix),
        )
        return orthogonalized.to(matrix.dtype)


def syrk_is_usable() -> bool:
    """Tells whether upstream's Triton kernel for symmetric products can be trusted here; logs why where it can't."""
    if not HAS_TRITON_340:
        logging.error("use_syrk needs Triton 3.4.0 or newer; going on without it.")
        return False
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability not in _SYRK_CAPABILITIES:
        logging.error("use_syrk is not known to be right on CUDA capability %s; going on without it.", capability)
        return False
    return True


def _syrk_takes(matrix: torch.Tensor) -> bool:
    """Whether the kernel takes this matrix: its bfloat16 rows and columns must start on multiples of 16 bytes."""
    return matrix.is_cuda and matrix.is_contiguous() and all(size % 8 == 0 for size in matrix.shape)
