# SPDX-License-Identifier: Apache-2.0
"""Named sets of matrices, and the least that any implementation has to do for one step on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ShapeSet:
    """The matrices of a model.

    Attributes:
        title: What they are.
        shapes: ``(rows, columns)`` of each.
    """

    title: str
    shapes: tuple[tuple[int, int], ...]

    def params(self, device: torch.device) -> list[torch.Tensor]:
        """Returns random parameters of these shapes with gradients."""
        generator = torch.Generator(device).manual_seed(0)
        params = []
        for shape in self.shapes:
            p = torch.nn.Parameter(torch.randn(shape, device=device, generator=generator))
            p.grad = torch.randn(shape, device=device, generator=generator)
            params.append(p)
        return params

    @property
    def elements(self) -> int:
        """How many numbers the matrices hold."""
        return sum(rows * columns for rows, columns in self.shapes)

    def flops(self, steps: int = 5) -> dict[str, int]:
        """Returns the operations of the products of an orthogonalization.

        For "standard" Newton-Schulz, and for the "floor": two steps at once on the Gram matrix wherever that is less,
        with half of every symmetric product.
        """
        standard = floor = 0
        for n, m in (sorted(shape) for shape in self.shapes):
            standard += steps * (4 * n * n * m + 2 * n**3)
            pairs, single = divmod(steps, 2)
            in_pairs = pairs * (3 * n * n * m + 5 * n**3) + single * (3 * n * n * m + n**3)
            floor += min(in_pairs, steps * (3 * n * n * m + n**3))
        return {"standard": standard, "floor": floor}

    def bytes(self) -> int:
        """Returns what two passes over float32 data move: G, M, M', and a 16-bit iterate; then O, W and W."""
        return 24 * self.elements


def _sets() -> dict[str, ShapeSet]:
    layer: Sequence[tuple[int, int]] = ((2304, 768), (768, 768), (3072, 768), (768, 3072))
    llama: Sequence[tuple[int, int]] = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    return {
        "gpt2": ShapeSet("GPT-2 124M, the 48 hidden matrices", tuple(layer) * 12),
        "gpt2-layer": ShapeSet("GPT-2 124M, one layer", tuple(layer)),
        "llama8b-layer": ShapeSet("Llama-8B, one layer", tuple(llama)),
        "48x256": ShapeSet("48 of 256 x 256", ((256, 256),) * 48),
        "200x64": ShapeSet("200 of 64 x 64", ((64, 64),) * 200),
    }


SETS = _sets()
