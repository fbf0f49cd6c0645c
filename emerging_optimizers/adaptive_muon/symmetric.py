# SPDX-License-Identifier: Apache-2.0
"""Products that are known to be symmetric: half of such a product says it all."""

import torch


__all__ = ["symmetric_product"]

# A CPU gains from here on (rows of the product), in panels of about this many rows; benchmarks/products.py measures it.
_CPU_FROM = 384
_CPU_PANEL = 192


def symmetric_product(
    S: torch.Tensor, T: torch.Tensor, *, plus: torch.Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> torch.Tensor:
    """Returns :math:`\\beta P + \\alpha S T`, where that is symmetric.

    Args:
        S: Left factors, shape ``(stack, n, k)``.
        T: Right factors, shape ``(stack, k, n)``.
        plus: P, symmetric, shape ``(stack, n, n)``; None for none.
        beta: Factor on P.
        alpha: Factor on the product.

    Returns:
        Shape ``(stack, n, n)``. Where half of it was computed and mirrored it is symmetric to the last bit.
    """
    if S.device.type == "cpu" and S.size(-2) >= _CPU_FROM:
        return _in_panels(S, T, plus, beta, alpha)
    if plus is None:
        return torch.bmm(S, T) if alpha == 1 else torch.bmm(S, T).mul_(alpha)
    return torch.baddbmm(plus, S, T, beta=beta, alpha=alpha)


def _in_panels(S: torch.Tensor, T: torch.Tensor, plus: torch.Tensor | None, beta: float, alpha: float) -> torch.Tensor:
    """The lower triangle in panels of rows, each up to its own end, and its mirror image; one matrix after the other."""
    n = S.size(-2)
    panels = max(round(n / _CPU_PANEL), 1)
    cuts = [n * i // panels for i in range(panels + 1)]
    product = S.new_empty(S.size(0), n, n)
    for index, whole in enumerate(product):
        for top, bottom in zip(cuts[:-1], cuts[1:], strict=True):
            panel = whole[top:bottom, :bottom]
            if plus is None:
                torch.mm(S[index, top:bottom], T[index, :, :bottom], out=panel)
                panel.mul_(alpha) if alpha != 1 else None
            else:
                torch.addmm(
                    plus[index, top:bottom, :bottom],
                    S[index, top:bottom],
                    T[index, :, :bottom],
                    beta=beta,
                    alpha=alpha,
                    out=panel,
                )
            whole[:top, top:bottom] = panel[:, :top].mT
    return product
