# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core: AdaptiveMuon as Megatron's ``adaptive_muon``, with its configuration, layouts and checkpoints."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_args, override

import torch
from absl import logging
from megatron.core import package_info
from megatron.core.optimizer import OptimizerConfig
from torch import distributed as dist
from torch.optim.optimizer import ParamsT

from emerging_optimizers.adaptive_muon import (
    AdaptiveMuon,
    Moment2MethodT,
    TensorParallelModeT,
    WeightDecayMethodT,
)
from emerging_optimizers.adaptive_muon.checks import require_one_of
from emerging_optimizers.adaptive_muon.integrations.megatron.layouts import (
    MegatronLayouts,
    qkv_split_shapes,
    tag_qkv,
)
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NSAlgorithmT
from emerging_optimizers.adaptive_muon.state.full_shape import expand_v, reduce_v
from emerging_optimizers.utils import FP32MatmulPrecT


__all__ = ["TensorParallelAdaptiveMuon", "add_adaptive_muon_args", "register"]

_SUPPORTED = (0, 18, 2), (0, 20, 0)

# Arguments of TensorParallelAdaptiveMuon and the fields of Megatron's OptimizerConfig they come from. Fields that the
# installed version lacks are passed over.
_FROM_CONFIG = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "use_decoupled_weight_decay": "decoupled_weight_decay",
    "momentum": "muon_momentum",
    "nesterov": "muon_nesterov",
    "split_qkv": "muon_split_qkv",
    "fp32_matmul_prec": "muon_fp32_matmul_prec",
    "coefficient_type": "muon_coefficient_type",
    "num_ns_steps": "muon_num_ns_steps",
    "scale_mode": "muon_scale_mode",
    "extra_scale_factor": "muon_extra_scale_factor",
    "tp_mode": "muon_tp_mode",
    "use_syrk": "muon_use_syrk",
    "moment2_method": "adaptive_muon_moment2_method",
    "beta2": "adaptive_muon_beta2",
    "eps": "adaptive_muon_eps",
}


class TensorParallelAdaptiveMuon(AdaptiveMuon):
    """:class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon` with the constructor of Megatron's class of this name.

    It reads from Megatron's parameters how they are sharded and which are fused, and its ``state_dict`` has V in the
    shape of the parameter, as Megatron's checkpoints require; loading takes that and AdaptiveMuon's own.

    Args:
        params: Parameters or parameter groups, as Megatron makes them: matrices of shape (out, in), each rank its piece.
        lr: Learning rate, >= 0. Default 3e-4, as Megatron's class.
        momentum: Decay rate of the momentum, in [0, 1).
        nesterov: Whether to look ahead. Default True, as Megatron's class; its command line's default is False.
        weight_decay: Weight decay coefficient, >= 0.
        use_decoupled_weight_decay: Whether weight decay is "decoupled" or, if not, "l2".
        split_qkv: Whether queries, keys and values of a fused attention weight are matrices of their own.
        is_qkv_fn: Says whether a parameter is a fused attention weight. Default: its attribute ``is_qkv``.
        qkv_split_shapes: Rows of each block within one query group, for fused parameters without that attribute.
        pg_collection: Megatron's ``ProcessGroupCollection``. Without one every parameter must be whole.
        tp_mode: "layer_sharded" (default), "duplicated" or "distributed": how a whole matrix is orthogonalized, see
            :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon`. "blockwise", Megatron's default, takes every
            tensor-parallel strip for a matrix of its own, and its result depends on the number of ranks.
        weight_decay_method: Instead of ``use_decoupled_weight_decay``, which it overrides: "decoupled",
            "independent", "l2", "palm" or "adaptive".
        **options: Further arguments of AdaptiveMuon: ``moment2_method``, ``beta2``, ``eps``, ``bias_correction``,
            ``namo_d_clamp``, ``fp32_matmul_prec``, ``coefficient_type``, ``num_ns_steps``, ``scale_mode``,
            ``ns_algorithm``, ``extra_scale_factor``, ``use_syrk``, ``max_bytes_in_flight``.

    Raises:
        ValueError: If an argument or a parameter breaks one of AdaptiveMuon's rules.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-4,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.01,
        use_decoupled_weight_decay: bool = True,
        split_qkv: bool = False,
        is_qkv_fn: Callable[[torch.Tensor], bool] | None = None,
        qkv_split_shapes: Sequence[int] | None = None,
        *,
        pg_collection: Any = None,
        tp_mode: TensorParallelModeT = "layer_sharded",
        weight_decay_method: WeightDecayMethodT | None = None,
        **options: Any,
    ) -> None:
        require_one_of("tp_mode", tp_mode, get_args(TensorParallelModeT))
        blockwise = tp_mode == "blockwise"
        if blockwise:
            _warn_of_blockwise(_tensor_parallel_size(pg_collection))
        layouts = MegatronLayouts(
            pg_collection,
            tensor_parallel=not blockwise,
            is_qkv=is_qkv_fn or _is_qkv,
            qkv_split_shapes=qkv_split_shapes,
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
            blocks_fn=layouts.blocks if split_qkv else None,
            **options,
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the state, with ``moment2_buffer`` in the shape of its parameter: a view of V where V is smaller."""
        self._sharding.resolve(self.param_groups)
        state_dict = super().state_dict()
        states = {key: expand_v(state_dict["state"][key], p, self.state_format) for key, p in self._by_key(state_dict)}
        return {**state_dict, "state": states}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, of AdaptiveMuon or of upstream's ``AdaptiveMuon``.

        Args:
            state_dict: What :meth:`state_dict` returned, on any number of ranks, cut as the parameters are.

        Raises:
            ValueError: If the checkpoint does not fit, see
                :meth:`~emerging_optimizers.adaptive_muon.AdaptiveMuon.load_state_dict`. Nothing is changed.
        """
        self._sharding.resolve(self.param_groups)
        keys, params = zip(*self._by_key(state_dict), strict=True) if self._by_key(state_dict) else ((), ())
        states = reduce_v([state_dict["state"][key] for key in keys], params, self.state_format)
        read = dict(zip(keys, states, strict=True))
        super().load_state_dict({**state_dict, "state": {**state_dict["state"], **read}})

    def _by_key(self, state_dict: dict[str, Any]) -> list[tuple[Any, torch.Tensor]]:
        """The keys of a state dict under which there is state, and their parameters."""
        pairs = (
            pair
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False)
            for pair in zip(saved["params"], group["params"], strict=False)
        )
        return [(key, p) for key, p in pairs if state_dict["state"].get(key)]


def register(
    *,
    tp_mode: TensorParallelModeT | None = None,
    weight_decay_method: WeightDecayMethodT | None = None,
    bias_correction: bool | None = None,
    namo_d_clamp: float | None = None,
    ns_algorithm: NSAlgorithmT | None = None,
    use_syrk: bool | None = None,
    max_bytes_in_flight: int | None = None,
) -> None:
    """Makes ``OptimizerConfig(optimizer="adaptive_muon")`` build :class:`TensorParallelAdaptiveMuon`.

    Everything that Megatron's ``OptimizerConfig`` says of Muon and of adaptive_muon reaches it; the arguments are what
    that cannot say, see :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon`. None leaves an option to the command
    line (:func:`add_adaptive_muon_args`), if that was parsed, and else to its default. Other values win over both the
    command line and the config. Calling again replaces the options of the last call.

    Args:
        tp_mode: Instead of the config's ``muon_tp_mode``: "layer_sharded", "duplicated", "distributed", "blockwise".
        weight_decay_method: Instead of the config's ``decoupled_weight_decay``: "decoupled", "independent", "l2",
            "palm", "adaptive".
        bias_correction: Whether D is corrected for the averages having started at zero.
        namo_d_clamp: c in (0, 1] of "namo_d".
        ns_algorithm: How Newton-Schulz iterations are computed: "standard", "gram" or "auto".
        use_syrk: Whether to use Triton kernels for symmetric products, see ``AdaptiveMuon``.
        max_bytes_in_flight: What a rank may send and receive at once, in bytes.

    Raises:
        RuntimeError: If the installed megatron-core is not one of the supported versions.
    """
    version = package_info.MAJOR, package_info.MINOR, package_info.PATCH
    low, high = _SUPPORTED
    if not low <= version < high:
        raise RuntimeError(
            f"megatron-core must be >= {_dotted(low)} and < {_dotted(high)}, got {package_info.__shortversion__}: "
            f'install "megatron-core>={_dotted(low)},<{_dotted(high)}"'
        )
    # Versions without this module are refused above, so it is imported here.
    from megatron.core.optimizer import emerging_optimizers

    given = {
        "tp_mode": tp_mode,
        "weight_decay_method": weight_decay_method,
        "bias_correction": bias_correction,
        "namo_d_clamp": namo_d_clamp,
        "ns_algorithm": ns_algorithm,
        "use_syrk": use_syrk,
        "max_bytes_in_flight": max_bytes_in_flight,
    }
    options = {name: value for name, value in given.items() if value is not None}

    def config_to_kwargs(config: Any, model_chunks: Sequence[Any], pg_collection: Any) -> dict[str, Any]:
        tag_qkv(model_chunks)
        return {
            **{name: getattr(config, field) for name, field in _FROM_CONFIG.items() if hasattr(config, field)},
            **_from_command_line(given),
            **options,
            "pg_collection": pg_collection,
            "qkv_split_shapes": qkv_split_shapes(model_chunks[0].config),
        }

    table = emerging_optimizers._EMERGING_OPTIMIZERS
    table["adaptive_muon"] = replace(
        table["adaptive_muon"], optimizer_cls=TensorParallelAdaptiveMuon, config_to_kwargs=config_to_kwargs
    )


def add_adaptive_muon_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags that Megatron lacks for adaptive_muon, for ``extra_args_provider``; see the documentation's table.

    Where ``--optimizer adaptive_muon`` is on the command line, the default of ``--muon-tp-mode`` becomes
    "layer_sharded". Flags that the parser has already are left as they are.

    Args:
        parser: Megatron's parser.

    Returns:
        The same parser.
    """
    known = parser._option_string_actions  # argparse has no public way to look up or to widen a flag
    group = parser.add_argument_group(title="adaptive muon")
    defaults = {field.name: field.default for field in fields(OptimizerConfig)}

    def add(name: str, text: str, **options: Any) -> None:
        flag = "--adaptive-muon-" + name.replace("_", "-")
        if flag not in known:
            group.add_argument(flag, help=text, default=defaults.get("adaptive_muon_" + name), **options)

    add("moment2_method", "What the adaptive scale is made of.", choices=get_args(Moment2MethodT))
    add("beta2", "Decay rate of the second moment, in [0, 1).", type=float)
    add("eps", "Small constant for numerical stability, > 0.", type=float)
    add("weight_decay_method", "Instead of decoupled weight decay.", choices=get_args(WeightDecayMethodT))
    add(
        "bias_correction",
        "Whether the adaptive scale is corrected for the averages having started at zero; by default for namo_d only.",
        action=argparse.BooleanOptionalAction,
    )
    add("namo_d_clamp", "namo_d: column scales stay within [c, 1/c] of their mean; c in (0, 1].", type=float)
    add("ns_algorithm", "How Newton-Schulz iterations are computed.", choices=get_args(NSAlgorithmT))
    add("use_syrk", "Use the Triton kernel for symmetric products.", action=argparse.BooleanOptionalAction)
    add("max_bytes_in_flight", "What a rank may send and receive at once in a step, in bytes.", type=int)

    for flag, choices in ("--muon-tp-mode", TensorParallelModeT), ("--muon-fp32-matmul-prec", FP32MatmulPrecT):
        action = known.get(flag)
        if action is not None and action.choices is not None:
            action.choices = [*action.choices, *(c for c in get_args(choices) if c not in action.choices)]
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--optimizer")
    if chosen.parse_known_args()[0].optimizer == "adaptive_muon":
        parser.set_defaults(muon_tp_mode="layer_sharded")
    return parser


def _from_command_line(names: Iterable[str]) -> dict[str, Any]:
    """The options among ``names`` that were given on the command line, where Megatron has parsed one."""
    global_vars = sys.modules.get("megatron.training.global_vars")
    args = getattr(global_vars, "_GLOBAL_ARGS", None)
    given = {name: getattr(args, "adaptive_muon_" + name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _is_qkv(p: torch.Tensor) -> bool:
    """Whether Megatron has tagged a parameter as a fused attention weight."""
    return bool(getattr(p, "is_qkv", False))


def _tensor_parallel_size(pg_collection: Any) -> int:
    """The number of ranks that hold a matrix together, of an expert or any other."""
    groups = (getattr(pg_collection, name, None) for name in ("tp", "expt_tp"))
    return max((group.size() for group in groups if group is not None), default=1)


@cache
def _warn_of_blockwise(ranks: int) -> None:
    """Warns, once and on one rank, where the result depends on the number of tensor-parallel ranks."""
    if ranks > 1 and dist.get_rank() == 0:
        logging.warning(
            'adaptive_muon with tp_mode "blockwise" orthogonalizes every tensor-parallel strip as a matrix of its own: '
            "the result depends on the number of ranks (%d). --muon-tp-mode layer_sharded does not.",
            ranks,
        )


def _dotted(version: Sequence[int]) -> str:
    """A version as text."""
    return ".".join(map(str, version))
