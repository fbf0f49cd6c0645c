# SPDX-License-Identifier: Apache-2.0
"""Orthogonalization of matrices in pieces: asked for by a request of the class that the ``tp_mode`` names."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import ClassVar, Literal, Self, get_args, override

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import require, require_one_of
from emerging_optimizers.adaptive_muon.exchange.collectives import GroupRequest, all_gather, all_to_all
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz, orthogonalized
from emerging_optimizers.adaptive_muon.sharding.layout import Rectangle, ShardedLayout


__all__ = [
    "Distributed",
    "Duplicated",
    "LayerSharded",
    "Orthogonalize",
    "TensorParallelModeT",
    "tensor_parallel_mode",
]

TensorParallelModeT = Literal["layer_sharded", "duplicated", "distributed", "blockwise"]

# By backend: in how many parts matrices travel to their homes and back, where that is not one. NCCL's messages travel
# while the device computes; gloo's need the processor that would.
_PARTS = {"nccl": 2}


@dataclass(frozen=True, eq=False)
class Orthogonalize(GroupRequest[torch.Tensor]):
    """The piece at hand of an orthogonalized matrix that a group holds in pieces.

    Args:
        group: The group.
        piece: The piece of the matrix, or of the stack of matrices, at hand.
        layout: Who holds which piece.
        home: The rank that orthogonalizes the matrix, where one does it for all.
        of_whole: Orthogonalizes a whole float32 matrix, or a stack of them: the next, or a function that uses it.
        newton_schulz: Orthogonalizes a matrix in strips.
        among_many: Whether there are so many that messages are worth being cut in parts.
    """

    piece: torch.Tensor
    layout: ShardedLayout
    home: int
    of_whole: Callable[[torch.Tensor], torch.Tensor]
    newton_schulz: NewtonSchulz
    among_many: bool

    # Whether it calls ``of_whole``, which may be a user's.
    takes_functions: ClassVar[bool] = True

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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the orthogonalized matrix is exact."""
        known = isinstance(self.of_whole, NewtonSchulz)
        return self.newton_schulz.dtype(self.piece.device, self.layout.whole) if known else torch.float32

    @staticmethod
    def orthogonalized(
        requests: "Sequence[Orthogonalize]", arrived: Sequence[Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Returns the whole orthogonalized matrices.

        Args:
            requests: The requests that this rank orthogonalizes.
            arrived: For each rank of the group, its pieces of these matrices.
        """
        wholes = [request.assembled(pieces) for request, *pieces in zip(requests, *arrived, strict=True)]
        return orthogonalized([request.of_whole for request in requests], wholes)


class LayerSharded(Orthogonalize):
    """Every matrix goes to its home, is orthogonalized there, and its pieces come back: two all-to-alls for all.

    Where messages travel while the device computes, and there are so many matrices that they take several rounds, there
    are two of each: the second half comes while the first is orthogonalized, and that goes back while the second is.
    """

    @staticmethod
    @override
    def receivers(home: int, size: int) -> Collection[int]:
        return (home,)

    @classmethod
    @override
    def answer_group(cls, group: ProcessGroup, requests: Sequence[Self]) -> Sequence[torch.Tensor]:
        pieces = [request.piece.float() for request in requests]
        # An all-to-all carries the result in the dtype of its iteration, which loses nothing.
        dtype = reduce(torch.promote_types, (request.dtype for request in requests))
        like, ranks, me = pieces[0].new_empty(0, dtype=dtype), range(group.size()), group.rank()
        parts = cls._parts(requests, group)

        arriving = []
        for of_home in parts:
            here = [[requests[i].shape_of(requests[i].layout.rectangles[rank]) for i in of_home[me]] for rank in ranks]
            out = [[pieces[i] for i in indices] for indices in of_home]
            arriving.append(all_to_all(out, here, group, pieces[0]))
        returning = []
        for of_home, arrived in zip(parts, arriving, strict=True):
            at_home = [requests[i] for i in of_home[me]]
            wholes = [matrix.to(dtype) for matrix in cls.orthogonalized(at_home, arrived())]
            back = [
                [_cut(whole, r.layout.rectangles[rank]) for r, whole in zip(at_home, wholes, strict=True)]
                for rank in ranks
            ]
            returning.append(all_to_all(back, [[pieces[i].shape for i in each] for each in of_home], group, like))

        answers: dict[int, torch.Tensor] = {}
        for of_home, returned in zip(parts, returning, strict=True):
            answers |= zip(chain(*of_home), chain(*returned()), strict=True)
        return [answers[index].to(request.piece.dtype) for index, request in enumerate(requests)]

    @staticmethod
    def _parts(requests: "Sequence[LayerSharded]", group: ProcessGroup) -> list[list[list[int]]]:
        """For each part that travels by itself, the requests of each home."""
        of_home = [[i for i, request in enumerate(requests) if request.home == rank] for rank in range(group.size())]
        device, config = requests[0].piece.device.type, dist.get_backend_config(group)
        most = max((number for name, number in _PARTS.items() if f"{device}:{name}" in config), default=1)
        number = min(most, max(map(len, of_home))) if requests[0].among_many else 1
        return [[indices[part::number] for indices in of_home] for part in range(number)]


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
            _cut(whole, request.layout.own).to(request.piece.dtype, copy=True)
            for request, whole in zip(requests, cls.orthogonalized(requests, arrived), strict=True)
        ]


class Distributed(Orthogonalize):
    """The pieces stay where they are, and the Gram matrices are summed: an all-reduce for each iteration and matrix."""

    takes_functions = False

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
