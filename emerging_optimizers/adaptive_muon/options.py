# SPDX-License-Identifier: Apache-2.0
"""The options of AdaptiveMuon: the one record that every other list of them is made from."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from inspect import Parameter, cleandoc, signature
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Self, TypedDict, get_args, get_origin, override

import torch
from torch.distributed import ProcessGroup

from emerging_optimizers.adaptive_muon.checks import (
    is_rate,
    require,
    require_known,
    require_one_of,
    require_picklable,
    within,
)
from emerging_optimizers.adaptive_muon.exchange import TensorParallelModeT
from emerging_optimizers.adaptive_muon.hooks import WeightUpdateHook, check_upstream_has_hooks, is_hook
from emerging_optimizers.adaptive_muon.moment2 import METHODS, Moment2, Moment2MethodT, make_moment2
from emerging_optimizers.adaptive_muon.moment2.namo_d import NamoD
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz, NSAlgorithmT, syrk_is_usable
from emerging_optimizers.adaptive_muon.sharding.rules import BlocksFn, LayoutFn, ReplicaGroup
from emerging_optimizers.orthogonalized_optimizers.muon import MuonScaleT
from emerging_optimizers.orthogonalized_optimizers.muon_utils import NSCoeffT
from emerging_optimizers.utils import FP32MatmulPrecT


__all__ = [
    "MomentumDtypeT",
    "Option",
    "Options",
    "OptionsDict",
    "Rule",
    "SplitOptions",
    "WeightDecayMethodT",
    "check_group",
    "document",
    "option_field",
    "options_of",
    "shows_options",
]

MomentumDtypeT = Literal["float32", "bfloat16"]
WeightDecayMethodT = Literal["decoupled", "independent", "l2", "palm", "adaptive", "cautious"]


class Rule(NamedTuple):
    """What a value must be, as in "momentum must be in [0, 1)"; whether a value is that; and the remedy."""

    text: str
    holds: Callable[[Any], bool]
    remedy: str  # in full sentences


@dataclass(frozen=True)
class Option:
    """One option, as a field of a record describes it."""

    name: str
    type: Any
    default: Any
    text: str  # what it sets, without markup, for docstrings, flags and tables
    rule: Rule | None = None  # names and switches, and options that another value checks, need none
    names: Collection[str] = ()  # the valid names, where the annotation does not list exactly these
    # "shared" options must be the same on all ranks, and hold for all parameters. A parameter group may set its own
    # "group" options. "rank" options are objects of a process, such as functions.
    scope: Literal["shared", "group", "rank"] = "shared"
    megatron_field: str = ""  # of Megatron's OptimizerConfig
    flag: bool = False  # whether Megatron's parser gets --adaptive-muon-...
    in_files: bool = True  # whether the configuration files of NeMo and Automodel have a key
    key: str = ""  # that key, where it is not the name

    @property
    def choices(self) -> tuple[str, ...]:
        """The valid names; empty where the option is not a name."""
        return tuple(self.names or (get_args(self.type) if get_origin(self.type) is Literal else ()))

    @property
    def value_type(self) -> Any:
        """The type of a value that is not None."""
        types = [each for each in get_args(self.type) if each is not NoneType]
        return types[0] if isinstance(self.type, UnionType) and len(types) == 1 else self.type

    @property
    def is_switch(self) -> bool:
        """Whether the option is True or False, or None for a default that depends on others."""
        return self.type in (bool, bool | None)

    def check(self, value: Any) -> None:
        """Raise a ``ValueError`` with the rule, the value and the remedy unless a value is valid."""
        if self.choices:
            require_one_of(self.name, value, self.choices)
        elif self.is_switch:
            valid = isinstance(value, bool) or (value is None and self.default is None)
            require(valid, f"{self.name} must be True or False", value, f"Use {self.default}, the default.")
        elif self.rule:
            require(self.rule.holds(value), f"{self.name} must be {self.rule.text}", value, self.rule.remedy)


def option_field(default: Any, text: str, **about: Any) -> Any:
    """Return the field of a record: its default, its text and other arguments of :class:`Option`."""
    return field(default=default, metadata={"option": {"text": text, **about}})


def options_of(record: type) -> tuple[Option, ...]:
    """Return the options that a record declares with :func:`option_field`, in their order."""
    return tuple(
        Option(declared.name, declared.type, declared.default, **declared.metadata["option"])
        for declared in fields(record)
        if "option" in declared.metadata
    )


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


_PROCESS_GROUP = "a torch.distributed.ProcessGroup that this process belongs to"


_AT_LEAST_0 = partial(within, low=0)
_BELOW_1 = partial(within, low=0, high=1)
_HOOK = Rule(
    "a hook with the methods pre_weight_update_inplace and post_weight_update_inplace",
    _or_none(is_hook),
    "Pass an object, such as emerging_optimizers.weight_update_hooks.RelativeUpdateHook(), or None.",
)
# A smaller eps is zero, or has no inverse, in float32.
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class MatrixOptions:
    """The options of a step on whole matrices; :class:`Options` has those of shards and replicas too, and checks all."""

    lr: float = option_field(
        3e-4,
        "Learning rate. The default is that of upstream's Muon.",
        rule=Rule(">= 0", is_rate, "Use about 1e-3 to 1e-2."),
        scope="group",
        megatron_field="lr",
        in_files=False,
    )
    momentum: float = option_field(
        0.95,
        "Decay rate of the momentum. The default is that of upstream's Muon and of all three papers.",
        rule=Rule("in [0, 1)", _BELOW_1, "Use 0.95, the default."),
        scope="group",
        megatron_field="muon_momentum",
    )
    weight_decay: float = option_field(
        0.01,
        "Coefficient of the weight decay. The default is that of upstream's Muon.",
        rule=Rule(">= 0", _AT_LEAST_0, "Pass 0 for none."),
        scope="group",
        megatron_field="weight_decay",
    )
    nesterov: bool = option_field(
        False, "Whether the update looks ahead: M' = (1 - momentum) G + momentum M.", megatron_field="muon_nesterov"
    )
    weight_decay_method: WeightDecayMethodT = option_field(
        "decoupled",
        'How the weight decay is applied. "adaptive", the NAMO paper\'s, is decoupled and scaled by D as the update is; '
        'it is for "namo" and "namo_d". "cautious" (arXiv:2510.12402) is decoupled and spares the elements that the update '
        "moves away from zero. The others are those of upstream's WeightDecayMixin.",
        flag=True,
    )
    fp32_matmul_prec: FP32MatmulPrecT = option_field(
        "medium",
        'Precision of the products in the Newton-Schulz iteration. "medium" computes in 16 bit where the device is fast '
        'at it; "high" and "highest" are those of torch.set_float32_matmul_precision.',
        megatron_field="muon_fp32_matmul_prec",
    )
    coefficient_type: NSCoeffT = option_field(
        "quintic",
        'Coefficients of the Newton-Schulz iteration. "cubic5" (Emerging-Optimizers 0.4) takes exactly 5 steps.',
        names=[name for name in get_args(NSCoeffT) if name != "custom"],  # which is for a function of upstream's
        megatron_field="muon_coefficient_type",
    )
    num_ns_steps: int = option_field(  # NewtonSchulz checks it
        5,
        "Number of Newton-Schulz steps, >= 1. The default is that of upstream's Muon.",
        megatron_field="muon_num_ns_steps",
    )
    ns_algorithm: NSAlgorithmT = option_field(
        "auto",
        'How Newton-Schulz steps are computed: "standard" by upstream\'s function, one matrix after the other; "gram" two '
        'or three steps at once on the smaller Gram matrix; "auto" as is fastest for the shape and the device.',
        flag=True,
    )
    scale_mode: MuonScaleT = option_field(
        "spectral",
        'Factor s of the update of a matrix with m rows and n columns: "spectral" sqrt(max(m, n)), "shape_scaling" '
        'sqrt(max(1, m/n)), "unit_rms_norm" sqrt(m/n).',
        megatron_field="muon_scale_mode",
    )
    extra_scale_factor: float = option_field(
        1.0,
        'Further factor on the update. With "spectral", 0.2 gives Muon the update size of AdamW (arXiv:2502.16982).',
        rule=Rule("finite", lambda value: within(value, -math.inf) and math.isfinite(value), "Use 1.0, the default."),
        megatron_field="muon_extra_scale_factor",
    )
    moment2_method: Moment2MethodT = option_field(
        "adamuon",
        "Second-moment method, of which the adaptive scale D is made.",
        names=METHODS,  # with those that a user has registered
        megatron_field="adaptive_muon_moment2_method",
        flag=True,
    )
    beta2: float = option_field(
        0.95,
        "Decay rate of the second moment V. The default is upstream's; the NAMO paper uses 0.99.",
        rule=Rule("in [0, 1)", _BELOW_1, "Use 0.95, the default, or 0.99."),
        scope="group",
        megatron_field="adaptive_muon_beta2",
        flag=True,
    )
    eps: float = option_field(
        1e-8,
        'Constant added to the denominator of D; for "normuon" the least value that V counts as. The default is '
        'upstream\'s. For "namo" and "namo_d", the denominator is a gradient norm: choose a value well below those.',
        rule=Rule("> 0 in float32", partial(within, low=_TINY), "Use 1e-8, the default."),
        scope="group",
        megatron_field="adaptive_muon_eps",
        flag=True,
        key="moment2_eps",
    )
    bias_correction: bool | None = option_field(
        None,
        "Whether D is corrected for moving averages that start at zero. None follows the method's source: on for "
        '"namo_d" (the paper), off for the others (Emerging-Optimizers 0.3.0).',
        flag=True,
    )
    namo_d_clamp: float = option_field(  # NamoD checks it
        NamoD.namo_d_clamp,
        'Bound c in (0, 1] of "namo_d": column scales stay within [c, 1/c] of their mean. The default is from the '
        "paper's grid {0.12, 0.40, 0.75, 0.90}; its small model used 0.01.",
        flag=True,
    )
    momentum_dtype: MomentumDtypeT = option_field(
        "float32",
        'Dtype of the momentum buffer. "bfloat16" saves 2 bytes per parameter: the momentum is averaged in float32 and '
        'rounded stochastically. "float32" is float64 for float64 parameters, which "bfloat16" does not take.',
        flag=True,
    )
    stochastic_rounding: bool = option_field(
        False,
        "Whether bfloat16 weights are rounded stochastically, so that updates below their precision are not lost. Replicas "
        "and shards round equally, and a resumed run has the same bits. float32 and float64 weights are not rounded, and "
        "float16 ones are rejected.",
        flag=True,
    )
    weight_update_hook: WeightUpdateHook | None = option_field(
        None,
        "Hook around the weight update, such as upstream's HyperballHook, RadialBrakeHook and RelativeUpdateHook. It needs "
        "Emerging-Optimizers 0.5. It is called with every parameter, and of a stack with every matrix. Parameters must be "
        "whole, or matrices in DTensors.",
        rule=_HOOK,
        scope="rank",
        in_files=False,
    )
    use_syrk: bool = option_field(
        False,
        'Whether ns_algorithm "standard" uses upstream\'s Triton kernel for symmetric products, on CUDA at "medium" precision. '
        "The other algorithms use our own kernels by themselves.",
        megatron_field="muon_use_syrk",
        flag=True,
    )


@dataclass(frozen=True, kw_only=True)
class Options(MatrixOptions):
    """All options of :class:`~emerging_optimizers.adaptive_muon.AdaptiveMuon`, valid.

    ``use_syrk`` is False where the kernels cannot be used.

    Raises:
        ValueError: If a value breaks its rule.
    """

    tp_group: ProcessGroup | None = option_field(
        None,
        "Process group over which parameters with the attribute partition_dim are split, in the order of its ranks: 0 "
        "splits the rows, 1 the columns, and -1, None or no such attribute is a whole matrix. Shards may differ in "
        "size. DTensors need no group.",
        rule=Rule(
            _PROCESS_GROUP,
            _or_none(lambda value: isinstance(value, ProcessGroup)),
            "Pass what torch.distributed.new_group or mesh.get_group() returned, or None where nothing is split.",
        ),
        scope="rank",
        in_files=False,
    )
    replica_group: ReplicaGroup = option_field(
        None,
        "Process group whose ranks hold the same parameters, or the same shards of them, and the same gradients, as under "
        "DistributedDataParallel; or a function that takes a parameter and returns its group, or None. Each matrix is then "
        "orthogonalized by one of the ranks and sent to the others. DTensors need no group.",
        rule=Rule(
            _PROCESS_GROUP + ", or a function that returns one",
            _or_none(lambda value: isinstance(value, ProcessGroup) or callable(value)),
            "Pass the data-parallel group, such as torch.distributed.group.WORLD, or None to let every rank do "
            "all the work.",
        ),
        scope="rank",
        in_files=False,
    )
    share_replicas: bool = option_field(
        True,
        "Whether ranks that hold the same share the work: along the mesh dimensions that replicate a DTensor, and in "
        'replica_group. "duplicated" and "distributed" share whole matrices only.',
        flag=True,
    )
    tp_mode: TensorParallelModeT = option_field(
        "layer_sharded",
        'How a sharded matrix is orthogonalized: "layer_sharded" by its owner, many matrices in two messages; '
        '"duplicated" by every rank; "distributed" without leaving its ranks, by sums of Gram matrices; "blockwise" '
        "shard by shard, whose result differs from the whole matrix's.",
        megatron_field="muon_tp_mode",
    )
    layout_fn: LayoutFn | None = option_field(
        None,
        "Function that takes a parameter and returns how it is split: Layout() for whole, a Split, a Piece, or None for "
        "what the parameter itself shows.",
        rule=Rule(
            "a function of a parameter",
            _or_none(callable),
            "Pass a function that returns a Layout, Split or Piece, or None for the usual rules.",
        ),
        scope="rank",
        in_files=False,
    )
    blocks_fn: BlocksFn | None = option_field(
        None,
        "Function that takes a fused parameter and returns the row counts of its blocks, or ColumnBlocks with their "
        "column counts, or None for the parameter's attribute muon_blocks. Every block is a matrix of its own. Counts "
        "whose sum is less than the rows, or columns, repeat, as Megatron's query groups do.",
        rule=Rule(
            "a function of a parameter",
            _or_none(callable),
            "Pass a function, or set muon_blocks on the fused parameters.",
        ),
        scope="rank",
        in_files=False,
    )
    max_bytes_in_flight: int = option_field(
        2**30,
        "The most bytes that a rank sends and receives in a round; or one matrix for every owner, where that is more. A step "
        "with more takes more rounds, of which two may overlap. The default is 1 GiB.",
        rule=Rule("a positive number of bytes", partial(within, low=1), "Use 2**30, the default."),
        flag=True,
    )
    diagnostics_every: int | None = option_field(
        None,
        "Number of steps from one in which every matrix is measured to the next, see diagnostics(); None for never. With "
        "capturable it must be 1.",
        rule=Rule(
            "a whole number >= 1, or None",
            _or_none(lambda value: type(value) is int and value >= 1),
            "Pass the interval of your logger, such as 100.",
        ),
        flag=True,
    )
    capturable: bool = option_field(
        False,
        "Whether a CUDA graph may capture the step. The step count is then on the device, and lr may be a tensor there.",
        megatron_field="optimizer_cuda_graph",
        in_files=False,
    )

    def __post_init__(self) -> None:
        """Check all values."""
        for option in options_of(type(self)):
            option.check(getattr(self, option.name))
        object.__setattr__(self, "use_syrk", self.use_syrk and syrk_is_usable())
        _ = self.moment2, self.newton_schulz  # which check the rest
        _check_decay_method(self)
        require(
            not self.capturable or self.diagnostics_every in (None, 1),
            "diagnostics_every must be 1 or None with capturable=True, since a CUDA graph repeats the same step",
            self.diagnostics_every,
            "Pass 1, and read diagnostics() as often as you want to.",
        )
        check_upstream_has_hooks(self.weight_update_hook)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the record of keyword arguments.

        Raises:
            TypeError: If a keyword is unknown; it lists the known ones.
            ValueError: If a value breaks its rule.
        """
        require_known(given, [option.name for option in options_of(cls)])
        return cls(**given)

    @cached_property
    def moment2(self) -> Moment2:
        """The second-moment method."""
        return make_moment2(self.moment2_method, **{field.name: getattr(self, field.name) for field in fields(self)})

    @cached_property
    def newton_schulz(self) -> NewtonSchulz:
        """The orthogonalization of whole matrices."""
        return NewtonSchulz(
            self.coefficient_type, self.num_ns_steps, self.use_syrk, self.ns_algorithm, self.fp32_matmul_prec
        )

    @property
    def corrects_bias(self) -> bool:
        """``bias_correction``, or where that is None the method's own."""
        return self.moment2.bias_correction if self.bias_correction is None else self.bias_correction

    @property
    def rounds_stochastically(self) -> bool:
        """Whether weights or momenta in bfloat16 are rounded stochastically."""
        return self.stochastic_rounding or self.momentum_dtype == "bfloat16"

    @property
    def counts_steps(self) -> bool:
        """Whether the state has a step count: for bias correction, and as part of the noise of stochastic rounding."""
        return self.corrects_bias or self.rounds_stochastically

    @property
    def synced(self) -> dict[str, Any]:
        """The values that must be the same on all ranks, by name. Of a hook that is its class."""
        shared = [option.name for option in options_of(type(self)) if option.scope == "shared"]
        values: dict[str, Any] = {name: getattr(self, name) for name in shared} | {
            "bias_correction": self.corrects_bias
        }
        hook = self.weight_update_hook
        return values | {"weight_update_hook": None if hook is None else type(hook).__qualname__}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the record itself: it is frozen, and process groups cannot be copied."""
        return self

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle stores, or raise an error that names the option that cannot be pickled."""
        for option in options_of(type(self)):
            require_picklable(option.name, getattr(self, option.name))
        return vars(self)


@dataclass(frozen=True)
class SplitOptions:
    """Which matrices the weights of a model hold, each orthogonalized by itself.

    ``blocks_fn``, or a parameter's own ``muon_blocks``, decides before these switches. Weights that are not recognized are
    logged.

    Args:
        {options}

    Raises:
        ValueError: If a value is not True or False.
    """

    split_qkv: bool = option_field(
        True,
        "Whether queries, keys and values are matrices of their own where they are rows of one weight.",
        megatron_field="muon_split_qkv",
    )
    split_heads: bool = option_field(
        False,
        "Whether each head of queries, keys and values, and of the output projection, is a matrix of its own.",
        flag=True,
    )
    split_gate_up: bool = option_field(
        False,
        "Whether gate and up projection of a gated MLP, such as SwiGLU, are matrices of their own where they are rows of "
        "one weight.",
        flag=True,
    )
    stacked_experts: bool = option_field(
        False, "Whether each expert is a matrix where the experts of a layer are one tensor of three dimensions."
    )
    flatten_conv: bool = option_field(
        False, "Whether the weight of a convolution is a matrix: its outputs by its inputs times its kernel."
    )

    def __post_init__(self) -> None:
        """Check all values."""
        for option in options_of(type(self)):
            option.check(getattr(self, option.name))


class OptionsDict(TypedDict, total=False):
    """The keyword arguments after ``weight_decay``, for type checkers."""

    nesterov: bool
    weight_decay_method: WeightDecayMethodT
    fp32_matmul_prec: FP32MatmulPrecT
    coefficient_type: NSCoeffT
    num_ns_steps: int
    ns_algorithm: NSAlgorithmT
    scale_mode: MuonScaleT
    extra_scale_factor: float
    moment2_method: Moment2MethodT
    beta2: float
    eps: float
    bias_correction: bool | None
    namo_d_clamp: float
    momentum_dtype: MomentumDtypeT
    stochastic_rounding: bool
    weight_update_hook: WeightUpdateHook | None
    use_syrk: bool
    tp_group: ProcessGroup | None
    replica_group: ReplicaGroup
    share_replicas: bool
    tp_mode: TensorParallelModeT
    layout_fn: LayoutFn | None
    blocks_fn: BlocksFn | None
    max_bytes_in_flight: int
    diagnostics_every: int | None
    capturable: bool


def _check_decay_method(options: Options) -> None:
    """Raise a ``ValueError`` if the weight decay does not go with the second-moment method."""
    decay_method, method = options.weight_decay_method, options.moment2_method
    require(
        decay_method != "l2" or not options.moment2.reads_gradient,
        f'weight_decay_method must not be "l2" with moment2_method="{method}", whose gradient norms it would falsify',
        decay_method,
        'Use "decoupled" or "adaptive".',
    )
    require(
        decay_method != "adaptive" or options.moment2.adaptive_decay,
        f'weight_decay_method must not be "adaptive" with moment2_method="{method}", whose D is not a ratio of signal to '
        "noise",
        decay_method,
        'Use "decoupled", or moment2_method="namo" or "namo_d".',
    )


def check_group(group: dict[str, Any], options: Options) -> None:
    """Raise a ``ValueError`` if a parameter group has an invalid option, or one that holds for all groups."""
    own, common = [], []
    for option in options_of(type(options)):
        if option.scope == "group":
            option.check(group[option.name])
            own.append(option.name)
        elif option.name in group and option.name != "moment2_method":
            common.append(option.name)
    require(not common, f"options of a group must be among {', '.join(own)}", common, "Set it for all groups.")
    require(
        group["moment2_method"] == options.moment2_method,
        f'moment2_method must be the same in all groups, "{options.moment2_method}"',
        group["moment2_method"],
        "Make a second optimizer for these parameters.",
    )
    maximize = group.get("maximize")
    require(not maximize, "maximize must not be set, which AdaptiveMuon does not have", maximize, "Negate the loss.")


def document(cls: type, options: Iterable[Option]) -> None:
    """Replace ``{options}`` in a class's docstring by the options and their texts, in place."""
    lines = []
    for option in options:
        rule = f" Must be {option.rule.text}." if option.rule and option.scope != "rank" else ""
        text = f"{option.name}: {option.text}{rule}"
        lines.append(fill(text, 115, initial_indent=" " * 4, subsequent_indent=" " * 8))
    if cls.__doc__:  # python -OO has none
        cls.__doc__ = cleandoc(cls.__doc__).replace("    {options}", "\n".join(lines))


document(SplitOptions, options_of(SplitOptions))


def shows_options[T: type](cls: T) -> T:
    """Show all options in the signature and the docstring of a class whose constructor takes ``**options``."""
    init = vars(cls)["__init__"]
    shown = [p for p in signature(init).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    names = [p.name for p in shown]
    shown += [
        Parameter(option.name, Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type)
        for option in options_of(Options)
        if option.name not in names
    ]
    init.__signature__ = signature(init).replace(parameters=shown)
    document(cls, options_of(Options))
    return cls
