# SPDX-License-Identifier: Apache-2.0
"""Whole matrices, this rank's pieces of them, and a walk of both side by side."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from side_by_side import smooth
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, Piece
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.update import BatchUpdate


# Wide, tall, square, tall as a whole but wide in four strips of rows, the reverse, strips that differ in size, and
# more ranks than rows or columns.
SHAPES = [(24, 64), (64, 24), (32, 32), (48, 40), (40, 48), (30, 17), (3, 18), (18, 3)]
OPTIONS: dict[str, Any] = {"lr": 0.05, "fp32_matmul_prec": "highest", "nesterov": True, "extra_scale_factor": 0.2}


def options_of(method: str = "adamuon") -> dict[str, Any]:
    """Returns the options with which whole and sharded matrices are compared."""
    return {**OPTIONS, "moment2_method": method, **smooth(method)}


@dataclass(eq=False)
class Pair:
    """A whole matrix, this rank's piece of it, and how to cut the piece out of anything that lies like the whole."""

    whole: nn.Parameter
    piece: nn.Parameter
    cut: Callable[[torch.Tensor], torch.Tensor]


def strip(whole: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's strip of a tensor, by torch's rule for uneven ones; all of it if its size is 1."""
    return whole if whole.size(dim) == 1 else whole.tensor_split(dist.get_world_size(), dim)[dist.get_rank()]


def strips(shapes: Sequence[tuple[int, ...]] = SHAPES, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> list[Pair]:
    """Matrices split by rows, by columns and not at all, as tensor parallelism tags them."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for index, (shape, dim) in enumerate((shape, dim) for shape in shapes for dim in (0, 1, -1)):
        whole = torch.randn(shape, generator=generator).to(dtypes[index % len(dtypes)])
        cut = (lambda t: t) if dim == -1 else (lambda t, dim=dim: t if t.ndim == 1 else strip(t, dim))
        piece = nn.Parameter(cut(whole).clone())
        piece.partition_dim = dim  # type: ignore[attr-defined]
        pairs.append(Pair(nn.Parameter(whole), piece, cut))
    return pairs


def fused_layers(count: int) -> list[Pair]:
    """Fused matrices in strips: of each block some ranks hold adjacent rows, and some rows far apart; or columns."""
    sizes = {4: [4, 8, 8, 4], 2: [4, 20], 1: [24]}[dist.get_world_size()]
    pairs = []
    for index in range(count):
        dim = index % 2
        whole = torch.randn(*((5, 24) if dim else (24, 5)))
        pair = Pair(
            nn.Parameter(whole),
            nn.Parameter(whole.split(sizes, dim)[dist.get_rank()].clone()),
            lambda t, dim=dim: t if t.ndim == 1 or t.size(dim) != 24 else t.split(sizes, dim)[dist.get_rank()],
        )
        pair.piece.partition_dim = dim  # type: ignore[attr-defined]
        for p in (pair.whole, pair.piece):
            p.muon_blocks = ColumnBlocks((2, 1, 1)) if dim else (2, 1, 1)  # type: ignore[attr-defined]
        pairs.append(pair)
    return pairs


def grid(shape: tuple[int, int], group: ProcessGroup) -> tuple[Pair, Piece]:
    """A matrix in 2 x 2 pieces on four ranks, in two columns on two."""
    rows, columns = {4: (2, 2), 2: (1, 2), 1: (1, 1)}[dist.get_world_size()]
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    i, j = divmod(dist.get_rank(), columns)
    top, left = shape[0] * i // rows, shape[1] * j // columns
    bottom, right = shape[0] * (i + 1) // rows, shape[1] * (j + 1) // columns

    def cut(t: torch.Tensor) -> torch.Tensor:
        t = t if t.ndim == 1 or t.size(-2) == 1 else t[top:bottom]
        return t if t.ndim == 1 or t.size(-1) == 1 else t[:, left:right]

    pair = Pair(nn.Parameter(whole), nn.Parameter(cut(whole).clone()), cut)
    return pair, Piece(group, shape, (top, bottom, left, right))


def stack(dim: int) -> Pair:
    """Five experts and this rank's part of them: experts, rows or columns."""
    whole = torch.randn(5, 12, 20, generator=torch.Generator().manual_seed(3))

    def cut(t: torch.Tensor) -> torch.Tensor:
        return t if t.ndim == 1 or (dim > 0 and t.ndim < 3) or t.size(dim) == 1 else strip(t, dim)

    pair = Pair(nn.Parameter(whole), nn.Parameter(cut(whole).clone()), cut)
    pair.piece.partition_dim = dim  # type: ignore[attr-defined]
    for p in (pair.whole, pair.piece):
        p.muon_stacked = True  # type: ignore[attr-defined]
    return pair


def set_gradients(pairs: list[Pair], step: int) -> None:
    """Random gradients for the whole matrices, and the pieces of them: nearly of low rank, some columns larger."""
    generator = torch.Generator().manual_seed(100 + step)
    for pair in pairs:
        *stack, rows, columns = pair.whole.shape
        low = torch.randn(*stack, rows, 4, generator=generator) @ torch.randn(*stack, 4, columns, generator=generator)
        grad = (low + 0.1 * torch.randn(*stack, rows, columns, generator=generator)) * torch.linspace(0.1, 3, columns)
        pair.whole.grad = grad.to(pair.whole.dtype)
        pair.piece.grad = pair.cut(pair.whole.grad).clone()


class Recording(AdaptiveMuon):
    """Keeps the last orthogonalized momentum of every matrix, and all sums of squares of the last step."""

    def step(self, closure: Any = None) -> Any:
        self.orthogonalized: dict[tuple[torch.Tensor, int | None], torch.Tensor] = {}
        self.sums: list[torch.Tensor] = []
        finish = BatchUpdate.finish

        def recorded(update: BatchUpdate, results: Any) -> None:
            for batch, (O, squares) in zip(update.batches, results, strict=True):
                self.sums += squares
                for matrix, place, of_p in zip(batch.matrices, batch.places, O, strict=True):
                    self.orthogonalized[update.params[place], matrix.block] = of_p.clone()
            finish(update, results)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BatchUpdate, "finish", recorded)
            return super().step(closure)


def walk(pairs: list[Pair], steps: int = 4, same: dict[str, Any] | None = None, **of_pieces: Any) -> dict[str, float]:
    """Optimizes the whole matrices and the pieces, and returns how far apart they came.

    Args:
        pairs: The matrices.
        steps: How many steps.
        same: Options of both optimizers.
        **of_pieces: Options of the pieces' optimizer.

    Returns:
        For O, W and the names of the state's buffers, the largest difference relative to the largest element.
    """
    same = same or {}
    options = {**options_of(same.get("moment2_method", "adamuon")), **same}
    whole = Recording([pair.whole for pair in pairs], **options)
    pieces = Recording([pair.piece for pair in pairs], **options, **of_pieces)
    seen: Counter[str] = Counter()

    def see(key: str, one: torch.Tensor, other: torch.Tensor) -> None:
        seen[key] = max(seen[key], difference(one, other))  # type: ignore[assignment]

    for step in range(steps):
        set_gradients(pairs, step)
        whole.step()
        pieces.step()
        for pair in pairs:
            see("W", pair.piece.detach(), pair.cut(pair.whole.detach()))
            for key, value in whole.state[pair.whole].items():
                see(key, pieces.state[pair.piece][key], held_of(value, key, pair))
            if pair.piece.numel() and not hasattr(pair.whole, "muon_blocks"):
                see("O", pieces.orthogonalized[pair.piece, None], pair.cut(whole.orthogonalized[pair.whole, None]))
    return dict(seen)


def held_of(value: torch.Tensor, key: str, pair: Pair) -> torch.Tensor:
    """What a rank has of a whole matrix's state: its shard, but V whole; of a stack split along experts its experts'."""
    is_vector = key.startswith("moment2_buffer") and value.shape != pair.whole.shape
    own_experts = pair.whole.ndim == 3 and pair.piece.size(0) != pair.whole.size(0)
    return value if key == "step" or (is_vector and not own_experts) else pair.cut(value)


def far_apart(seen: dict[str, float], method: str) -> dict[str, float]:
    """Returns what is further apart, in a result of :func:`walk`, than rounding explains.

    The pieces are worked on in stacks of other sizes than the whole matrices, and in other shapes. Bits are promised
    for the same operations on tensors of the same shapes and strides only. A last bit of the momentum, or of a product,
    is magnified by the iteration, up to 500 times. V of "adamuon" and "normuon" is made of the result. The weights move
    by a small part of it, but for "adamuon", which divides by its smallest elements.
    """
    reads_gradient = METHODS[method].reads_gradient
    most = {
        "W": 1e-4 if method == "adamuon" else 1e-6,
        "O": 2e-5,
        "momentum_buffer": 1e-6,
        "moment2_buffer": 1e-6 if reads_gradient else 2e-5,
        "step": 0.0,
    }
    # V of a block that has no entries a row has a number in its name.
    return {name: value for name, value in seen.items() if not value <= most[re.sub(r"_\d+$", "", name)]}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest element; 0 where there are none."""
    assert one.shape == other.shape, (one.shape, other.shape)
    if other.numel() == 0:
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def gathered(value: Any) -> list[Any]:
    """The values of all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class _Collectives(TorchDispatchMode):
    """Counts collectives by name. Torch's profiler would too, and take a hundred times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.seen.update([name] if name.startswith("c10d::") else [])
        return func(*args, **(kwargs or {}))


def collectives(function: Callable[[], object]) -> Counter[str]:
    """The collectives that torch saw in a call, by name."""
    with _Collectives() as mode:
        function()
    return mode.seen
