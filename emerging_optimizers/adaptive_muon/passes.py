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
from emerging_optimizers.adaptive_muon.noise import Noise, round_into
from emerging_optimizers.adaptive_muon.orthogonalize.batches import as_batch
from emerging_optimizers.adaptive_muon.parameters import in_work_dtype


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
    noise: Noise | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Average gradients into momentum buffers in place, and return M' with the sums of squares.

    Args:
        Ms: Momentum buffers M, each of shape ``(..., rows, columns)``.
        Gs: Their gradients G.
        momentum: Decay rate of the momentum.
        nesterov: Whether M' is the momentum ahead, ``lerp(G, M, momentum)``, instead of M.
        kept_dims: The dimensions that sums of squares keep.
        observed: Whose sums of squares to return, in this order: "gradient", "momentum".
        noise: With which bfloat16 momentum buffers are rounded, after M' has been made of the average in float32.

    Returns:
        M', shape ``(batch, ..., rows, columns)``, which may be M itself, and the sums of squares.
    """
    kernel_takes_M = Ms[0].dtype == torch.float32 or (noise is not None and Ms[0].dtype == torch.bfloat16)
    if kernel_takes_M and _taken(Ms) and _taken(Gs) and not (observed and len(kept_dims) == 2):
        from emerging_optimizers.adaptive_muon.kernels.average import average_on_cuda

        kept = kept_dims if observed else None
        M_prime, sums = average_on_cuda(Ms, Gs, momentum=momentum, nesterov=nesterov, kept_dims=kept, noise=noise)
        _changed(Ms)
        return M_prime, [sums["gradient" != name] for name in observed]
    worked = [in_work_dtype(M) for M in Ms]
    Gs = [G.to(M.dtype) for G, M in zip(Gs, worked, strict=True)]
    torch._foreach_lerp_(worked, Gs, 1 - momentum)
    round_into(Ms, worked, noise)
    M = as_batch(worked)
    G = as_batch(Gs) if nesterov or "gradient" in observed else M  # which nobody reads
    M_prime = G.lerp(M, momentum) if nesterov else M
    seen = {"gradient": G, "momentum": M_prime}
    return M_prime, [sum_of_squares(seen[name], kept_dims) for name in observed]


def apply(
    Ws: list[torch.Tensor],
    O: torch.Tensor,
    D: torch.Tensor,
    *,
    lr: float,
    decay: float | torch.Tensor,
    cautious: bool = False,
    noise: Noise | None = None,
) -> None:
    """Decay and update weights in place: ``W <- W - decay W``, then ``W <- W - lr D O``.

    Args:
        Ws: Weights of one shape and dtype. Those in 16 bit are rounded once, at the end.
        O: The orthogonalized momentum, shape ``(batch, ..., rows, columns)``.
        D: The adaptive scale, broadcastable to O.
        lr: Learning rate.
        decay: The share of itself that a weight loses: a number, or a tensor broadcastable to O.
        cautious: Whether elements are spared that the update moves away from zero.
        noise: With which bfloat16 weights are rounded; None to round to nearest.
    """
    if _taken(Ws) and O.dtype in _DTYPES and D.dtype == torch.float32:
        from emerging_optimizers.adaptive_muon.kernels.apply import apply_on_cuda

        apply_on_cuda(Ws, O, D, lr=lr, decay=decay, cautious=cautious, noise=noise)
        _changed(Ws)
        return
    worked = [in_work_dtype(W) for W in Ws]
    decay_weights(worked, decay, D * O if cautious else None)
    Os = O.to(worked[0].dtype).unbind(0)
    torch._foreach_addcmul_(worked, Os, D.expand(len(Os), *D.shape[1:]).unbind(0), value=-lr)
    round_into(Ws, worked, noise)


def decay_weights(
    Ws: list[torch.Tensor],
    decay: float | torch.Tensor,
    updates: torch.Tensor | None = None,
    noise: Noise | None = None,
) -> None:
    """Decay weights in place, without the update: see :func:`apply`. With updates, D O, the decay is cautious."""
    worked = [in_work_dtype(W) for W in Ws]
    if updates is not None and (isinstance(decay, torch.Tensor) or decay):
        # Signs, for a product of small numbers may be zero.
        agreeing = [U.sign().to(W.dtype).mul_(W) >= 0 for W, U in zip(worked, updates, strict=True)]
        decay = as_batch(agreeing).to(worked[0].dtype) * decay
    if isinstance(decay, torch.Tensor):
        torch._foreach_addcmul_(worked, worked, decay.expand(len(Ws), *decay.shape[1:]).unbind(0), value=-1)
    elif decay:
        torch._foreach_add_(worked, worked, alpha=-decay)
    round_into(Ws, worked, noise)


def _taken(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the kernels take tensors: plain ones on a GPU, of the same strides, with adjacent columns."""
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
    """Report to autograd that a kernel has changed tensors in place, as torch's own functions do."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)
