# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz orthogonalization: returns the (approximate) polar factor and never scales it.

Of a matrix in pieces it is asked for by a request of the class that the ``tp_mode`` names.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, override

import torch
from absl import logging
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require, require_one_of
from emerging_optimizers.adaptive_muon.collectives import GroupRequest, all_gather, all_to_all
from emerging_optimizers.adaptive_muon.layout import Rectangle, ShardedLayout
from emerging_optimizers.orthogonalized_optimizers import muon_utils
from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT
from emerging_optimizers.triton_kernels import HAS_TRITON_340  # type: ignore[attr-defined]


__all__ = [
    "Distributed",
    "Duplicated",
    "LayerSharded",
    "NewtonSchulz",
    "Orthogonalize",
    "TensorParallelModeT",
    "syrk_is_usable",
    "tensor_parallel_mode",
]

TensorParallelModeT = Literal["layer_sharded", "duplicated", "distributed", "blockwise"]

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
            matrix: Shape ``(rows, columns)``, or ``(stack, rows, columns)`` for a stack of matrices; any floating
                dtype (iterated in float32 or, at "medium" precision, in bfloat16).
        """
        return self._iterate(matrix)

    def of_strips(self, strip: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
        """Returns the strip of the orthogonalized matrix that belongs to a strip of a matrix, in its shape and dtype.

        Every iteration sums the strips' Gram matrices over the group; the strips stay where they are.

        Args:
            strip: Shape ``(rows, columns)``, of which one is spread over the group.
            dim: The dimension that is spread, -2 or -1.
            group: The ranks that hold the strips.
        """
        return self._iterate(strip, transpose=dim == -2, tp_group=group)

    def _iterate(self, matrix: torch.Tensor, **spread: Any) -> torch.Tensor:
        """Calls upstream's iteration; ``spread`` says how a matrix in strips lies."""
        orthogonalized: torch.Tensor = muon_utils.newton_schulz(
            matrix.float(),
            steps=self.num_steps,
            coefficient_type=self.coefficient_type,
            use_syrk=self.use_syrk and _syrk_takes(matrix),
            **spread,
        )
        return orthogonalized.to(matrix.dtype)


@dataclass(frozen=True, eq=False)
class Orthogonalize(GroupRequest[torch.Tensor]):
    """The piece at hand of an orthogonalized matrix that a group holds in pieces.

    Args:
        group: The group.
        piece: The piece of the matrix, or of the stack of matrices, at hand.
        layout: Who holds which piece.
        home: The rank that orthogonalizes the matrix, where one does it for all.
        of_whole: Orthogonalizes a whole float32 matrix.
        newton_schulz: Orthogonalizes a matrix in strips.
    """

    piece: torch.Tensor
    layout: ShardedLayout
    home: int
    of_whole: Callable[[torch.Tensor], torch.Tensor]
    newton_schulz: NewtonSchulz

    @staticmethod
    @abstractmethod
    def receivers(home: int, size: int) -> Collection[int]:
        """Returns the ranks, of a group of ``size``, that receive the whole of a matrix with this home."""

    @classmethod
    def check(cls, layout: ShardedLayout, name: str) -> None:
        """Raises a ``ValueError`` if a matrix cannot be orthogonalized in this mode."""

    def shape_of(self, rectangle: Rectangle) -> tuple[int, ...]:
        """Returns the shape that a piece has on the rank which holds it."""
        return (*self.piece.shape[:-2], *rectangle.shape)

    def assembled(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the whole matrix made of the pieces of all ranks."""
        whole = pieces[0].new_empty((*self.piece.shape[:-2], *self.layout.whole))
        for rectangle, piece in zip(self.layout.rectangles, pieces, strict=True):
            _cut(whole, rectangle).copy_(piece)
        return whole


class LayerSharded(Orthogonalize):
    """Every matrix goes to its home, is orthogonalized there, and its pieces come back: two all-to-alls for all."""

    @staticmethod
    @override
    def receivers(home: int, size: int) -> Collection[int]:
        return (home,)

    @classmethod
    @override
    def answer_group(cls, group: ProcessGroup, requests: Sequence[Self]) -> Sequence[torch.Tensor]:
        pieces = [request.piece.float() for request in requests]
        ranks, at_home = range(group.size()), [request for request in requests if request.home == group.rank()]
        of_home = [[index for index, request in enumerate(requests) if request.home == rank] for rank in ranks]
        held_by = [[request.shape_of(request.layout.rectangles[rank]) for request in at_home] for rank in ranks]

        arrived = all_to_all([[pieces[i] for i in indices] for indices in of_home], held_by, group, pieces[0])
        whole = [request.of_whole(request.assembled(parts)) for request, *parts in zip(at_home, *arrived, strict=True)]
        parts = [
            [_cut(matrix, r.layout.rectangles[rank]) for r, matrix in zip(at_home, whole, strict=True)]
            for rank in ranks
        ]
        returned = all_to_all(parts, [[pieces[i].shape for i in indices] for indices in of_home], group, pieces[0])

        answers = dict(zip(sum(of_home, []), sum(returned, []), strict=True))
        return [answers[index].to(request.piece.dtype) for index, request in enumerate(requests)]


class Duplicated(Orthogonalize):
    """Every rank gathers every matrix and orthogonalizes it: one all-gather for all."""

    @staticmethod
    @override
    def receivers(home: int, size: int) -> Collection[int]:
        return range(size)

    @classmethod
    @override
    def answer_group(cls, group: ProcessGroup, requests: Sequence[Self]) -> Sequence[torch.Tensor]:
        ranks = range(group.size())
        shapes = [[request.shape_of(request.layout.rectangles[rank]) for request in requests] for rank in ranks]
        arrived = all_gather([request.piece.float() for request in requests], shapes, group)
        return [
            _cut(request.of_whole(request.assembled(parts)), request.layout.own).to(request.piece.dtype, copy=True)
            for request, *parts in zip(requests, *arrived, strict=True)
        ]


class Distributed(Orthogonalize):
    """The pieces stay where they are, and the Gram matrices are summed: an all-reduce for each iteration and matrix."""

    @staticmethod
    @override
    def receivers(home: int, size: int) -> Collection[int]:
        return ()

    @classmethod
    @override
    def check(cls, layout: ShardedLayout, name: str) -> None:
        require(
            not (layout.split[-2] and layout.split[-1]),
            f'tp_mode="distributed" takes matrices split along one dimension; {name} is split along both, in the pieces',
            [tuple(each) for each in layout.rectangles],
            'use tp_mode="layer_sharded"',
        )

    @classmethod
    @override
    def answer_group(cls, group: ProcessGroup, requests: Sequence[Self]) -> Sequence[torch.Tensor]:
        return [request._orthogonalized() for request in requests]

    def _orthogonalized(self) -> torch.Tensor:
        """The orthogonalized piece. Upstream would normalize a stack by one norm, so it is taken apart."""
        dim = -2 if self.layout.split[-2] else -1
        stack = self.piece.unsqueeze(0) if self.piece.ndim == 2 else self.piece
        strips = [self.newton_schulz.of_strips(strip, dim, self.group) for strip in stack]
        return torch.stack(strips).view_as(self.piece)


def tensor_parallel_mode(name: TensorParallelModeT) -> type[Orthogonalize] | None:
    """Returns how the mode of this name orthogonalizes a matrix in pieces.

    Args:
        name: A name of ``TensorParallelModeT``.

    Returns:
        The request to make, or None for "blockwise", which makes each piece a matrix of its own and needs nobody else.

    Raises:
        ValueError: If the name is unknown.
    """
    require_one_of("tp_mode", name, get_args(TensorParallelModeT))
    modes = {"layer_sharded": LayerSharded, "duplicated": Duplicated, "distributed": Distributed}
    return modes.get(name)


def _cut(whole: torch.Tensor, rectangle: Rectangle) -> torch.Tensor:
    """The view of a whole matrix that a rectangle of it is."""
    return whole[..., rectangle.top : rectangle.bottom, rectangle.left : rectangle.right]


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
    return (
        matrix.is_cuda and matrix.ndim == 2 and matrix.is_contiguous() and all(size % 8 == 0 for size in matrix.shape)
    )
