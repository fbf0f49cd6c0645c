# SPDX-License-Identifier: Apache-2.0
"""DTensors: the shards that their placements describe, and optimizer state that is sharded as they are.

The part of torch that defines DTensors takes a second to import. It is imported only where a DTensor shows that it has
been imported already.
"""

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.parameters import is_flattened
from emerging_optimizers.adaptive_muon.sharding.agreement import group_of
from emerging_optimizers.adaptive_muon.sharding.layout import Layout, Piece, ReplicaPiece


if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

__all__ = [
    "as_matrices",
    "as_stored",
    "gradient_of",
    "is_dtensor",
    "is_transposed",
    "local_of",
    "offset_of",
    "placements_like",
    "shard_of",
    "wrapped_like",
]


def is_dtensor(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "placements")


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, sharing its memory: its shard of a DTensor, all of any other.

    An empty shard is returned in the shape of its placements. FSDP2 makes one of 0 x 0 where tensor parallelism leaves it
    a shard of 8 x 0.
    """
    if not is_dtensor(tensor):
        return tensor
    local = tensor.to_local()
    if local.numel() == 0:
        shape, _ = _place_in(tensor.shape, tensor.device_mesh, tuple(tensor.placements))
        return local.reshape(shape) if 0 in shape else local
    return local


def is_transposed(p: torch.Tensor) -> bool:
    """Return whether a parameter is tagged ``muon_transposed``: it is stored (in, out) and worked on as (out, in)."""
    return bool(getattr(p, "muon_transposed", False)) and not is_flattened(p)


def as_matrices(p: torch.Tensor, like_p: torch.Tensor | None = None) -> torch.Tensor:
    """Return what this process holds of a parameter, or of a tensor of its shape, as matrices (out, in), a view.

    The tensor may be broadcastable to the parameter's shape. One of fewer dimensions is returned as it is. A gradient that
    is flattened may be copied.
    """
    local = local_of(p if like_p is None else like_p)
    if local.ndim < p.ndim:
        return local
    if is_flattened(p):
        return local.flatten(1)
    return local.mT if is_transposed(p) else local


def as_stored(p: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices (out, in), of what this process holds of a parameter, in its own shape, a view."""
    if is_flattened(p):
        return torch.unflatten(matrices, 1, p.shape[1:])
    return matrices.mT if is_transposed(p) else matrices


def gradient_of(p: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a parameter's gradient, which is not None. A partial gradient is summed first."""
    grad = p.grad
    assert grad is not None
    if is_dtensor(p) and is_dtensor(grad) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local_of(grad)


def shard_of(p: "DTensor", name: str, *, apart: bool) -> Layout | Piece:
    """Return which shard of its matrix this process holds of a DTensor.

    Mesh dimensions that shard a stack of matrices along its first dimension keep matrices whole. Mesh dimensions that
    replicate the parameter make replicas. The processes along all other mesh dimensions hold a matrix together.

    Args:
        p: The parameter.
        name: Its name in errors.
        apart: Whether a replica in shards has a group of its own beside that of all replicas.

    Raises:
        ValueError: If its placements are not contiguous shards and replicas.
    """
    mesh, dims = p.device_mesh, [_sharded_dim(placement, p.ndim) for placement in p.placements]
    require(
        not any(placement.is_partial() for placement in p.placements),
        f"a parameter must be sharded or replicated; {name} has the placements",
        p.placements,
        "Redistribute it before the optimizer is made.",
    )
    if is_flattened(p):
        dims = [None if dim is None else -2 if dim == -p.ndim else 0 for dim in dims]
        require(
            0 not in dims,
            f"{name}, which is flattened, must be sharded along its first dimension; it has the placements",
            p.placements,
            "Shard it as FSDP2 does by default, or pass flatten_conv=False.",
        )
    splitting = [index for index, dim in enumerate(dims) if dim in (-2, -1) and mesh.size(index) > 1]
    replicating = [index for index, dim in enumerate(dims) if dim is None and mesh.size(index) > 1]
    if not splitting and not replicating:
        return Layout()
    shape, offset = _place_in(p.shape, mesh, tuple(p.placements))
    require(
        shape == tuple(local_of(p).shape),
        f"the local shard of {name} must have the shape {shape} of its placements {p.placements}; it has",
        tuple(local_of(p).shape),
        "Use torch's own placements, without padding.",
    )
    (top, left), (rows, columns), whole = offset[-2:], shape[-2:], (p.size(-2), p.size(-1))
    if is_flattened(p):
        top, left, rows, columns = offset[0], 0, shape[0], math.prod(p.shape[1:])
        whole = (p.size(0), columns)
    top, left = min(top, whole[0]), min(left, whole[1])  # torch starts an empty shard beyond the end
    group, rectangle = _group(mesh, sorted(splitting + replicating)), (top, top + rows, left, left + columns)
    if not replicating:
        return Piece(group, whole, rectangle)
    return ReplicaPiece(
        group,
        whole,
        rectangle,
        replica=_place(mesh, replicating),
        replicas=math.prod(mesh.size(dim) for dim in replicating),
        shards=_group(mesh, splitting) if apart and splitting else None,
    )


def offset_of(p: torch.Tensor) -> tuple[int, ...]:
    """Return where what this process holds of a tensor begins in the whole one: zeros for what is no DTensor."""
    return _place_in(p.shape, p.device_mesh, tuple(p.placements))[1] if is_dtensor(p) else (0,) * p.ndim


@lru_cache(maxsize=4096)
def _place_in(
    shape: torch.Size, mesh: DeviceMesh, placements: "tuple[Placement, ...]"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape and the offset of this process's shard by its placements, computed once: torch takes long for it."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(local), tuple(offset)


def placements_like(p: torch.Tensor, dims: Collection[int]) -> "tuple[Placement, ...] | None":
    """Return the placements of a buffer that has some of the dimensions -2 and -1 of the matrices of ``p``, and size 1 in others.

    Where every rank has all of the buffer, or ``p`` is no DTensor, return None.
    """
    if not is_dtensor(p):
        return None
    from torch.distributed.tensor import Replicate

    kept = {*range(-p.ndim, -2), *dims}
    if is_flattened(p):
        kept = {-p.ndim} if -2 in dims else set()
    placements = tuple(own if _sharded_dim(own, p.ndim) in kept else Replicate() for own in p.placements)
    return None if all(placement.is_replicate() for placement in placements) else placements


def wrapped_like(
    p: torch.Tensor,
    local: torch.Tensor,
    placements: "Sequence[Placement] | None" = None,
    shape: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return a local tensor itself, or where ``p`` is a DTensor, the DTensor on its mesh of which it is the shard.

    The DTensor's placements and its whole shape are those of ``p`` by default.
    """
    if not is_dtensor(p):
        return local
    from torch.distributed.tensor import DTensor

    whole = torch.empty(p.shape if shape is None else torch.Size(shape), device="meta")
    return DTensor.from_local(
        local, p.device_mesh, placements or p.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _sharded_dim(placement: "Placement", ndim: int) -> int | None:
    """Return the tensor dimension, counted from the end, that a placement splits over a mesh dimension."""
    dim: int | None = getattr(placement, "dim", None)
    return None if dim is None else dim % ndim - ndim


def _group(mesh: DeviceMesh, dims: list[int]) -> ProcessGroup:
    """Return the group of the processes along the given mesh dimensions."""
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # this process has a shard
    index = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
    return group_of(mesh.mesh[index].flatten().tolist())


def _place(mesh: DeviceMesh, dims: list[int]) -> int:
    """Return the place of this process among those along the given mesh dimensions."""
    place = 0
    for dim in dims:
        place = place * mesh.size(dim) + mesh.get_local_rank(dim)
    return place
