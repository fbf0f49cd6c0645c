# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core: AdaptiveMuon as Megatron's ``adaptive_muon``, with its configuration, layouts and checkpoints."""

import logging as standard_logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Unpack, override

import torch
from absl import logging
from megatron.core import package_info
from torch import distributed as dist
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon import AdaptiveMuon, TensorParallelModeT, WeightDecayMethodT
from emerging_optimizers.adaptive_muon.checks import require_known
from emerging_optimizers.adaptive_muon.integrations.megatron.arguments import from_command_line, from_config
from emerging_optimizers.adaptive_muon.integrations.megatron.diagnostics import ModelNames, write_diagnostics
from emerging_optimizers.adaptive_muon.integrations.megatron.layouts import (
    MegatronLayouts,
    qkv_split_shapes,
    replica_group_of,
    tag_qkv,
)
from emerging_optimizers.adaptive_muon.integrations.megatron.patterns import tag_patterns
from emerging_optimizers.adaptive_muon.integrations.megatron.routing import scalar_overrides
from emerging_optimizers.adaptive_muon.integrations.megatron.splits import log_once, log_splits
from emerging_optimizers.adaptive_muon.options import Options, OptionsDict, SplitOptions, options_of
from emerging_optimizers.adaptive_muon.state.full_shape import expand_v, reduce_v
from emerging_optimizers.adaptive_muon.versions import require_supported, upstream_version


__all__ = ["TensorParallelAdaptiveMuon", "register", "warn_of_blockwise"]

_SUPPORTED = (0, 18, 2), (0, 21, 0)

# What Megatron imports all at once, and does without all of if one is missing. "soap" is gone in emerging-optimizers 0.5.
_NEEDED = [
    f"emerging_optimizers.{name}"
    for name in ("registry", "orthogonalized_optimizers.muon_utils", "scalar_optimizers", "soap")
]


class TensorParallelAdaptiveMuon(AdaptiveMuon):
    """:class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon` with the constructor of Megatron's class of this name.

    It reads from Megatron's parameters how they are sharded and which are fused, and its ``state_dict`` has V in the
    shape of the parameter, as Megatron's checkpoints require; loading takes that and AdaptiveMuon's own.

    Args:
        params: Parameters or groups, as Megatron makes them: matrices of shape (out, in), or each rank's shard of them.
        lr, momentum, weight_decay: As AdaptiveMuon's. Their defaults are those of Megatron's class.
        nesterov: Whether to look ahead. Default True, as Megatron's class; its command line's default is False.
        use_decoupled_weight_decay: Whether weight decay is "decoupled" or, if not, "l2".
        split_qkv: Whether queries, keys and values of a fused attention weight are matrices of their own.
        is_qkv_fn: Returns whether a parameter is a fused attention weight. Default: its attribute ``is_qkv``.
        qkv_split_shapes: Rows of each block within one query group, for fused parameters without that attribute.
        pg_collection: Megatron's ``ProcessGroupCollection``. Without one every parameter must be whole.
        tp_mode: As AdaptiveMuon's. "blockwise", the default of Megatron 0.18 and 0.19, takes every tensor-parallel strip
            for a matrix of its own, and its result depends on the number of ranks.
        weight_decay_method: As AdaptiveMuon's. It overrides ``use_decoupled_weight_decay``.
        split_heads, split_gate_up: As :class:`~emerging_optimizers.adaptive_muon.options.SplitOptions`, for weights that
            :func:`tag_patterns` has tagged. After :func:`register`, those of Megatron's models are tagged.
        names: The names of the model's parameters, for diagnostics.
        **options: Further options of AdaptiveMuon, by name.

    Raises:
        ValueError: If an argument or a parameter breaks one of AdaptiveMuon's rules.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = Options.lr,
        momentum: float = Options.momentum,
        nesterov: bool = True,
        weight_decay: float = Options.weight_decay,
        use_decoupled_weight_decay: bool = True,
        split_qkv: bool = False,
        is_qkv_fn: Callable[[torch.Tensor], bool] | None = None,
        qkv_split_shapes: Sequence[int] | None = None,
        *,
        pg_collection: Any = None,
        tp_mode: TensorParallelModeT = Options.tp_mode,
        weight_decay_method: WeightDecayMethodT | None = None,
        split_heads: bool = SplitOptions.split_heads,
        split_gate_up: bool = SplitOptions.split_gate_up,
        names: ModelNames | None = None,
        **options: Any,
    ) -> None:
        blockwise, self._names = tp_mode == "blockwise", names
        self._blocks_of = pg_collection if blockwise else None  # the groups of which each shard is a matrix
        if blockwise:
            groups = [getattr(pg_collection, name, None) for name in ("tp", "expt_tp")]
            warn_of_blockwise(max(1 if group is None else group.size() for group in groups))
        layouts = MegatronLayouts(
            pg_collection,
            tensor_parallel=not blockwise,
            is_qkv=is_qkv_fn,
            qkv_split_shapes=qkv_split_shapes,
            switches=SplitOptions(split_qkv, split_heads, split_gate_up),
        )
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            nesterov=nesterov,
            weight_decay_method=weight_decay_method or ("decoupled" if use_decoupled_weight_decay else "l2"),
            # What GTP has cut is one matrix also for Megatron's blockwise mode.
            tp_mode="layer_sharded" if blockwise else tp_mode,
            layout_fn=layouts.layout,
            blocks_fn=layouts.blocks,
            **options,
        )
        self._put_rates_on_devices()
        if self.diagnostics_store is not None:
            self.register_step_post_hook(write_diagnostics)

    @override
    def named_matrices(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the matrices with their names in the model where Megatron has made the optimizer."""
        named = super().named_matrices()
        return named if self._names is None else self._names.replaced(named)

    @override
    def place_of_shard(self, p: torch.Tensor) -> int | None:
        """Return this rank's place in the tensor-parallel group of a parameter of which "blockwise" takes each shard apart."""
        group = getattr(self._blocks_of, "expt_tp" if getattr(p, "expert_tp", False) else "tp", None)
        is_shard = group is not None and group.size() > 1 and getattr(p, "partition_dim", -1) in (0, 1)
        return group.rank() if group is not None and is_shard else super().place_of_shard(p)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state, with ``moment2_buffer`` in the shape of its parameter: a view of V where V is smaller."""
        if self.state:  # else there is nothing to expand, and a rank may call alone
            self._sharding.resolve(self.param_groups)
        state_dict = super().state_dict()
        states = {key: expand_v(state_dict["state"][key], p, self.state_format) for key, p in self._by_key(state_dict)}
        return {**state_dict, "state": states}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, of AdaptiveMuon or of upstream's ``AdaptiveMuon``.

        Args:
            state_dict: What :meth:`state_dict` returned, on any number of ranks, in shards as the parameters are.

        Raises:
            ValueError: If the checkpoint does not fit, see
                :meth:`~emerging_optimizers.adaptive_muon.AdaptiveMuon.load_state_dict`. Nothing is changed.
        """
        self._sharding.resolve(self.param_groups)
        pairs, states = self._by_key(state_dict), dict(state_dict["state"])
        reduced = reduce_v([states[key] for key, _ in pairs], [p for _, p in pairs], self.state_format)
        states.update(zip((key for key, _ in pairs), reduced, strict=True))
        super().load_state_dict({**state_dict, "state": states})
        self._put_rates_on_devices()

    def _put_rates_on_devices(self) -> None:
        """Make each group's lr a tensor, if a CUDA graph may capture the step: Megatron's scheduler then fills it in place."""
        for group in self.param_groups if self.capturable else ():
            if group["params"]:
                group["lr"] = torch.as_tensor(
                    group["lr"], dtype=torch.float32, device=group["params"][0].device
                ).clone()

    def _by_key(self, state_dict: dict[str, Any]) -> list[tuple[Any, torch.Tensor]]:
        """Return the keys of a state dict under which there is state, and their parameters."""
        pairs = (
            pair
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False)
            for pair in zip(saved["params"], group["params"], strict=False)
        )
        return [(key, p) for key, p in pairs if state_dict["state"].get(key)]


@cache
def warn_of_blockwise(ranks: int) -> None:
    """Warn, once and on one rank, where the result depends on the number of tensor-parallel ranks."""
    if ranks > 1 and dist.get_rank() == 0:
        logging.warning(
            'adaptive_muon with tp_mode "blockwise" orthogonalizes every tensor-parallel strip as a matrix of its own: '
            "the result depends on the number of ranks (%d). --muon-tp-mode layer_sharded does not.",
            ranks,
        )


def register(**options: Unpack[OptionsDict]) -> None:
    """Make ``OptimizerConfig(optimizer="adaptive_muon")`` build :class:`TensorParallelAdaptiveMuon`.

    Routers, position embeddings, further output heads, matrices of a single row, and parameters with ``use_muon = False``
    go to Megatron's scalar optimizer. All fields about Muon and adaptive_muon of Megatron's ``OptimizerConfig`` reach the
    optimizer. Pass the options that it lacks. They override the fields, and the command line
    (:func:`add_adaptive_muon_args`). Calling again replaces the options of the last call.

    Args:
        **options: Options of :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon` that hold for all parameter
            groups, and ``split_heads`` and ``split_gate_up`` of
            :class:`~emerging_optimizers.adaptive_muon.options.SplitOptions`, by name. None leaves an option to the
            command line, if that was parsed, and else to its default.

    Raises:
        RuntimeError: If the installed megatron-core is not one of the supported versions, or could not import what it
            needs of emerging-optimizers.
        TypeError: If an option is unknown.
        ValueError: If a value breaks its option's rule.
    """
    _require_supported_version()
    # Versions without this module are rejected above, so it is imported here.
    from megatron.core.optimizer import emerging_optimizers

    _require_emerging_optimizers(emerging_optimizers)
    shared = {option.name: option for option in options_of(Options) if option.scope == "shared"}
    of_split = {option.name: option for option in options_of(SplitOptions) if option.flag}
    require_known(options, shared | of_split)
    chosen = {name: value for name, value in options.items() if value is not None}
    # The config decides what goes with the one; the other depends on the device, which is not set yet.
    alone = {"weight_decay_method", "use_syrk", *of_split} & chosen.keys()
    for name in alone:
        (shared | of_split)[name].check(chosen[name])
    Options.of(**{name: value for name, value in chosen.items() if name not in alone})

    def config_to_kwargs(config: Any, model_chunks: Sequence[Any], pg_collection: Any) -> dict[str, Any]:
        tag_qkv(model_chunks)
        tag_patterns(model_chunks)
        group = replica_group_of(config, model_chunks, pg_collection)
        arguments = {"replica_group": group, **from_config(config), **from_command_line(), **chosen}
        if group is not None and arguments.get("share_replicas", Options.share_replicas):
            log_once(
                standard_logging.INFO,
                "adaptive_muon: data-parallel ranks share the orthogonalization; --no-adaptive-muon-share-replicas to repeat",
            )
        arguments |= {"pg_collection": pg_collection, "qkv_split_shapes": qkv_split_shapes(model_chunks[0].config)}
        log_splits(model_chunks, arguments)
        return {**arguments, "names": ModelNames(model_chunks)}

    table = emerging_optimizers._EMERGING_OPTIMIZERS
    entry = table["adaptive_muon"]
    table["adaptive_muon"] = replace(
        entry,
        optimizer_cls=TensorParallelAdaptiveMuon,
        config_to_kwargs=config_to_kwargs,
        default_param_overrides=entry.default_param_overrides | scalar_overrides(),
    )


def _require_supported_version() -> None:
    """Raise a ``RuntimeError`` unless the installed megatron-core is supported."""
    require_supported("megatron-core", package_info.__shortversion__, _SUPPORTED, RuntimeError)


def _require_emerging_optimizers(of_megatron: ModuleType) -> None:
    """Raise a ``RuntimeError`` if Megatron's module of emerging optimizers has failed to import what it needs."""
    table = getattr(of_megatron, "_EMERGING_OPTIMIZERS", {})
    if getattr(of_megatron, "HAVE_EMERGING_OPTIMIZERS", False) and "adaptive_muon" in table:
        return
    reasons = []
    for name in _NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            reasons.append(f" ({error})")
    raise RuntimeError(
        f"megatron-core {package_info.__shortversion__} must find all that it imports of emerging-optimizers to build its "
        f"optimizers, got version {upstream_version()}{''.join(reasons[:1])}. "
        'Install "emerging-optimizers>=0.3,<0.5" and restart Python.'
    )
