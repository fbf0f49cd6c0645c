# SPDX-License-Identifier: Apache-2.0
"""From parameters to logical matrices: which matrices a parameter holds, and who holds which piece of them."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from typing import Any, NamedTuple, override

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

from emerging_optimizers.adaptive_muon.checks import require, require_picklable, within
from emerging_optimizers.adaptive_muon.parameters import parameter_name
from emerging_optimizers.adaptive_muon.sharding.agreement import require_agreement, tell_all
from emerging_optimizers.adaptive_muon.sharding.blocks import row_blocks
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, is_dtensor, is_transposed, piece_of
from emerging_optimizers.adaptive_muon.sharding.layout import Layout, Piece, Rectangle, ShardedLayout, Split


__all__ = ["BlocksFn", "Held", "LayoutFn", "Matrix", "Sharding", "merge_blocks"]


LayoutFn = Callable[[torch.Tensor], Layout | Split | Piece | None]
BlocksFn = Callable[[torch.Tensor], Sequence[int] | None]
Key = tuple[int, int]


class Held(NamedTuple):
    """How a group holds a parameter: its row blocks, and the rows and columns that each rank has."""

    blocks: tuple[int, ...] | None
    pieces: tuple[tuple[int, int], ...]

    @property
    def largest(self) -> tuple[int, int]:
        """The largest piece."""
        return max(self.pieces, key=math.prod)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A logical matrix of a parameter: all of it, or the rows of one block.

    Args:
        layout: Who holds which piece of it.
        block: The number of the block; None where the parameter is one matrix.
        rows: The local rows of the parameter that belong to it, as a slice or as indices.
        held: Of a parameter in pieces, what all its ranks know alike and what decides how the pieces lie: its blocks,
            and the shape of each rank's piece with its padding.
    """

    layout: Layout
    block: int | None = None
    rows: slice | torch.Tensor = slice(None)
    held: Held | None = None

    @property
    def is_all(self) -> bool:
        """Whether all local rows of the parameter belong to it."""
        return isinstance(self.rows, slice) and self.rows == slice(None)

    @property
    def kind(self) -> Hashable:
        """What matrices of other parameters have in common with it that lie in them as it does, on every rank."""
        rows = self.rows if isinstance(self.rows, slice) else id(self.rows)
        return self.layout, self.block, rows if self.held is None else self.held

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the matrix's part of a tensor that lies like the parameter: a view where its rows are adjacent."""
        return tensor if self.is_all else tensor[..., self.rows, :]


def merge_blocks(matrices: Sequence[Matrix], parts: list[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Returns what was made for each matrix of a parameter as one tensor, broadcastable to the parameter.

    Args:
        matrices: The parameter's matrices.
        parts: A tensor for each of them, broadcastable to it.
        shape: The parameter's shape. Rows of padding, which belong to no matrix, are zero in the result.
    """
    if matrices[0].is_all:
        return parts[0]
    whole = parts[0].new_zeros(shape)
    for matrix, part in zip(matrices, parts, strict=True):
        whole[..., matrix.rows, :] = part
    return whole


class _Told(NamedTuple):
    """What a rank tells of its piece of a parameter. The first six must be the same on all ranks."""

    name: str
    group: int
    dtype: str
    stack: tuple[int, ...]
    blocks: Any
    split: int | tuple[int, int] | None  # the dimension of a Split, the whole shape of a Piece
    local: tuple[int, int]
    rectangle: tuple[int, int, int, int] | None

    def common(self) -> str:
        """What must be the same on all ranks, as text for an error."""
        shape: list[Any] = [*self.stack, *self.local]
        if isinstance(self.split, int):
            shape[self.split] = "*"
        elif self.split is not None:
            shape[-2:] = self.split
        elif self.stack:
            shape[0] = "*"  # whole matrices, of which ranks may hold different ones
        how = f" split along dim {len(shape) + self.split}" if isinstance(self.split, int) else ""
        return (
            f"{self.name}: ({', '.join(map(str, shape))}) {self.dtype}{how}"
            + (f" in blocks {self.blocks}" if self.blocks is not None else "")
            + (f" in group {self.group}" if self.group else "")
        )


class Sharding:
    """Knows the logical matrices of every parameter of an optimizer.

    Args:
        tp_group: The group over which a parameter with ``partition_dim`` 0 or 1 is split.
        mode: How matrices in pieces are orthogonalized; None takes pieces for matrices of their own.
        layout_fn: Says how a parameter is split, before its ``partition_dim`` and placements; or returns None.
        blocks_fn: Says the row blocks of a parameter, before its ``muon_blocks``; or returns None.
        alike: Options of the optimizer that must be the same on all ranks.

    Raises:
        ValueError: If an argument is not of its kind.
    """

    def __init__(
        self,
        tp_group: ProcessGroup | None,
        mode: Any,
        layout_fn: LayoutFn | None,
        blocks_fn: BlocksFn | None,
        alike: dict[str, Any],
    ) -> None:
        require(
            tp_group is None or isinstance(tp_group, ProcessGroup),
            "tp_group must be a torch.distributed.ProcessGroup that this process belongs to",
            tp_group,
            "pass what torch.distributed.new_group returned, or mesh.get_group(); None where nothing is split",
        )
        require(
            layout_fn is None or callable(layout_fn),
            "layout_fn must be a function of a parameter",
            layout_fn,
            "return a Layout, Split or Piece from it, or None for the usual rules",
        )
        require(
            blocks_fn is None or callable(blocks_fn),
            "blocks_fn must be a function of a parameter",
            blocks_fn,
            "or set muon_blocks on the fused parameters",
        )
        self._tp_group, self._mode, self._alike = tp_group, mode, alike
        self._layout_fn, self._blocks_fn = layout_fn, blocks_fn
        # By keys of parameters, which keep none alive that has left the groups.
        self._known: dict[Key, tuple[torch.Size, tuple[Matrix, ...]]] = {}
        # Of each group, the parameters that had a gradient when its ranks compared them; and groups that have yet to.
        self._compared: dict[ProcessGroup, list[Key]] = {}
        self._to_compare: set[ProcessGroup] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sharding":
        """Returns one for a copy of the optimizer, with the same process groups; :meth:`adopt` has it know the copies."""
        copy = Sharding(self._tp_group, self._mode, self._layout_fn, self._blocks_fn, self._alike)
        copy._to_compare = self._to_compare | self._compared.keys()
        return copy

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Returns what pickle carries: the options, or an error that names the one that cannot be carried."""
        for name in ("tp_group", "layout_fn", "blocks_fn"):
            require_picklable(name, getattr(self, f"_{name}"))
        require(
            not any(isinstance(matrix.layout, ShardedLayout) for _, known in self._known.values() for matrix in known),
            "an optimizer must hold whole matrices to be pickled",
            "parameters that a process group holds together",
            "save its state_dict(), and make the optimizer anew",
        )
        return {**vars(self), "_known": {}, "_compared": {}, "_to_compare": set()}

    def adopt(self, q: torch.Tensor, p: torch.Tensor, known_by: "Sharding") -> None:
        """Takes what another knows of a parameter for a copy of it."""
        if known_by._knows(p):
            self._known[_key(q)] = known_by._known[_key(p)]

    def check(self, group: dict[str, Any]) -> None:
        """Raises a ``ValueError`` if what this process alone can know of a parameter group's sharding is wrong."""
        named = list(_named([group], lambda p: True))
        for p, name in named:
            if isinstance(self._alone(p, name), Layout):
                self._whole(p, name)

    def matrices(self, p: torch.Tensor) -> tuple[Matrix, ...]:
        """Returns the logical matrices of a parameter that :meth:`resolve` has seen."""
        return self._known[_key(p)][1]

    def is_empty(self, p: torch.Tensor) -> bool:
        """Returns whether there is nothing to do for a parameter, neither here nor for the others that hold it."""
        local, layout = as_matrices(p), self.matrices(p)[0].layout
        return 0 in (*local.shape[:-2], *layout.shape(local))

    @property
    def has_to_compare(self) -> bool:
        """Whether a group has exchanged its pieces since :meth:`compare_gradients`, which all of its ranks do."""
        return bool(self._to_compare)

    def compare_gradients(self, param_groups: list[dict[str, Any]]) -> None:
        """Raises a ``ValueError`` unless the ranks that hold a parameter's pieces all have a gradient of it, or none.

        A process group is asked only when this rank's gradients of its parameters have come or gone since it was, so
        that those of other groups, and of whole parameters, may do so on some ranks only.

        Args:
            param_groups: The optimizer's groups.
        """
        of_group: dict[ProcessGroup, dict[torch.Tensor, str]] = {}
        for p, name in _named(param_groups, self._knows):
            layout = self.matrices(p)[0].layout
            if isinstance(layout, ShardedLayout):
                of_group.setdefault(layout.group, {})[p] = name
        for group, names in of_group.items():
            having = [_key(p) for p in names if p.grad is not None]
            if group in self._to_compare or having != self._compared.get(group, []):
                mine = [f"{name} has {'no' if p.grad is None else 'a'} gradient" for p, name in names.items()]
                require_agreement(
                    tell_all(group, mine, "which parameters have a gradient"),
                    "which parameters have a gradient",
                    "let every rank take part in the backward pass",
                )
                self._compared[group] = having
        self._to_compare.clear()

    def all_zero(self, gradients: Any) -> Any:
        from emerging_optimizers.adaptive_muon.sharding.agreement import tell_all

        zero, by_group = set(), {}
        for p, G in gradients.items():
            layout = self.matrices(p)[0].layout
            group = layout.group if isinstance(layout, ShardedLayout) else None
            by_group.setdefault(group, []).append((p, not bool(G.any())))
        for group, flags in by_group.items():
            flags_of_ranks = (
                [[f for _, f in flags]] if group is None else tell_all(group, [f for _, f in flags], "zero")
            )
            zero |= {p for (p, _), *all_flags in zip(flags, *flags_of_ranks) if all(all_flags)}
        return zero

    def resolve(self, param_groups: list[dict[str, Any]]) -> None:
        """Finds out the matrices of all parameters that are new or have changed their shape.

        Pieces of other ranks are asked for, in one small exchange for each process group that holds some; this is
        also where ranks that disagree find out.

        Args:
            param_groups: The optimizer's groups; the ranks of a process group must have the same.

        Raises:
            ValueError: If ranks disagree, or pieces or blocks do not fit together.
            RuntimeError: If a rank does not answer.
        """
        present = {_key(p) for group in param_groups for p in group["params"]}
        self._known = {key: known for key, known in self._known.items() if key in present}
        found = [(p, name, self._alone(p, name)) for p, name in _named(param_groups, lambda p: not self._knows(p))]
        if not found:
            return
        numbers = {p: number for number, group in enumerate(param_groups) for p in group["params"]}
        groups: dict[ProcessGroup, None] = dict.fromkeys([self._tp_group] if self._tp_group is not None else [])
        groups |= dict.fromkeys(spec.group for *_, spec in found if not isinstance(spec, Layout))
        known = {p: self._whole(p, name) for p, name, spec in found if isinstance(spec, Layout)}
        for group in groups:
            # A rank may take for whole what another takes for a piece: those of tp_group compare everything.
            whole_too = group is self._tp_group
            members = [
                each for each in found if (whole_too if isinstance(each[2], Layout) else each[2].group is group)
            ]
            mine = (
                [f"{name}={value!r}" for name, value in self._alike.items()],
                [self._tell(*each, numbers[each[0]]) for each in members],
            )
            told = tell_all(group, mine, "its pieces of the parameters")
            self._to_compare.add(group)
            require_agreement([alike for alike, _ in told], "options of the optimizer", "configure all ranks alike")
            require_agreement(
                [[each.common() for each in pieces] for _, pieces in told],
                "parameters, in their order, and their shapes but for a split dimension (*)",
                "give every rank its piece of the same matrices; partition_dim -1 is a whole matrix",
            )
            for (p, name, spec), *pieces in zip(members, *(pieces for _, pieces in told), strict=True):
                if not isinstance(spec, Layout):
                    known[p] = self._sharded(p, name, group, pieces)
        self._known.update({_key(p): (as_matrices(p).shape, matrices) for p, matrices in known.items()})

    def _knows(self, p: torch.Tensor) -> bool:
        """Whether the matrices of a parameter are known, and still those."""
        known = self._known.get(_key(p))
        return known is not None and known[0] == as_matrices(p).shape

    def _alone(self, p: torch.Tensor, name: str) -> Layout | Split | Piece:
        """How a parameter is split, as far as this process can know alone."""
        spec = _as_matrix(p, self._spec(p, name), name)
        if isinstance(spec, Layout) or (spec.group.size() == 1 and not getattr(spec, "padding", 0)):
            return Layout()
        if isinstance(spec, Split):
            require(
                spec.dim in range(p.ndim),
                f"the split dimension of {name} must be one of its {p.ndim}, counted from 0",
                spec.dim,
                "0 splits the rows of a matrix, 1 its columns",
            )
            return spec if spec.dim >= p.ndim - 2 else Layout()  # a stack of matrices, each of them whole
        local, (rows, columns) = tuple(as_matrices(p).shape[-2:]), Rectangle(*spec.rectangle).shape
        require(
            within(spec.padding, 0) and local == (rows + spec.padding, columns),
            f"the piece of {name} at hand must have the {rows} x {columns} of its rectangle and {spec.padding} rows of "
            "padding; it has the shape",
            local,
            "check the rectangle (top, bottom, left, right) and the padding",
        )
        return spec

    def _spec(self, p: torch.Tensor, name: str) -> Layout | Split | Piece:
        """How a parameter is split: by layout_fn, its placements, or its partition_dim."""
        spec = self._layout_fn(p) if self._layout_fn is not None else None
        if spec is not None:
            require(
                isinstance(spec, Layout | Split | Piece),
                f"layout_fn must return a Layout, Split, Piece or None; for {name} it returned",
                spec,
                "return None for the usual rules",
            )
            return spec
        if is_dtensor(p):
            spec = piece_of(p, name)
            require(
                self._mode is not None or isinstance(spec, Layout),
                f"the pieces of a DTensor are no matrices of their own; {name} is one, with tp_mode",
                "blockwise",
                'use the default, "layer_sharded"',
            )
            return spec
        dim = getattr(p, "partition_dim", -1)
        if dim is None or dim == -1:
            return Layout()
        require(
            isinstance(dim, int) and dim in range(p.ndim),
            f"partition_dim of {name} must be a dimension of it, or -1",
            dim,
            "0 splits the rows, 1 the columns, -1 says whole",
        )
        if self._tp_group is not None:
            return Split(self._tp_group, dim)
        require(
            not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1),
            f"a parameter with partition_dim is a piece of a matrix and needs tp_group; {name} has partition_dim",
            dim,
            "pass the tensor-parallel group, or set partition_dim to -1 if every rank holds all of it",
        )
        return Layout()

    def _blocks(self, p: torch.Tensor) -> Any:
        """The row sizes of a parameter's blocks, if it has any; they have not been checked yet."""
        blocks = self._blocks_fn(p) if self._blocks_fn is not None else None
        blocks = getattr(p, "muon_blocks", None) if blocks is None else blocks
        return tuple(blocks) if isinstance(blocks, Iterable) else blocks

    def _tell(self, p: torch.Tensor, name: str, spec: Layout | Split | Piece, number: int) -> _Told:
        """What to tell the other ranks of a parameter."""
        local = as_matrices(p).shape
        whole, rectangle = (spec.whole, spec.rectangle) if isinstance(spec, Piece) else (None, None)
        return _Told(
            name,
            number,
            str(p.dtype).removeprefix("torch."),
            tuple(local[:-2]),
            self._blocks(p),
            spec.dim - p.ndim if isinstance(spec, Split) else whole,
            (local[-2], local[-1]),
            rectangle,
        )

    def _whole(self, p: torch.Tensor, name: str) -> tuple[Matrix, ...]:
        """The matrices of a parameter that is held whole."""
        local, blocks = as_matrices(p), self._blocks(p)
        if blocks is None:
            return (Matrix(Layout()),)
        held = range(local.size(-2))
        return tuple(
            Matrix(Layout(), index, block.rows_at(held, local.device))
            for index, block in enumerate(row_blocks(blocks, len(held), name))
        )

    def _sharded(self, p: torch.Tensor, name: str, group: ProcessGroup, told: Sequence[_Told]) -> tuple[Matrix, ...]:
        """The matrices of a parameter of which all ranks have told their pieces."""
        whole, rectangles = _pieces(told)
        blocks, own = told[0].blocks, rectangles[group.rank()]
        # A piece that is taken for a matrix of its own is none of a group's.
        as_held = None if self._mode is None else Held(blocks, tuple(each.local for each in told))
        if blocks is None:
            rows = own.shape[0]
            unpadded = slice(None) if rows == as_matrices(p).size(-2) else slice(rows)
            return (Matrix(self._layout(group, whole, rectangles, name), rows=unpadded, held=as_held),)
        held = range(own.top, own.bottom)
        matrices = []
        for index, block in enumerate(row_blocks(blocks, whole[0], name)):
            cut = [
                Rectangle(block.rows_before(r.top), block.rows_before(r.bottom), r.left, r.right) for r in rectangles
            ]
            layout = self._layout(group, (block.rows_before(whole[0]), whole[1]), tuple(cut), f"a block of {name}")
            matrices.append(Matrix(layout, index, block.rows_at(held, p.device), as_held))
        return tuple(matrices)

    def _layout(
        self, group: ProcessGroup, whole: tuple[int, int], rectangles: tuple[Rectangle, ...], name: str
    ) -> Layout:
        """The layout of a matrix in pieces, unless the pieces are taken for matrices of their own."""
        if self._mode is None:
            return Layout()
        layout = ShardedLayout(group, group.rank(), whole, rectangles)
        self._mode.check(layout, name)
        return layout


_numbers = count()


def _key(p: torch.Tensor) -> Key:
    """Returns what no other parameter has nor will have: its ``id`` and a number that it is given.

    What is known of a parameter is kept by it. Unlike the parameter itself it keeps nothing alive, unlike a weak
    reference it lets ``torch.utils.swap_tensors`` work, and unlike the ``id`` alone it is never used again.
    """
    if not hasattr(p, "_muon_number"):
        p._muon_number = next(_numbers)  # type: ignore[attr-defined]
    number: int = p._muon_number  # type: ignore[attr-defined]
    return id(p), number


def _as_matrix(p: torch.Tensor, spec: Layout | Split | Piece, name: str) -> Layout | Split | Piece:
    """How the matrix (out, in) of a parameter is split, where the parameter may be stored (in, out)."""
    if not is_transposed(p) or isinstance(spec, Layout):
        return spec
    if isinstance(spec, Split):
        swapped = {p.ndim - 2: p.ndim - 1, p.ndim - 1: p.ndim - 2}
        return Split(spec.group, swapped.get(spec.dim, spec.dim))
    require(
        spec.padding == 0,
        f"a parameter tagged muon_transposed must not be padded; the padding of {name} is",
        spec.padding,
        "store its transpose, without the tag",
    )
    top, bottom, left, right = spec.rectangle
    return Piece(spec.group, spec.whole[::-1], (left, right, top, bottom))


def _pieces(told: Sequence[_Told]) -> tuple[tuple[int, int], tuple[Rectangle, ...]]:
    """The whole shape of a matrix and the pieces that the ranks hold."""
    split = told[0].split
    if isinstance(split, tuple):
        return split, tuple(Rectangle(*each.rectangle) for each in told if each.rectangle is not None)
    rows, columns = told[0].local
    strips = list(pairwise(accumulate((each.local[split or 0] for each in told), initial=0)))
    end = strips[-1][1]
    if split == -2:
        return (end, columns), tuple(Rectangle(start, stop, 0, columns) for start, stop in strips)
    return (rows, end), tuple(Rectangle(0, rows, start, stop) for start, stop in strips)


def _named(
    param_groups: list[dict[str, Any]], wanted: Callable[[torch.Tensor], bool]
) -> Iterator[tuple[torch.Tensor, str]]:
    """Parameters that are wanted and have a shape by now, and what errors call them."""
    for group in param_groups:
        for index, p in enumerate(group["params"]):
            if not is_lazy(p) and wanted(p):
                yield p, parameter_name(group, index)
