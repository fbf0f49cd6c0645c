# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz orthogonalization of whole matrices: returns the (approximate) polar factor and never scales it."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import batched
from typing import Any, Literal, get_args

import torch
from absl import logging
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require, require_one_of
from emerging_optimizers.adaptive_muon.orthogonalize.precision import Turns, Undo, matmul_precision
from emerging_optimizers.adaptive_muon.orthogonalize.symmetric import cpu_has_tiles, symmetric_product
from emerging_optimizers.orthogonalized_optimizers import muon_utils
from emerging_optimizers.orthogonalized_optimizers.muon_utils import CoeffIterMode, NSCoeffT
from emerging_optimizers.triton_kernels import HAS_TRITON_340  # type: ignore[attr-defined]
from emerging_optimizers.utils import FP32MatmulPrecT


__all__ = [
    "NSAlgorithmT",
    "NewtonSchulz",
    "in_stacks",
    "iterated",
    "orthogonalized",
    "stack_size",
    "stacked",
    "syrk_is_usable",
]

NSAlgorithmT = Literal["standard", "gram", "auto"]

Coefficients = tuple[float, float, float]

# The GPU generations for which upstream's Muon vouches for its Triton kernel.
_SYRK_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))

# What a norm is at least taken for where a matrix is divided by it. Upstream's default was 1e-7 in 0.3, which stalls the
# iteration on the small gradients that clipping a loss spike makes, and is this one since 0.4.
_EPS = 1e-15

# Several steps at once save products from this ratio of a matrix's sides on, see _several_pay.
_SEVERAL_FROM = 1.5
# They round no more than a few times as much from these short sides on, two steps at once and, in float32, the first
# three, as tests/test_newton_schulz.py has found, and holds: the plain iteration's own error grows with the matrix.
_TWO_FROM, _THREE_FROM = 96, 512

# By device: the longest short side of matrices that are worked on as a stack, since longer ones keep it busy one at a
# time, and the float32 bytes of a stack, which bound a step's temporary memory and on a CPU fit a core's own cache: 48
# matrices of 256 x 256 take 0.7 of the time that they take as one stack.
_STACKS = {"cpu": (256, 2**21), "cuda": (1024, 2**27)}

# At "medium" precision on a CPU that is fast at bfloat16, the short side from which it is faster than float32, for a
# single matrix too (measured with tiles, AMX).
_BFLOAT16_FROM = 192


@dataclass(frozen=True)
class NewtonSchulz:
    """Orthogonalizes a matrix by Newton-Schulz iteration with upstream's coefficients.

    One step is :math:`X \\leftarrow (a I + b A + c A^2) X` with :math:`A = X X^\\top`. Several steps can be taken at once
    on the smaller Gram matrix A, since all polynomials are polynomials of the same A:

    .. math::
        B_1 = b_1 A + c_1 A^2, \\quad A' = (a_1 I + B_1) A (a_1 I + B_1), \\quad B_2 = b_2 A' + c_2 A'^2, \\quad
        X \\leftarrow (a_2 I + B_2)(a_1 I + B_1) X,

    which replaces products of X's size by products of A's size that are all symmetric. A is made anew from X after two
    steps (in float32 after the first three of a large matrix): the rounding of A, which every step on it amplifies, then stays in
    the order of the plain iteration's own.

    Args:
        coefficient_type: A coefficient set of upstream's table, see
            :func:`~emerging_optimizers.orthogonalized_optimizers.muon_utils.newton_schulz`.
        num_steps: Number of iterations, at least 1.
        use_syrk: Whether iterations in 16 bit on CUDA use a Triton kernel for symmetric products: "standard"
            upstream's, which is for single matrices in bfloat16, the others ours, for stacks in float16.
        algorithm: "standard" is upstream's function, one matrix after the other, and gives its numbers to the last bit
            ("medium" precision iterates in bfloat16). "gram" takes several steps at once, of a stack of matrices. At
            "medium" precision it iterates in float16 on CUDA, which is as fast as bfloat16 and more exact, and in
            float32 elsewhere. "auto" is the fastest of all for the shape and the device that rounds no more than a
            few times as much as "standard"; at "medium" precision it rounds less, or where a CPU is faster in bfloat16
            as much.
        precision: Precision of the products, whatever torch's own setting is: "highest", "high" or "medium", see
            :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon`.

    Raises:
        ValueError: If a name is unknown or ``num_steps`` is not a positive whole number.
    """

    coefficient_type: NSCoeffT
    num_steps: int
    use_syrk: bool = False
    algorithm: NSAlgorithmT = "auto"
    precision: FP32MatmulPrecT = "medium"

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
        require_one_of("ns_algorithm", self.algorithm, get_args(NSAlgorithmT))
        require_one_of("fp32_matmul_prec", self.precision, get_args(FP32MatmulPrecT))

    def __call__(self, matrices: torch.Tensor) -> torch.Tensor:
        """Returns the orthogonalized matrices, in the shape and dtype of ``matrices``.

        Args:
            matrices: Shape ``(..., rows, columns)``, a matrix or a stack of them; any floating dtype.
        """
        if not matrices.numel():
            return torch.zeros_like(matrices)
        stack = matrices.reshape(-1, *matrices.shape[-2:]).float()
        return _ALGORITHMS[self.algorithm](self, stack).view(matrices.shape).to(matrices.dtype)

    def dtype(self, device: torch.device, shape: Sequence[int]) -> torch.dtype:
        """Returns the dtype of the iteration on matrices of a shape on a device, in which the result is exact."""
        return _MEDIUM[self.algorithm](device, shape) if self.precision == "medium" else torch.float32

    def of_strips(self, strip: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
        """Returns the strip of the orthogonalized matrix that belongs to a strip of a matrix, in its shape and dtype.

        Every iteration sums the strips' Gram matrices over the group; the strips stay where they are.

        Args:
            strip: Shape ``(rows, columns)``, of which one is spread over the group.
            dim: The dimension that is spread, -2 or -1.
            group: The ranks that hold the strips.
        """
        return self._upstreams(strip.float(), transpose=dim == -2, tp_group=group).to(strip.dtype)

    def _standard(self, stack: torch.Tensor) -> torch.Tensor:
        """Upstream's iteration, a matrix at a time."""
        return stacked([self._upstreams(matrix) for matrix in stack])

    def _gram(self, stack: torch.Tensor) -> torch.Tensor:
        """Several steps at once."""
        return self._iterated(stack, at_once=True)

    def _auto(self, stack: torch.Tensor) -> torch.Tensor:
        """Several steps at once where that saves products and is exact, else one after the other."""
        coarse = self.dtype(stack.device, stack.shape) == torch.bfloat16 or (
            self.precision == "high" and stack.is_cuda
        )
        return self._iterated(stack, at_once=not coarse and _several_pay(stack.shape))

    def _iterated(self, stack: torch.Tensor, *, at_once: bool) -> torch.Tensor:
        """Our own iteration of a whole stack."""
        dtype = self.dtype(stack.device, stack.shape)
        blocks = _in_blocks(self._steps, min(stack.shape[1:]), dtype) if at_once else [*batched(self._steps, 1)]
        parts = torch.split(stack, stack_size(stack.shape[1:], stack.device))
        with self._switches(dtype, at_once):
            results = [iterated(part, blocks, dtype, self.use_syrk) for part in parts]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _switches(self, dtype: torch.dtype, at_once: bool) -> AbstractContextManager[None]:
        """Torch's switches as the products need them; several steps at once never in TF32, which rounds too coarsely."""
        if dtype == torch.float32:
            return matmul_precision("high" if self.precision == "high" and not at_once else "highest")
        return _sums_in_float32() if dtype == torch.float16 else nullcontext()

    @property
    def _steps(self) -> tuple[Coefficients, ...]:
        """The coefficients of every step."""
        return _coefficients(self.coefficient_type, self.num_steps)

    def _upstreams(self, matrix: torch.Tensor, **spread: Any) -> torch.Tensor:
        """Upstream's iteration of a float32 matrix; ``spread`` says how a matrix in strips lies."""
        with matmul_precision(self.precision):
            orthogonalized: torch.Tensor = muon_utils.newton_schulz(
                matrix,
                steps=self.num_steps,
                coefficient_type=self.coefficient_type,
                eps=_EPS,
                use_syrk=self.use_syrk and _syrk_takes(matrix),
                **spread,
            )
        return orthogonalized


def _medium_of_auto(device: torch.device, shape: Sequence[int]) -> torch.dtype:
    """The fastest dtype that is as exact as bfloat16: that itself where nothing is known."""
    if device.type == "cpu":
        return torch.bfloat16 if _is_faster_in_bfloat16(shape) else torch.float32
    return torch.float16 if device.type == "cuda" else torch.bfloat16


# The dtype of "medium" precision on a device. Several steps at once are not safe in bfloat16.
_MEDIUM: dict[str, Callable[[torch.device, Sequence[int]], torch.dtype]] = {
    "standard": lambda device, shape: torch.bfloat16,
    "gram": lambda device, shape: torch.float16 if device.type == "cuda" else torch.float32,
    "auto": _medium_of_auto,
}

_ALGORITHMS: dict[str, Callable[[NewtonSchulz, torch.Tensor], torch.Tensor]] = {
    "standard": NewtonSchulz._standard,
    "gram": NewtonSchulz._gram,
    "auto": NewtonSchulz._auto,
}


def in_stacks[Member](
    members: Sequence[Member], shape: Sequence[int], device: torch.device
) -> Iterator[tuple[Member, ...]]:
    """Yields what has tensors of one shape, matrices or stacks of them, in parts to work on as one stack each."""
    return batched(members, min(stack_size(shape, device), len(members)))


def stack_size(shape: Sequence[int], device: torch.device) -> int:
    """Returns how many tensors of a shape, matrices or stacks of them, to work on as one stack: at least 1."""
    longest, most = _STACKS.get(device.type, (0, 0))
    fit = most // max(4 * math.prod(shape), 1) if min(shape[-2:]) <= longest else 0
    return max(fit, 1)


def iterated(
    stack: torch.Tensor, blocks: Iterable[Sequence[Coefficients]], dtype: torch.dtype, use_syrk: bool = False
) -> torch.Tensor:
    """Returns the stack of matrices after Newton-Schulz iteration from each divided by its Frobenius norm, in float32.

    Args:
        stack: Shape ``(stack, rows, columns)``, float32.
        blocks: ``(a, b, c)`` of every step, in blocks of steps to take at once, see :class:`NewtonSchulz`.
        dtype: The dtype to iterate in.
        use_syrk: Whether symmetric products use our Triton kernel where it takes them.
    """
    product = partial(symmetric_product, use_syrk=use_syrk)
    X = torch.nn.functional.normalize(stack, p=2.0, dim=(-2, -1), eps=_EPS).to(dtype)  # type: ignore[arg-type]
    tall, n, spare = X.size(-2) > X.size(-1), min(X.shape[-2:]), torch.empty_like(X)
    A, B, T, Z = X.new_empty(4, X.size(0), n, n).unbind(0)
    for block in blocks:
        product(*(X.mT, X) if tall else (X, X.mT), out=A)
        for index, (a, b, c) in enumerate(block):
            product(A, A, plus=A, beta=b, alpha=c, out=B)
            if index + 1 < len(block):
                product(B, A, plus=A, beta=a, out=T)
                product(T, B, plus=T, beta=a, out=A)
            elif index == 0:
                torch.baddbmm(X, *(X, B) if tall else (B, X), beta=a, out=spare)
                break
            if index == 0:
                B.diagonal(dim1=-2, dim2=-1).add_(a)
                B, Z = Z, B
            else:
                # Symmetric, but for rounding: where X is zero, the later step's comes first in what X meets, and the
                # earlier steps do not enlarge it.
                torch.baddbmm(Z, *(Z, B) if tall else (B, Z), beta=a, out=T)
                Z, T = T, Z
        else:
            torch.bmm(*(X, Z) if tall else (Z, X), out=spare)
        X, spare = spare, X
    return X.float()


def orthogonalized(
    functions: Sequence[Callable[[torch.Tensor], torch.Tensor]], matrices: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Returns each function of its matrix; a :class:`NewtonSchulz` of all matrices of one shape at once.

    Args:
        functions: A function for each matrix.
        matrices: Matrices, or stacks of them.
    """
    alike: dict[Any, list[int]] = {}
    results: dict[int, torch.Tensor] = {}
    for index, (function, matrix) in enumerate(zip(functions, matrices, strict=True)):
        if isinstance(function, NewtonSchulz):
            alike.setdefault((function, matrix.shape, matrix.dtype), []).append(index)
        else:
            results[index] = function(matrix)
    for (function, shape, _), indices in alike.items():
        for some in in_stacks(indices, shape, matrices[indices[0]].device):
            results |= zip(some, function(stacked([matrices[i] for i in some])), strict=True)
    return [results[index] for index in range(len(matrices))]


@cache
def _coefficients(coefficient_type: NSCoeffT, num_steps: int) -> tuple[Coefficients, ...]:
    """Upstream's coefficients for this number of steps; what follows the last of a set is upstream's rule too."""
    repeats_last = coefficient_type in ("polar_express", "cans", "deepseekv4")
    mode: CoeffIterMode = "repeat_last" if repeats_last else "cycle"
    sets = muon_utils._COEFFICIENT_SETS[coefficient_type]
    return tuple(muon_utils.get_coefficient_iterator(num_steps, sets, mode=mode))


def _several_pay(shape: Sequence[int]) -> bool:
    """Whether several steps at once save products, and are exact.

    In units of the short side's cube, with the ratio r of the sides and symmetric products at half their price, a
    further step costs 5 in a block and 3r + 1 by itself; at full price 8 and 4r + 2.
    """
    short, long = sorted(shape[-2:])
    return long >= _SEVERAL_FROM * short and short >= _TWO_FROM


def _is_faster_in_bfloat16(shape: Sequence[int]) -> bool:
    """Whether the CPU iterates on matrices of this shape faster in bfloat16.

    With tiles it does. AMD's vector units are twice as fast in it, which several steps at once in float32 make up for;
    Intel's are no faster. Nothing but the shape and the CPU decides, since replicas must round alike.
    """
    if not _cpu_has_bfloat16_units() or min(shape[-2:]) < _BFLOAT16_FROM:
        return False
    return cpu_has_tiles() or (_cpu_is_amds_with_vectors() and not _several_pay(shape))


def _in_blocks(steps: Sequence[Coefficients], short: int, dtype: torch.dtype) -> list[Sequence[Coefficients]]:
    """Cuts the steps for matrices of this short side into those to take at once."""
    first = 3 if short >= _THREE_FROM and dtype == torch.float32 else 2
    return [steps[:first], *batched(steps[first:], 2)]


_turns = Turns()


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """Keeps cuBLAS from summing products of float16 in float16, which it may by default where it splits the sum."""
    with _turns.at("float32", _sum_in_float32):
        yield


def _sum_in_float32() -> Undo:
    """Sets cuBLAS's flags, and returns what restores them."""
    flags, reduction, split_k = torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", "_split_k"
    names = (reduction, "allow_fp16_accumulation")
    before: dict[str, Any] = {name: getattr(flags, name) for name in names if hasattr(flags, name)}
    if hasattr(flags, reduction + split_k):  # the first is set together with it, as a pair
        before[reduction] = before[reduction], getattr(flags, reduction + split_k)

    def set_all(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(flags, name, value)

    set_all({name: (False, value[1]) if isinstance(value, tuple) else False for name, value in before.items()})
    return partial(set_all, before)


@cache
def _cpu_has_bfloat16_units() -> bool:
    """Whether the CPU has instructions for products of bfloat16; others are 10 times slower at it."""
    return any(
        bool(getattr(torch.cpu, name, bool)()) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )


@cache
def _cpu_is_amds_with_vectors() -> bool:
    """Whether the CPU is one of AMD's that multiply vectors of bfloat16 twice as fast as of float32 (Zen 4 and newer)."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in str(found.get("cpu_name")) and bool(found.get("avx512_bf16"))


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the tensors as one with a further first dimension, of a single one without a copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def syrk_is_usable() -> bool:
    """Tells whether Triton kernels for symmetric products can be trusted here; logs why where they can't."""
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
    return (
        matrix.is_cuda and matrix.ndim == 2 and matrix.is_contiguous() and all(size % 8 == 0 for size in matrix.shape)
    )
