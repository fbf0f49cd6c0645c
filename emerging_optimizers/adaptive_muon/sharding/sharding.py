# SPDX-License-Identifier: Apache-2.0
"""The logical matrices of all parameters of an optimizer, and what the ranks that hold them in shards compare."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, override

import torch
from absl import logging
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.identity import identity
from emerging_optimizers.adaptive_muon.parameters import parameter_name
from emerging_optimizers.adaptive_muon.sharding.agreement import gather_from_all, require_agreement, union
from emerging_optimizers.adaptive_muon.sharding.comparison import Comparison, Flag, require_equal_replicas
from emerging_optimizers.adaptive_muon.sharding.dtensor import as_matrices, offset_of
from emerging_optimizers.adaptive_muon.sharding.layout import (
    Layout,
    PartOfStack,
    Piece,
    ReplicaPiece,
    ShardedLayout,
    Split,
)
from emerging_optimizers.adaptive_muon.sharding.matrices import (
    Matrix,
    ShardInfo,
    shard_info,
    sharded_matrices,
    whole_matrices,
)
from emerging_optimizers.adaptive_muon.sharding.rules import Rules


__all__ = ["Sharding"]

# The attributes that say how a parameter is sharded, and which matrices it holds.
_TAGS = ("partition_dim", "muon_blocks", "muon_form", "muon_parts", "muon_stacked", "muon_transposed")

Key = tuple[int, str]


class Found(NamedTuple):
    """A parameter that is to be resolved."""

    p: torch.Tensor
    name: str
    group: int  # the number of its parameter group
    split: Layout | Split | Piece
    replicas: ProcessGroup | None  # the ranks with the same shard, if it is no DTensor
    shares: bool  # whether replicas share the work
    blocks: Any

    @property
    def holders(self) -> ProcessGroup | None:
        """The ranks with shards of this rank's replica; None where it is whole."""
        return None if isinstance(self.split, Layout) else self.split.group

    @property
    def compared_by(self) -> ProcessGroup | None:
        """The ranks that compare it, beside its replicas; None where only those of the option tp_group do, if any."""
        return self.split.group if isinstance(self.split, PartOfStack) else self.holders

    def first(self, infos: Mapping[tuple[torch.Tensor, ProcessGroup], Sequence[ShardInfo]]) -> int:
        """Return the number of this rank's first matrix in the whole stack, given what each rank has sent."""
        if not isinstance(self.split, PartOfStack):
            return offset_of(self.p)[0] if as_matrices(self.p).ndim > 2 else 0
        group = self.split.group
        return sum(info.local[0] for info in infos[self.p, group][: group.rank()])

    @property
    def info(self) -> ShardInfo:
        """What to send to other ranks about it."""
        return shard_info(self.p, self.name, self.group, self.split, self.blocks, self.replicas)


class Sharding:
    """The registry of the logical matrices of an optimizer's parameters.

    ``rules`` find how a parameter is split. ``synced_options`` must be the same on all ranks.
    """

    def __init__(self, rules: Rules, synced_options: Mapping[str, Any]) -> None:
        self.rules, self._synced_options = rules, dict(synced_options)
        # The identities keep no parameter alive that has left the groups.
        self._known: dict[Key, tuple[torch.Size, tuple[Matrix, ...]]] = {}
        self._comparison = Comparison()
        self._to_compare: set[Key] = set()  # parameters whose replicas have not been compared

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sharding":
        """Return a registry for a copy of the optimizer, with the same process groups. :meth:`adopt` fills it."""
        return Sharding(self.rules, self._synced_options)

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle stores, which is the options; :meth:`resolve` finds the matrices again."""
        require(
            not any(isinstance(matrix.layout, ShardedLayout) for _, known in self._known.values() for matrix in known),
            "an optimizer must hold whole matrices to be pickled",
            "parameters that a process group holds together",
            "Save its state_dict(), and make a new optimizer.",
        )
        return {**vars(self), "_known": {}, "_comparison": Comparison(), "_to_compare": set()}

    def adopt(self, copy: torch.Tensor, p: torch.Tensor, known_by: "Sharding") -> None:
        """Take over what another registry has for a parameter, for a copy that torch made, which lacks attributes."""
        vars(copy).update({name: getattr(p, name) for name in _TAGS if hasattr(p, name)})
        if known_by._knows(p):
            self._known[identity(copy)] = known_by._known[identity(p)]

    def check(self, group: dict[str, Any]) -> None:
        """Raise a ``ValueError`` if a parameter group's sharding is wrong, as far as this process can find out alone."""
        for p, name in _named([group], lambda p: True):
            split = self.rules.split(p, name)
            self.rules.replicas(p, split, name)
            if isinstance(split, Layout):
                whole_matrices(p, name, self.rules.blocks(p))

    def replicas_of(self, p: torch.Tensor) -> int:
        """Return how many replicas share the work on a parameter, which :meth:`resolve` need not have seen."""
        split = self.rules.split(p, "a parameter")
        if not self.rules.shares(split):
            return 1
        replicas = self.rules.replicas(p, split, "a parameter")
        if isinstance(split, ReplicaPiece):
            return split.replicas
        return 1 if replicas is None else replicas.size()

    def matrices(self, p: torch.Tensor) -> tuple[Matrix, ...]:
        """Return the logical matrices of a parameter that :meth:`resolve` has seen."""
        return self._known[identity(p)][1]

    def is_empty(self, p: torch.Tensor) -> bool:
        """Return whether a parameter has no elements, neither here nor on the other ranks that hold it."""
        local, layout = as_matrices(p), self.matrices(p)[0].layout
        return 0 in (*local.shape[:-2], *layout.shape(local))

    @property
    def has_to_compare(self) -> bool:
        """Whether ranks have exchanged shard infos since :meth:`compare_gradients`, which all of them then call."""
        return self._comparison.is_due

    def compare_gradients(self, param_groups: list[dict[str, Any]]) -> None:
        """Raise a ``ValueError`` unless all ranks that hold a parameter's shards have a gradient of it, or none has.

        A rank compares only if its gradients of the group's parameters have come or gone since the last comparison, and if
        all other ranks compare then too: see :meth:`Comparison.compare`. Gradients of other groups, and of whole parameters,
        may come and go on some ranks only.
        """
        self._comparison.compare(self.by_group(param_groups))

    def by_group(self, param_groups: list[dict[str, Any]]) -> dict[ProcessGroup, dict[torch.Tensor, str]]:
        """Return the parameters that are in shards, with their names in errors, by the process group that holds them."""
        names = dict(_named(param_groups, self._knows))
        return {group: {p: names[p] for p in params} for group, params in self._by_group(names).items()}

    def has_changed(self, group: ProcessGroup | None) -> bool:
        """Return whether this rank's gradients are others than its process group agreed about: it has to knock."""
        return group in self._comparison.changed

    def awaits_comparison(self, p: torch.Tensor) -> bool:
        """Return whether the process group that holds a parameter is one in which this rank has to knock."""
        layout = self.matrices(p)[0].layout
        return isinstance(layout, ShardedLayout) and self.has_changed(layout.group)

    def agreed(self, group: ProcessGroup, param_groups: list[dict[str, Any]]) -> set[torch.Tensor]:
        """Return the parameters that had a gradient when a process group last agreed; none if one of them is gone."""
        return {p for p in self._comparison.agreed(group, self.by_group(param_groups)[group]) if not self.is_empty(p)}

    def agree(self, group: ProcessGroup, param_groups: list[dict[str, Any]]) -> None:
        """Compare gradients with the other ranks of a process group: see :meth:`Comparison.agree`."""
        self._comparison.agree(group, self.by_group(param_groups)[group])

    def flag(self, group: ProcessGroup | None, param_groups: list[dict[str, Any]]) -> Flag | None:
        """Return what this rank adds to its first message of a step in a process group; None where it sends none."""
        return None if group is None else self._comparison.flag(group, lambda: self.by_group(param_groups)[group])

    def check_last_step(self, param_groups: list[dict[str, Any]]) -> None:
        """Raise a ``ValueError`` if the last step is found to have been wrong: :meth:`Comparison.check_last_step`."""
        self._comparison.check_last_step(lambda: self.by_group(param_groups))

    def compare_replicas(self, params: Collection[torch.Tensor], param_groups: list[dict[str, Any]]) -> None:
        """Raise a ``ValueError`` unless parameters have the same bits on all of their replicas; done once for each.

        Replicas that differ would all get the update of one. All ranks that hold the parameters must call.
        """
        if not self._to_compare:
            return
        chosen = {p for p in params if identity(p) in self._to_compare and not self.awaits_comparison(p)}
        if not chosen:
            return
        names = {p: name for p, name in _named(param_groups, chosen.__contains__)}
        for group, of_group in self._by_group(names).items():
            # Of a block, ranks with different shards of the parameter may have equal, empty ones.
            shards = {p: tuple(layout.own for layout in self._layouts(p)) for p in of_group}
            require_equal_replicas(group, {names[p]: (shards[p], as_matrices(p)) for p in of_group})
        self._to_compare.difference_update(map(identity, chosen))

    def all_zero(self, gradients: Mapping[torch.Tensor, torch.Tensor]) -> set[torch.Tensor]:
        """Return the parameters whose gradient, of which each rank passes its own, is zero on all ranks with shards.

        This is one small exchange for each process group that holds some of the parameters in shards. All of its ranks
        must pass these parameters in the same order. Values are read from the device.
        """
        zero = {
            p
            for p, gradient in gradients.items()
            if not any(bool(matrix.of(as_matrices(p, gradient)).any()) for matrix in self.matrices(p))
        }
        for group, params in self._by_group(gradients).items():
            gathered = gather_from_all(group, [p in zero for p in params], "which gradients are zero")
            zero.difference_update(p for p, *flags in zip(params, *gathered, strict=True) if not all(flags))
        return zero

    def resolve(self, param_groups: list[dict[str, Any]]) -> None:
        """Find the matrices of all parameters that are new or have changed their shape.

        This is one small exchange for each process group that holds some of these parameters in shards.

        Raises:
            ValueError: If ranks disagree, or shards or blocks do not fit together.
            RuntimeError: If a rank does not answer.
        """
        present = {identity(p) for group in param_groups for p in group["params"]}
        self._known = {key: known for key, known in self._known.items() if key in present}
        new = [*_named(param_groups, lambda p: not self._knows(p))]
        if not new:
            return
        numbers = {p: number for number, group in enumerate(param_groups) for p in group["params"]}
        found = []
        for p, name in new:
            split = self.rules.split(p, name)
            replicas, shares = self.rules.replicas(p, split, name), self.rules.shares(split)
            found.append(Found(p, name, numbers[p], split, replicas, shares, self.rules.blocks(p)))
        for p, matrices in self._resolved(found).items():
            self._known[identity(p)] = as_matrices(p).shape, matrices
        shared = {p: layout.number_of_replicas for p, _ in new for layout in self._layouts(p)[:1] if layout.replicas}
        self._to_compare.update(map(identity, shared))
        for of_replicas, number in Counter(shared.values()).items():
            logging.info("adaptive_muon: %d parameters are shared by %d replicas", number, of_replicas)

    def _resolved(self, found: Sequence[Found]) -> dict[torch.Tensor, tuple[Matrix, ...]]:
        """Return the matrices of parameters, which the ranks that hold them have compared."""
        tp_group = self.rules.tp_group
        comparing: dict[ProcessGroup, list[Found]] = {} if tp_group is None else {tp_group: []}
        for one in found:
            # A parameter that is whole for one rank may be a shard for another: the ranks of tp_group compare all.
            for group in (one.compared_by or tp_group, one.replicas):
                if group is not None:
                    comparing.setdefault(group, []).append(one)
        infos: dict[tuple[torch.Tensor, ProcessGroup], list[ShardInfo]] = {}
        failure = ""  # is told in the other groups too, whose ranks would wait else
        for group, params in comparing.items():
            try:
                infos |= self._exchanged(group, params, failure)
            except ValueError as error:
                failure = str(error)
        if failure:
            raise ValueError(failure)
        # Only now do all ranks that hold a parameter agree how, and whether replicas share the work.
        groups = {one.p: self._group(one) for one in found}
        together: dict[ProcessGroup, list[Found]] = {}
        for one in found:
            group = groups[one.p]
            if group is not None and (one.p, group) not in infos:
                together.setdefault(group, []).append(one)
        for group, params in together.items():
            infos |= self._exchanged(group, params)
        return {
            p: whole_matrices(p, one.name, one.blocks, one.first(infos))
            if group is None
            else sharded_matrices(
                *(p, one.name, group, infos[p, group], self.rules.mode, one.replicas if one.shares else None),
                first=one.first(infos),
            )
            for one, (p, group) in zip(found, groups.items(), strict=True)
        }

    def _group(self, one: Found) -> ProcessGroup | None:
        """Return the group that holds a parameter together; None where this rank has all of it by itself."""
        if isinstance(one.split, ReplicaPiece) and not one.shares:
            return one.split.shards
        if one.replicas is None or not one.shares or (one.holders is not None and self.rules.mode is None):
            return one.holders
        if one.holders is None:
            return one.replicas
        return union(one.replicas, one.holders)

    def _exchanged(
        self, group: ProcessGroup, params: Sequence[Found], failure: str = ""
    ) -> dict[tuple[torch.Tensor, ProcessGroup], list[ShardInfo]]:
        """Exchange shard infos of parameters, or a failure, in a process group, and return the infos of all its ranks."""
        own = (
            failure,
            [f"{name}={value!r}" for name, value in self._synced_options.items()],
            [one.info for one in params],
        )
        failures, options, infos = zip(*gather_from_all(group, own, "its shards of the parameters"), strict=True)
        self._comparison.forget(group)
        if any(failures):
            raise ValueError(next(filter(None, failures)))
        require_agreement([*options], "options of the optimizer", "Configure all ranks in the same way.")
        require_agreement(
            [[info.common() for info in of_rank] for of_rank in infos],
            "parameters, in their order, and their shapes except for a split dimension (*)",
            "Give every rank its shard of the same matrices. Set partition_dim to -1 for a whole matrix.",
        )
        return {(one.p, group): list(of_ranks) for one, *of_ranks in zip(params, *infos, strict=True)}

    def _layouts(self, p: torch.Tensor) -> list[ShardedLayout]:
        """Return the layouts of a parameter's matrices; empty where this rank has whole matrices by itself."""
        layouts = [matrix.layout for matrix in self.matrices(p)]
        return [layout for layout in layouts if isinstance(layout, ShardedLayout)]

    def _by_group(self, params: Mapping[torch.Tensor, Any]) -> dict[ProcessGroup, list[torch.Tensor]]:
        """Return the parameters that are in shards, by the process group that holds them."""
        by_group: dict[ProcessGroup, list[torch.Tensor]] = {}
        for p in params:
            for layout in self._layouts(p)[:1]:
                by_group.setdefault(layout.group, []).append(p)
        return by_group

    def _knows(self, p: torch.Tensor) -> bool:
        """Return whether the matrices of a parameter are known, and its shape is still the same."""
        known = self._known.get(identity(p))
        return known is not None and known[0] == as_matrices(p).shape


def _named(
    param_groups: list[dict[str, Any]], wanted: Callable[[torch.Tensor], bool]
) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield parameters that are wanted and have a shape, and their names in errors."""
    for group in param_groups:
        for index, p in enumerate(group["params"]):
            if not is_lazy(p) and wanted(p):
                yield p, parameter_name(group, index)
