# SPDX-License-Identifier: Apache-2.0
"""Convolutions, whose weight is a matrix (out, in x kernel) that multiplies patches of the input."""

import math
from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from emerging_optimizers.adaptive_muon.sharding.dtensor import local_of


__all__ = ["in_convolution"]


def in_convolution(module: nn.Module) -> Iterator[tuple[nn.Parameter, tuple[int, int], str]]:
    """Yield the weight of a convolution, the shape of its matrix, and why it is none; "" where it is one.

    A weight that is parametrized, as by ``weight_norm``, has its direction in its place. A shard that only an attribute
    shows (``partition_dim``) is passed over.
    """
    if not isinstance(module, nn.modules.conv._ConvNd):
        return
    channels = (
        (module.in_channels, module.out_channels) if module.transposed else (module.out_channels, module.in_channels)
    )
    shape = (channels[0], channels[1] // module.groups, *module.kernel_size)
    for p in module.parameters():
        if not is_lazy(p) and p.shape == shape and getattr(p, "partition_dim", -1) in (None, -1):
            yield p, (p.size(0), math.prod(p.shape[1:])), _why_none(module, p)


def _why_none(module: nn.modules.conv._ConvNd, p: nn.Parameter) -> str:
    """Why the weight of a convolution is no matrix, or ""."""
    if module.transposed:
        return "transposed convolution"
    if p.size(1) == 1 and module.groups > 1:
        return "depthwise convolution"
    if not local_of(p).is_contiguous():
        return "convolution that is not contiguous, as in the memory format channels_last"
    return ""
