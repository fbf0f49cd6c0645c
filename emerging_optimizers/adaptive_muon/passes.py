# SPDX-License-Identifier: Apache-2.0
"""The two passes of a step over all elements: the momentum with its sums of squares, and the weight with its update.

On a GPU a Triton kernel does each in one pass over memory for all members of a batch; elsewhere, and for what the kernels
do not take, torch's functions do the same.
"""

from collections.abc import Sequence

import torch
from torch.autograd.graph import increment_version

from emerging_optimizers.adaptive_muon.kernels.usable import kernels_usable
from emerging_optimizers.adaptive_muon.moment2 import sum_of_squares
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch
from emerging_optimizers.adaptive_muon.parameters import in_work_dtype, round_into


__all__ = ["apply", "average", "decay_weights"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def average(
    Ms: list[torch.Tensor],
    Gs: list[torch.Tensor],
    *,
    momentum: float,
    nesterov: bool,
    kept_dims: tuple[int, ...],
    observed: Sequence[str],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Average gradients into momentum buffers in place, and return M' with the sums of squares.

    Args:
        Ms: Momentum buffers M, each of shape ``(..., rows, columns)``.
        Gs: Their gradients G.
        momentum: Decay rate of the momentum.
        nesterov: Whether M' is the momentum ahead, ``lerp(G, M, momentum)``, instead of M.
        kept_dims: The dimensions that sums of squares keep.
        observed: Whose sums of squares to return, in this order: "gradient", "momentum".

    Returns:
        M', shape ``(batch, ..., rows, columns)``, which may be M itself, and the sums of squares.
    """
    if _taken(Ms) and Ms[0].dtype == torch.float32 and _taken(Gs) and not (observed and len(kept_dims) == 2):
        from emerging_optimizers.adaptive_muon.kernels.average import average_on_cuda

        kept = kept_dims if observed else None
        M_prime, sums = average_on_cuda(Ms, Gs, momentum=momentum, nesterov=nesterov, kept_dims=kept)
        _changed(Ms)
        return M_prime, [sums["gradient" != name] for name in observed]
    Gs = [G.to(M.dtype) for G, M in zip(Gs, Ms, strict=True)]
    torch._foreach_lerp_(Ms, Gs, 1 - momentum)
    M = as_batch(Ms)
    G = as_batch(Gs) if nesterov or "gradient" in observed else M  # which nobody reads
    M_prime = G.lerp(M, momentum) if nesterov else M
    seen = {"gradient": G, "momentum": M_prime}
    return M_prime, [sum_of_squares(seen[name], kept_dims) for name in observed]


def apply(Ws: list[torch.Tensor], O: torch.Tensor, D: torch.Tensor, *, lr: float, decay: float | torch.Tensor) -> None:
    """Decay and update weights in place: ``W <- W - decay W``, then ``W <- W - lr D O``.

    Args:
        Ws: Weights of one shape and dtype. Those in 16 bit are rounded once, at the end.
        O: The orthogonalized momentum, shape ``(batch, ..., rows, columns)``.
        D: The adaptive scale, broadcastable to O.
        lr: Learning rate.
        decay: The share of itself that a weight loses: a number, or a tensor broadcastable to O.
    """
    if _taken(Ws) and O.dtype in _DTYPES and D.dtype == torch.float32:
        from emerging_optimizers.adaptive_muon.kernels.apply import apply_on_cuda

        apply_on_cuda(Ws, O, D, lr=lr, decay=decay)
        _changed(Ws)
        return
    worked = [in_work_dtype(W) for W in Ws]
    decay_weights(worked, decay)
    Os = O.to(worked[0].dtype).unbind(0)
    torch._foreach_addcmul_(worked, Os, D.expand(len(Os), *D.shape[1:]).unbind(0), value=-lr)
    for W, result in zip(Ws, worked, strict=True):
        round_into(W, result)


def decay_weights(Ws: list[torch.Tensor], decay: float | torch.Tensor) -> None:
    """Decay weights in place, without the update: see :func:`apply`."""
    worked = [in_work_dtype(W) for W in Ws]
    if isinstance(decay, torch.Tensor):
        torch._foreach_addcmul_(worked, worked, decay.expand(len(Ws), *decay.shape[1:]).unbind(0), value=-1)
    elif decay:
        torch._foreach_add_(worked, worked, alpha=-decay)
    for W, result in zip(Ws, worked, strict=True):
        round_into(W, result)


def _taken(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the kernels take tensors: plain ones on a GPU that lie in memory alike, with adjacent columns."""
    first = tensors[0]
    return (
        first.is_cuda
        and first.numel() > 0
        and first.dtype in _DTYPES
        and first.stride(-1) == 1
        and first.ndim <= 3
        and all(type(each) in (torch.Tensor, torch.nn.Parameter) for each in tensors)
        and all(each.stride() == first.stride() and each.dtype == first.dtype for each in tensors)
        and kernels_usable(first.device)
    )


def _changed(tensors: Sequence[torch.Tensor]) -> None:
    """Tells autograd that a kernel has changed tensors in place, as torch's own functions do."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)
