# SPDX-License-Identifier: Apache-2.0
"""Whether a model multiplies by the matrices of experts that the optimizer works on."""

from collections.abc import Callable, Iterator

import torch
from side_by_side import normal
from torch import nn

from emerging_optimizers.adaptive_muon import ColumnBlocks


def parts_of(p: torch.Tensor) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """For each expert its number and views of its matrices, (out, in), as the optimizer works on them."""
    blocks = getattr(p, "muon_parts", None)
    assert not isinstance(blocks, ColumnBlocks)
    for number, stored in enumerate(p.data):
        matrix = stored.mT if getattr(p, "muon_transposed", False) else stored
        sizes = blocks or (len(matrix),)
        period = sum(sizes)
        starts = [sum(sizes[:part]) for part in range(len(sizes))]
        assert sizes in ((1, 1), (len(matrix) // 2,) * 2, (len(matrix),))
        yield (
            number,
            [
                matrix[start::period] if period == 2 else matrix[start : start + size]
                for start, size in zip(starts, sizes, strict=True)
            ],
        )


def check_matrices(
    module: nn.Module,
    up: torch.Tensor,
    down: torch.Tensor,
    run: Callable[[], object],
    *,
    rtol: float = 1e-6,
    atol: float = 1e-9,
) -> None:
    """The forward of experts decides. A row of a projection down changes one output only.

    A row of a gate or an up projection changes the output along one column of the projection down: of the up projection in
    proportion, of the gate not.

    Args:
        module: The experts.
        up: Their projections up, perhaps with their gates.
        down: Their projections down.
        run: Calls the experts with the same inputs at every call.
        rtol: How exactly a change of the output is in proportion to that of a row.
        atol: What counts as zero.
    """
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output))

    def change_of(row: torch.Tensor, times: int) -> torch.Tensor:
        """How the output changes with a row."""
        outputs = []
        kept = row.clone()
        for factor in (0, times):
            row.copy_(kept + factor * 0.01 * normal(tuple(row.shape), 5).to(row.dtype))
            seen.clear()
            run()
            outputs.append(seen[0].reshape(-1, seen[0].size(-1)))
        row.copy_(kept)
        return outputs[1] - outputs[0]

    hit = 0
    last = dict(parts_of(down))
    for number, matrices in parts_of(up):
        if number not in last:
            continue  # LongCat has rows for experts that do nothing
        [of_down] = last[number]
        change = change_of(of_down[3], 1).abs()
        hit += bool(change.max() > atol)
        assert change[:, torch.arange(change.size(1)) != 3].max() <= atol
        for part, matrix in enumerate(matrices):
            once, twice = change_of(matrix[5], 1), change_of(matrix[5], 2)
            along = of_down[:, 5] / of_down[:, 5].norm()
            assert (once - torch.outer(once @ along, along)).abs().max() <= 1e-4 * once.abs().max()
            is_linear = torch.allclose(twice, 2 * once, rtol=rtol, atol=atol)
            assert once.abs().max() <= atol or is_linear is (part == 1), (number, part)
    assert hit > 0
