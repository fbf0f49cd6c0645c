# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz orthogonalization of whole matrices: returns the (approximate) polar factor and never scales it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import batched
from typing import Literal, get_args

import torch
from absl import logging

from emerging_optimizers.adaptive_muon.checks import require, require_one_of
from emerging_optimizers.adaptive_muon.orthogonalize import cpu
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch, batch_size
from emerging_optimizers.adaptive_muon.orthogonalize.gram import (
    MIN_NORM,
    Coefficients,
    group_steps,
    iterate,
    several_steps_pay,
)
from emerging_optimizers.adaptive_muon.orthogonalize.precision import matmul_precision, sums_in_float32
from emerging_optimizers.orthogonalized_optimizers import muon_utils
from emerging_optimizers.orthogonalized_optimizers.muon_utils import CoeffIterMode, NSCoeffT
from emerging_optimizers.triton_kernels import HAS_TRITON_340  # type: ignore[attr-defined]
from emerging_optimizers.utils import FP32MatmulPrecT


__all__ = ["NSAlgorithmT", "NewtonSchulz", "at_precision", "syrk_is_usable"]

NSAlgorithmT = Literal["standard", "gram", "auto"]

Function = Callable[[torch.Tensor], torch.Tensor]

# The sets that repeat their last coefficients after the end, where others begin again, and those that have no other number
# of steps than their own. Upstream's function has these rules in its code; no table says them.
_REPEAT_LAST = ("polar_express", "cans", "deepseekv4")
_FIXED = ("cubic5",)  # since 0.4.0

# The GPU generations for which upstream's Muon vouches for its Triton kernel.
_SYRK_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))

# At "medium" precision on a CPU that is fast at bfloat16, the short side from which it is faster than float32, for a
# single matrix too (measured with tiles, AMX).
_BFLOAT16_FROM = 192


@dataclass(frozen=True)
class NewtonSchulz:
    """Orthogonalize matrices by Newton-Schulz iteration with upstream's coefficients.

    One step is :math:`X \\leftarrow (a I + b A + c A^2) X` with :math:`A = X X^\\top`. Several steps can be taken at once
    on the smaller matrix A, see :mod:`~emerging_optimizers.adaptive_muon.orthogonalize.gram`. A is then computed from X
    again after two steps, or after the first three steps of a large matrix.

    Args:
        coefficient_type: A coefficient set of upstream's table.
        num_steps: Number of iterations, at least 1.
        use_syrk: Whether "standard" uses upstream's Triton kernel for symmetric products, in bfloat16 on CUDA. The other
            algorithms use our own kernel by themselves.
        algorithm: "standard" is upstream's function, one matrix after the other, and gives its numbers to the last bit
            ("medium" precision iterates in bfloat16). "gram" takes several steps at once, of a batch of matrices. At
            "medium" precision it iterates in float16 on CUDA, which is as fast as bfloat16 and more exact, and in
            float32 elsewhere. "auto" is the fastest of all for the shape and the device that rounds no more than a
            few times as much as "standard". At "medium" precision it rounds less, or as much where a CPU is faster in
            bfloat16.
        precision: Precision of the products, whatever torch's own setting is: "highest", "high" or "medium", see
            :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon`.

    Raises:
        ValueError: If ``num_steps`` is not a positive whole number, or not that of a set of fixed length, or the precision
            is unknown.
    """

    coefficient_type: NSCoeffT
    num_steps: int
    use_syrk: bool = False
    algorithm: NSAlgorithmT = "auto"
    precision: FP32MatmulPrecT = "medium"

    def __post_init__(self) -> None:
        """Check what can be set apart from the optimizer's options, which check the other names."""
        require(
            isinstance(self.num_steps, int) and self.num_steps >= 1,
            "num_ns_steps must be a whole number >= 1",
            self.num_steps,
            "Use 5, the default.",
        )
        fixed = len(_sets(self.coefficient_type)) if self.coefficient_type in _FIXED else self.num_steps
        require(
            self.num_steps == fixed,
            f'num_ns_steps must be {fixed} with coefficient_type="{self.coefficient_type}", whose coefficients are of so '
            "many steps",
            self.num_steps,
            f"Pass {fixed}, or take another set.",
        )
        require_one_of("fp32_matmul_prec", self.precision, get_args(FP32MatmulPrecT))

    def __call__(self, matrices: torch.Tensor) -> torch.Tensor:
        """Return the orthogonalized matrices, in the shape and dtype of ``matrices``.

        Args:
            matrices: Shape ``(..., rows, columns)``, a matrix or a batch of matrices; any floating dtype.
        """
        return self.iterated(matrices).to(matrices.dtype)

    @property
    def takes_batches(self) -> bool:
        """Whether it iterates on several matrices at once, and not on one after the other."""
        return self.algorithm != "standard"

    def iterated(self, matrices: torch.Tensor) -> torch.Tensor:
        """Return what a call returns, in the dtype of the iteration, see :meth:`dtype`, or in float32."""
        if not matrices.numel():
            return torch.zeros_like(matrices)
        batch = matrices.reshape(-1, *matrices.shape[-2:]).float()
        if self.algorithm == "standard":
            result = as_batch([self._by_upstream(matrix) for matrix in batch])
        else:
            result = self._iterated(batch)
        return result.view(matrices.shape)

    @property
    def coefficients(self) -> tuple[Coefficients, ...]:
        """``(a, b, c)`` of every step."""
        return _coefficients(self.coefficient_type, self.num_steps)

    def dtype(self, device: torch.device, shape: Sequence[int]) -> torch.dtype:
        """Return the dtype of the iteration on matrices of a shape on a device, in which the result is exact."""
        if self.precision != "medium":
            return torch.float32
        if self.algorithm == "standard":
            return torch.bfloat16
        if device.type == "cuda":
            return torch.float16
        # Several steps at once are not safe in bfloat16, which "auto" takes, as upstream does, on other devices.
        in_float32 = self.algorithm == "gram" or (device.type == "cpu" and not _is_faster_in_bfloat16(shape))
        return torch.float32 if in_float32 else torch.bfloat16

    def products(self, dtype: torch.dtype, *, several_steps: bool = False) -> AbstractContextManager[None]:
        """Return a context in which torch's switches are as the iteration's products need them.

        Args:
            dtype: The dtype of the iteration, see :meth:`dtype`.
            several_steps: Whether several steps are taken at once. TF32 rounds too coarsely for them.
        """
        if dtype == torch.float32:
            return matmul_precision("high" if self.precision == "high" and not several_steps else "highest")
        return sums_in_float32() if dtype == torch.float16 else nullcontext()

    def _iterated(self, batch: torch.Tensor) -> torch.Tensor:
        """Return our own iteration, of no more matrices at a time than make a batch."""
        dtype, steps = self.dtype(batch.device, batch.shape), self.coefficients
        is_coarse = dtype == torch.bfloat16 or (self.precision == "high" and batch.is_cuda)
        several_steps = self.algorithm == "gram" or (not is_coarse and several_steps_pay(batch.shape))
        step_groups = group_steps(steps, min(batch.shape[1:])) if several_steps else [*batched(steps, 1)]
        parts = torch.split(batch, batch_size(batch.shape[1:], batch.device))
        with self.products(dtype, several_steps=several_steps):
            results = [iterate(part, step_groups, dtype) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _by_upstream(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return upstream's iteration of a float32 matrix."""
        # Upstream's kernel wants bfloat16 rows and columns to start on multiples of 16 bytes.
        is_aligned = matrix.is_contiguous() and all(size % 8 == 0 for size in matrix.shape)
        on_its_device: AbstractContextManager[None] = torch.cuda.device_of(matrix)  # type: ignore[no-untyped-call]
        with matmul_precision(self.precision), on_its_device:  # where Triton starts kernels
            orthogonalized: torch.Tensor = muon_utils.newton_schulz(
                matrix,
                steps=self.num_steps,
                coefficient_type=self.coefficient_type,
                eps=MIN_NORM,
                use_syrk=self.use_syrk and matrix.is_cuda and is_aligned,
            )
        return orthogonalized


def at_precision(function: Function, precision: FP32MatmulPrecT) -> Function:
    """Return a function that orthogonalizes with products in a precision.

    A user's function is called as upstream calls it, with torch's precision of products set.
    """
    if isinstance(function, NewtonSchulz):
        return function if function.precision == precision else replace(function, precision=precision)

    def called(matrix: torch.Tensor) -> torch.Tensor:
        with matmul_precision(precision):
            return function(matrix)

    return called


@cache
def _coefficients(coefficient_type: NSCoeffT, num_steps: int) -> tuple[Coefficients, ...]:
    """Return upstream's coefficients for this number of steps; upstream's rule sets what follows the last of a set."""
    mode: CoeffIterMode = "repeat_last" if coefficient_type in _REPEAT_LAST else "cycle"
    return tuple(muon_utils.get_coefficient_iterator(num_steps, _sets(coefficient_type), mode=mode))


def _sets(coefficient_type: NSCoeffT) -> Sequence[Coefficients]:
    """Return a coefficient set of upstream's table."""
    coefficients: Sequence[Coefficients] = muon_utils._COEFFICIENT_SETS[coefficient_type]
    return coefficients


def _is_faster_in_bfloat16(shape: Sequence[int]) -> bool:
    """Return whether the CPU iterates on matrices of this shape faster in bfloat16.

    With tiles it does. AMD's vector units are twice as fast in it, which several steps at once in float32 make up for;
    Intel's are no faster. Nothing but the shape and the CPU decides, since replicas must round in the same way.
    """
    if not cpu.has_bfloat16_units() or min(shape[-2:]) < _BFLOAT16_FROM:
        return False
    return cpu.has_tiles() or (cpu.is_amd_with_bfloat16_vectors() and not several_steps_pay(shape))


def syrk_is_usable() -> bool:
    """Return whether Triton kernels for symmetric products can be trusted here. If not, log why."""
    if not HAS_TRITON_340:
        logging.error("use_syrk needs Triton 3.4.0 or newer; going on without it.")
        return False
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability not in _SYRK_CAPABILITIES:
        logging.error("use_syrk is not known to be right on CUDA capability %s; going on without it.", capability)
        return False
    return True
