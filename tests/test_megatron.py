# SPDX-License-Identifier: Apache-2.0
"""Megatron's table, configuration, command line and launcher; and the start of tests/megatron_core in four processes.

To run some of those by hand: ``torchrun --nproc_per_node 4 -m pytest -x tests/megatron_core -k layer_wise``.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchrun import run_in_processes


pytest.importorskip("megatron.core", reason="needs pip install '.[megatron]'")

from megatron.core import package_info
from megatron.core.optimizer import OptimizerConfig, emerging_optimizers
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import arguments, global_vars
from megatron.training.training import get_megatron_optimizer_config

from emerging_optimizers.adaptive_muon import options as options_module
from emerging_optimizers.adaptive_muon.integrations.megatron import (
    TensorParallelAdaptiveMuon,
    add_adaptive_muon_args,
    register,
    splits,
)
from emerging_optimizers.adaptive_muon.integrations.megatron.arguments import CONFIG_FIELDS
from emerging_optimizers.adaptive_muon.integrations.megatron.routing import scalar_overrides
from emerging_optimizers.adaptive_muon.options import Options, options_of
from emerging_optimizers.adaptive_muon.versions import upstream_version


TABLE = emerging_optimizers._EMERGING_OPTIMIZERS
STOCK = TABLE["adaptive_muon"]
FOLDER = Path(__file__).parent / "megatron_core"


@pytest.fixture(autouse=True)
def stock() -> Iterator[None]:
    """Every test begins and ends with Megatron as it is."""
    yield
    TABLE["adaptive_muon"] = STOCK
    global_vars._GLOBAL_ARGS = None


# What Megatron asks of every command line.
MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 4 --global-batch-size 4 --train-iters 5 --lr 0.5 --transformer-impl local "
    "--tokenizer-type NullTokenizer --vocab-size 63 --mock-data --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-rope-fusion --no-persist-layer-norm"
)


class Chunk(torch.nn.Module):
    """The least of a model that Megatron asks about."""

    config = SimpleNamespace(num_attention_heads=8, num_query_groups=2, kv_channels=4)


def built(config: Any) -> TensorParallelAdaptiveMuon:
    """The optimizer that Megatron makes of a config."""
    entry = TABLE["adaptive_muon"]
    params = [torch.nn.Parameter(torch.ones(4, 8))]
    return entry.optimizer_cls(params, **entry.config_to_kwargs(config, [Chunk()], None))


def parsed(monkeypatch: pytest.MonkeyPatch, *flags: str, provider: Any = add_adaptive_muon_args) -> Any:
    """What Megatron's own parser makes of a command line, and finds valid."""
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *MODEL.split(), *flags])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    args = arguments.parse_args(extra_args_provider=provider)
    arguments.validate_args(args)
    return args


@pytest.mark.parametrize("tests", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_in_four_processes(tests: Path) -> None:
    """One file after the other: process groups add up, and slow each other down."""
    cuda_is_cpu = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import cuda_is_cpu; cuda_is_cpu.install()"
    run_in_processes([tests], 4, f"{cuda_is_cpu}; import megatron.training.training")


def test_register_replaces_one_entry_in_place_and_keeps_its_routing() -> None:
    others = {name: entry for name, entry in TABLE.items() if name != "adaptive_muon"}
    register()
    register()
    entry = TABLE["adaptive_muon"]
    assert emerging_optimizers._EMERGING_OPTIMIZERS is TABLE
    assert {name: entry for name, entry in TABLE.items() if name != "adaptive_muon"} == others
    assert entry.optimizer_cls is TensorParallelAdaptiveMuon
    added = entry.default_param_overrides.keys() - STOCK.default_param_overrides.keys()
    assert (
        len(added) == 1
        and entry.default_param_overrides | STOCK.default_param_overrides == entry.default_param_overrides
    )
    assert entry.init_state_fn is STOCK.init_state_fn


@pytest.mark.parametrize("version", [(0, 18, 2), (0, 19, 0), (0, 19, 9), (0, 20, 0)])
def test_supported_versions(version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_info, "__shortversion__", ".".join(map(str, version)))
    register()


@pytest.mark.parametrize("version", [(0, 17, 1), (0, 18, 1), (0, 21, 0), (1, 0, 0)])
def test_other_versions_are_refused(version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    number = ".".join(map(str, version))
    monkeypatch.setattr(package_info, "__shortversion__", number)
    with pytest.raises(RuntimeError, match=rf">= 0\.18\.2 and < 0\.21\.0, got {number}. Install"):
        register()
    assert TABLE["adaptive_muon"] is STOCK


def test_every_field_about_muon_reaches_the_optimizer() -> None:
    """Also those that a later version adds: this fails until they are in the table."""
    about = {field.name for field in fields(OptimizerConfig) if "muon" in field.name}
    read = {*CONFIG_FIELDS.values(), *(option.megatron_field for option in options_of(Options))}
    assert about - read == {"muon_scalar_optimizer"}  # Megatron's own business
    config = OptimizerConfig(
        optimizer="adaptive_muon",
        lr=0.5,
        weight_decay=0.25,
        muon_momentum=0.75,
        muon_nesterov=True,
        muon_fp32_matmul_prec="high",
        muon_coefficient_type="polar_express",
        muon_num_ns_steps=7,
        muon_scale_mode="unit_rms_norm",
        muon_extra_scale_factor=0.125,
        muon_tp_mode="distributed",
        adaptive_muon_moment2_method="namo_d",
        adaptive_muon_beta2=0.875,
        adaptive_muon_eps=1e-3,
    )
    register()
    optimizer = built(config)
    [group] = optimizer.param_groups
    assert {key: group[key] for key in ("lr", "weight_decay", "momentum", "beta2", "eps", "moment2_method")} == {
        "lr": 0.5,
        "weight_decay": 0.25,
        "momentum": 0.75,
        "beta2": 0.875,
        "eps": 1e-3,
        "moment2_method": "namo_d",
    }
    options = optimizer.options
    assert options.tp_mode == "distributed" and options.scale_mode == "unit_rms_norm"
    assert options.nesterov is True and options.fp32_matmul_prec == "high"
    assert options.coefficient_type == "polar_express"
    assert options.num_ns_steps == 7 and options.extra_scale_factor == 0.125


def qkv_blocks(**config: Any) -> list[int]:
    """Rows of the matrices into which the optimizer splits a fused attention weight of two query groups."""
    register()
    kwargs = TABLE["adaptive_muon"].config_to_kwargs(
        OptimizerConfig(optimizer="adaptive_muon", lr=0.1, **config), [Chunk()], None
    )
    p = torch.nn.Parameter(torch.ones(48, 8))
    p.is_qkv, p.grad = True, torch.ones(48, 8)
    optimizer = TensorParallelAdaptiveMuon([p], **kwargs)
    optimizer.state_format.sharding.resolve(optimizer.param_groups)
    return [matrix.of(p).size(0) for matrix in optimizer.state_format.sharding.matrices(p)]


def test_split_qkv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter does not say its blocks, as in Megatron 0.18; the model's config does."""
    assert qkv_blocks() == [32, 8, 8]
    assert qkv_blocks(muon_split_qkv=False) == [48]
    monkeypatch.setattr(Chunk.config, "attention_output_gate", True, raising=False)
    assert qkv_blocks() == [48]  # 40 rows a group, which the 48 are not
    monkeypatch.setattr(Chunk.config, "kv_channels", 2)
    assert qkv_blocks() == [48]
    monkeypatch.setattr(Chunk.config, "num_query_groups", 4)
    assert qkv_blocks() == [16, 16, 8, 8]


class Attention(torch.nn.Module):
    """What shows Megatron's attention: two query groups of four heads of four rows."""

    config, query_projection_size, kv_projection_size, hidden_size_per_attention_head = Chunk.config, 32, 8, 4

    def __init__(self) -> None:
        super().__init__()
        self.linear_qkv, self.linear_proj = (torch.nn.Linear(*shape, bias=False) for shape in ((8, 48), (32, 8)))


@pytest.mark.parametrize("by", ["flag", "register", "neither"])
def test_split_heads(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line or register(): every head of each query group, and those of the output projection."""
    flags = ["--adaptive-muon-split-heads"] if by == "flag" else []
    global_vars._GLOBAL_ARGS = parsed(monkeypatch, "--optimizer", "adaptive_muon", *flags)
    register(**{"split_heads": True} if by == "register" else {})
    chunk = Chunk()
    chunk.attention = Attention()
    entry, params = TABLE["adaptive_muon"], [*chunk.parameters()]
    optimizer = entry.optimizer_cls(params, **entry.config_to_kwargs(NAMO_D, [chunk], None))
    optimizer.state_format.sharding.resolve(optimizer.param_groups)
    shapes = [[m.shape(p) for m in optimizer.state_format.sharding.matrices(p)] for p in params]
    if by == "neither":
        assert shapes == [[(32, 8), (8, 8), (8, 8)], [(8, 32)]]
    else:
        assert shapes == [[(4, 8)] * 12, [(8, 4)] * 8]
    with pytest.raises(ValueError, match="split_heads must be True or False, got 'yes'"):
        register(split_heads="yes")


def test_attention_with_other_heads_than_the_model() -> None:
    """A vision encoder, or one of heterogeneous layers: its own config has its heads. Also by its main parameter."""
    register()
    chunk = Chunk()
    chunk.attention = Attention()
    chunk.attention.config = SimpleNamespace(num_attention_heads=8, num_query_groups=4, kv_channels=3)
    p = chunk.attention.linear_qkv.weight
    assert shapes_in(chunk)["attention.linear_qkv.weight"] == [(24, 8), (12, 8), (12, 8)]
    entry, main = TABLE["adaptive_muon"], torch.nn.Parameter(p.detach().clone())
    optimizer = entry.optimizer_cls([p], **entry.config_to_kwargs(NAMO_D, [chunk], None))
    p.main_param, main.is_qkv = main, True  # in Megatron 0.18 without the blocks
    optimizer.param_groups[0]["params"] = [main]
    sharding = optimizer.state_format.sharding
    sharding.resolve(optimizer.param_groups)
    assert [matrix.shape(main) for matrix in sharding.matrices(main)] == [(24, 8), (12, 8), (12, 8)]


class Adapter(torch.nn.Module):
    """By its names, an adapter of Megatron Bridge and NeMo: two factors."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_in, self.linear_out = (torch.nn.Linear(*s, bias=False) for s in ((inputs, 4), (4, outputs)))


class LoRALinear(torch.nn.Module):
    """By its names, what Megatron Bridge and NeMo wrap around a layer."""

    def __init__(self, to_wrap: torch.nn.Linear) -> None:
        super().__init__()
        self.to_wrap, self.adapter = to_wrap, Adapter(to_wrap.in_features, to_wrap.out_features)


class Unknown(torch.nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer


class GatedMLP(torch.nn.Module):
    """What shows Megatron's SwiGLU."""

    config = SimpleNamespace(gated_linear_unit=True)

    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = torch.nn.Linear(8, 24, bias=False)


class MambaMixer(torch.nn.Module):
    """By its name and layers, Megatron's."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = (torch.nn.Linear(*shape, bias=False) for shape in ((8, 48), (32, 8)))


def shapes_in(chunk: torch.nn.Module) -> dict[str, list[tuple[int, int]]]:
    """The shapes of the matrices that the registered optimizer makes of the weights of a model."""
    entry, named = TABLE["adaptive_muon"], dict(chunk.named_parameters())
    optimizer = entry.optimizer_cls([*named.values()], **entry.config_to_kwargs(NAMO_D, [chunk], None))
    sharding = optimizer.state_format.sharding
    sharding.resolve(optimizer.param_groups)
    return {name: [matrix.shape(p) for matrix in sharding.matrices(p)] for name, p in named.items()}


@pytest.mark.parametrize("split", [False, True], ids=["qkv", "heads and gate_up"])
@pytest.mark.parametrize("wrap", [LoRALinear, torch.compile])
def test_layers_that_are_wrapped_are_split_as_others(wrap: Any, split: bool) -> None:
    """Inside of adapters and of torch.compile; the two factors of an adapter are one matrix each."""
    register(split_heads=split, split_gate_up=split)
    plain, wrapped = Chunk(), Chunk()
    for chunk in plain, wrapped:
        chunk.attention, chunk.mlp = Attention(), GatedMLP()
    places = (wrapped.attention, "linear_qkv"), (wrapped.attention, "linear_proj"), (wrapped.mlp, "linear_fc1")
    for module, name in places:
        setattr(module, name, wrap(getattr(module, name)))
    plain, wrapped = shapes_in(plain), shapes_in(wrapped)
    inner = {name: shapes for name, shapes in wrapped.items() if "adapter" not in name}
    assert [*inner.values()] == [*plain.values()] and all("to_wrap" in name or "_orig_mod" in name for name in inner)
    assert [len(shapes) for shapes in plain.values()] == ([12, 8, 2] if split else [3, 1, 1])
    assert all(len(shapes) == 1 for name, shapes in wrapped.items() if name not in inner)


def logged(
    chunk: torch.nn.Module, caplog: pytest.LogCaptureFixture, split_qkv: bool = True, **switches: bool
) -> list[tuple[str, str]]:
    """The levels and texts of what is logged when Megatron makes optimizers of a model twice."""
    splits.log_once.cache_clear()
    caplog.clear()
    register(**switches)
    with caplog.at_level("INFO", logger=splits.__name__):
        for _ in range(2):
            TABLE["adaptive_muon"].config_to_kwargs(replace(NAMO_D, muon_split_qkv=split_qkv), [chunk], None)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_what_is_split_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Once, by switch, layer and pattern; also in wrappers."""
    chunk = Chunk()
    chunk.layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({"attention": Attention(), "mlp": GatedMLP()}) for _ in "ab"
    )
    chunk.layers[1]["attention"].linear_qkv = LoRALinear(chunk.layers[1]["attention"].linear_qkv)
    assert logged(chunk, caplog) == [("INFO", "adaptive_muon: split_qkv splits 2 linear_qkv (16 + 2 x 4 rows)")]
    assert logged(chunk, caplog, split_heads=True, split_gate_up=True) == [
        ("INFO", "adaptive_muon: split_heads splits 2 linear_qkv (6 x 4 rows), 2 linear_proj (4 columns)"),
        ("INFO", "adaptive_muon: split_gate_up splits 2 linear_fc1 (two halves of each rank's rows)"),
    ]
    assert logged(chunk, caplog, split_qkv=False) == []


def test_what_no_pattern_is_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Only for switches that are on; not what is frozen, of an adapter or of the scalar optimizer."""
    chunk = Chunk()
    chunk.layers = torch.nn.ModuleList([MambaMixer(), MambaMixer(), Attention(), GatedMLP(), Attention()])
    attention, mlp, tuned = [*chunk.layers][2:]
    attention.linear_qkv, mlp.linear_fc1 = Unknown(attention.linear_qkv), Unknown(mlp.linear_fc1)
    tuned.linear_qkv = LoRALinear(tuned.linear_qkv)
    tuned.frozen, tuned.scalar = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))
    tuned.frozen.weight.requires_grad_(False)
    tuned.scalar.weight.use_muon = False

    def warnings(**switches: bool) -> list[str]:
        return [text for level, text in logged(chunk, caplog, **switches) if level == "WARNING"]

    text = "adaptive_muon: {} does not split {}; their modules are not recognized"
    qkv = "1 layers.*.linear_qkv.layer.weight"
    assert warnings() == [text.format("split_qkv", qkv)]
    assert warnings(split_qkv=False) == []
    assert warnings(split_qkv=False, split_gate_up=True) == [
        text.format("split_gate_up", "1 layers.*.linear_fc1.layer.weight")
    ]
    mixers = "2 layers.*.in_proj.weight, 2 layers.*.out_proj.weight"
    assert warnings(split_heads=True) == [text.format("split_heads", f"{mixers}, {qkv}")]


def test_use_muon_is_true_or_false() -> None:
    """Of a parameter; what is neither is taken for neither."""
    predicate = next(iter(scalar_overrides())).with_name_predicate.fn
    p = torch.nn.Parameter(torch.ones(4, 8))
    for use_muon, is_scalar in ((None, False), (True, False), (False, True)):
        p.use_muon = use_muon
        assert predicate(p, "linear.weight") is is_scalar
    p.use_muon = "no"
    with pytest.raises(ValueError, match="use_muon of linear.weight must be True or False, got 'no'. Use None"):
        predicate(p, "linear.weight")


@pytest.mark.parametrize(
    "name, shape, scalar",
    [
        ("embedding.position_embeddings.weight", (32, 8), True),
        ("embedding.tokentype_embeddings.weight", (2, 8), True),
        ("vision_model.position_embeddings", (32, 8), True),
        ("decoder.layers.0.mlp.shared_experts.gate_weight", (1, 8), True),
        ("decoder.layers.0.mlp.router.weight", (4, 8), True),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", (32, 8), False),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight0", (32, 8), False),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_out.weight", (48, 8), False),
        ("mtp.layers.0.eh_proj.weight", (8, 16), False),
    ],
)
def test_what_is_no_hidden_matrix_goes_to_the_scalar_optimizer(
    name: str, shape: tuple[int, ...], scalar: bool
) -> None:
    """Of Megatron's embeddings, only those of words have a tag."""
    predicate = next(iter(scalar_overrides())).with_name_predicate.fn
    assert predicate(torch.nn.Parameter(torch.ones(shape)), f"module.{name}") is scalar


def test_split_qkv_without_blocks_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(48, 8))
    p.is_qkv = True
    with pytest.raises(ValueError, match="must have the rows of its blocks.*qkv_split_shapes"):
        TensorParallelAdaptiveMuon([p], split_qkv=True)


@pytest.mark.parametrize("missing", ["muon_extra_scale_factor", "decoupled_weight_decay", "adaptive_muon_eps"])
def test_fields_that_a_version_lacks_are_not_asked_for(missing: str) -> None:
    config = vars(OptimizerConfig(optimizer="adaptive_muon", lr=0.5)).copy()
    del config[missing]
    register()
    built(SimpleNamespace(**config))


def test_coupled_weight_decay() -> None:
    register()
    coupled = dict(optimizer="adaptive_muon", lr=0.5, decoupled_weight_decay=False)
    assert built(OptimizerConfig(optimizer="adaptive_muon", lr=0.5)).weight_decay_method == "decoupled"
    assert built(OptimizerConfig(**coupled)).weight_decay_method == "l2"
    with pytest.raises(ValueError, match='must not be "l2" with moment2_method="namo"'):
        built(OptimizerConfig(**coupled, adaptive_muon_moment2_method="namo"))


@pytest.mark.parametrize(
    "wrong",
    [{"adaptive_muon_moment2_method": "adam"}, {"muon_tp_mode": "sharded"}, {"muon_fp32_matmul_prec": "low"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_names_are_refused_when_the_optimizer_is_made(wrong: dict[str, str]) -> None:
    register()
    [name] = wrong.values()
    with pytest.raises(ValueError, match=f"got '{name}'. Choose from"):
        built(OptimizerConfig(optimizer="adaptive_muon", lr=0.5, **wrong))


NAMO_D = OptimizerConfig(optimizer="adaptive_muon", lr=0.5, adaptive_muon_moment2_method="namo_d")


def test_options_that_the_config_lacks() -> None:
    register()
    plain = built(NAMO_D)
    of_config = OptimizerConfig().muon_tp_mode
    # Of a blockwise config, Megatron's before 0.20: whole but for TP strips.
    assert plain.options.tp_mode == ("layer_sharded" if of_config == "blockwise" else of_config)
    assert plain.bias_correction and plain.weight_decay_method == "decoupled"
    register(
        tp_mode="duplicated",
        weight_decay_method="adaptive",
        bias_correction=False,
        namo_d_clamp=0.5,
        use_syrk=False,
        max_bytes_in_flight=1000,
    )
    optimizer = built(NAMO_D)
    assert optimizer.options.tp_mode == "duplicated" and optimizer.weight_decay_method == "adaptive"
    assert not optimizer.bias_correction and optimizer.max_bytes_in_flight == 1000
    assert optimizer.options.namo_d_clamp == 0.5
    register()
    assert built(NAMO_D).bias_correction  # the last call's options


def test_register_refuses_what_is_no_option_or_not_valid() -> None:
    for unknown in ({"beta3": 0.9}, {"lr": 0.1}, {"tp_group": None}):
        with pytest.raises(TypeError, match=f"got {next(iter(unknown))}. Choose from .*ns_algorithm"):
            register(**unknown)
    with pytest.raises(ValueError, match="ns_algorithm must be .*, got 'fast'. Choose from standard, gram, auto"):
        register(ns_algorithm="fast")
    with pytest.raises(ValueError, match="weight_decay_method must be .*, got 'none'. Choose from decoupled"):
        register(weight_decay_method="none")
    with pytest.raises(ValueError, match="use_syrk must be True or False, got 'no'"):
        register(use_syrk="no")
    with pytest.raises(ValueError, match="num_ns_steps must be a whole number >= 1, got 0"):
        register(num_ns_steps=0)
    with pytest.raises(ValueError, match=r"namo_d_clamp must be in \(0, 1\], got 5"):
        register(namo_d_clamp=5)
    assert TABLE["adaptive_muon"] is STOCK
    register(ns_algorithm="gram", weight_decay_method="adaptive")  # the config has the method that this goes with
    assert built(NAMO_D).options.ns_algorithm == "gram"


def test_flags_reach_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Megatron's own ways: its parser, its copy of the arguments into the config, its global arguments."""
    flags = (
        "--optimizer adaptive_muon --adaptive-muon-moment2-method namo_d --adaptive-muon-beta2 0.5 "
        "--adaptive-muon-eps 1e-3 --adaptive-muon-namo-d-clamp 0.25 --no-adaptive-muon-bias-correction "
        "--adaptive-muon-weight-decay-method adaptive --adaptive-muon-max-bytes-in-flight 1000 "
        "--no-adaptive-muon-use-syrk --muon-tp-mode duplicated --muon-fp32-matmul-prec highest"
    )
    args = parsed(monkeypatch, *flags.split())
    global_vars._GLOBAL_ARGS = args
    config, _ = get_megatron_optimizer_config(args)
    register()
    optimizer = built(config)
    [group] = optimizer.param_groups
    assert (group["moment2_method"], group["beta2"], group["eps"]) == ("namo_d", 0.5, 1e-3)
    assert optimizer.options.namo_d_clamp == 0.25 and not optimizer.bias_correction
    assert optimizer.weight_decay_method == "adaptive" and optimizer.max_bytes_in_flight == 1000
    assert optimizer.options.tp_mode == "duplicated" and optimizer.fp32_matmul_prec == "highest"
    register(bias_correction=True)  # which wins over the command line
    assert built(config).bias_correction


def test_diagnostics_go_to_megatrons_writers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A TensorBoard file read back, and what Weights & Biases gets, at the iterations at which Megatron logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    flags = "--optimizer adaptive_muon --adaptive-muon-diagnostics-every 2 --tensorboard-log-interval 4"
    args = parsed(monkeypatch, *flags.split())
    rows: list[tuple[int, dict[str, float]]] = []
    wandb, writer = SimpleNamespace(log=lambda row, step: rows.append((step, row))), SummaryWriter(tmp_path)
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", wandb)
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", writer)
    global_vars._GLOBAL_ARGS = args
    register()
    optimizer = built(get_megatron_optimizer_config(args)[0])
    [p] = optimizer.param_groups[0]["params"]
    for args.curr_iteration in range(10):
        p.grad = torch.full_like(p, 2.0 + args.curr_iteration)
        optimizer.step()
        if args.curr_iteration == 7:
            last = optimizer.diagnostics_summary()
    writer.close()
    assert [step for step, _ in rows] == [4, 8] and rows[-1][1] == last
    scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("adaptive_muon/gradient_norm/max")
    assert [(each.step, each.value) for each in scalars] == [
        (4, pytest.approx(5 * 32**0.5)),
        (8, pytest.approx(9 * 32**0.5)),
    ]
    before = len(rows)
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", None)  # as on all ranks but the last
    monkeypatch.setattr(global_vars, "_GLOBAL_TENSORBOARD_WRITER", None)
    for args.curr_iteration in range(10, 16):
        optimizer.step()
    assert len(rows) == before


def test_defaults_of_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, "--optimizer", "adaptive_muon")
    config, defaults = get_megatron_optimizer_config(args)[0], OptimizerConfig()
    for name in ("adaptive_muon_moment2_method", "adaptive_muon_beta2", "adaptive_muon_eps"):
        assert getattr(config, name) == getattr(defaults, name)
    assert args.muon_tp_mode == config.muon_tp_mode == "layer_sharded"
    assert args.adaptive_muon_bias_correction is None  # the method's own
    assert parsed(monkeypatch, "--optimizer=adaptive_muon").muon_tp_mode == "layer_sharded"
    assert (
        parsed(monkeypatch, "--optimizer", "adaptive_muon", "--muon-tp-mode", "blockwise").muon_tp_mode == "blockwise"
    )
    assert parsed(monkeypatch, "--optimizer", "muon").muon_tp_mode == defaults.muon_tp_mode  # Megatron's, for its own


@pytest.mark.parametrize("default", ["duplicated", "layer_sharded"])
def test_a_layer_sharded_mode_of_megatrons_own(default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flag keeps its choices, its help and, for other optimizers, its default; here it is the mode of this package."""
    for optimizer in "adaptive_muon", "muon":
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--optimizer", optimizer])
        parser = argparse.ArgumentParser()
        parser.add_argument("--optimizer")
        choices = ["blockwise", "duplicated", "distributed", "layer_sharded"]
        action = parser.add_argument("--muon-tp-mode", default=default, choices=choices, help="Megatron's own")
        add_adaptive_muon_args(parser)
        assert list(action.choices) == choices and action.help == "Megatron's own"
        expected = "layer_sharded" if optimizer == "adaptive_muon" else default
        assert parser.parse_args().muon_tp_mode == expected
    register()
    optimizer = built(OptimizerConfig(optimizer="adaptive_muon", lr=0.5, muon_tp_mode="layer_sharded"))
    assert optimizer.options.tp_mode == "layer_sharded" and type(optimizer) is TensorParallelAdaptiveMuon


def test_use_syrk_where_megatron_has_a_field_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimizerConfig(optimizer="adaptive_muon", lr=0.5)
    monkeypatch.setattr(options_module, "syrk_is_usable", lambda: True)
    register()
    for value in False, True:
        fields_of_main = SimpleNamespace(**{**vars(config), "muon_use_syrk": value})
        assert built(fields_of_main).options.use_syrk is value
    if hasattr(config, "muon_use_syrk"):  # 0.20
        args = parsed(monkeypatch, "--optimizer", "adaptive_muon", "--muon-use-syrk")
        global_vars._GLOBAL_ARGS = args
        assert built(get_megatron_optimizer_config(args)[0]).options.use_syrk
        args = parsed(monkeypatch, *"--optimizer adaptive_muon --muon-use-syrk --no-adaptive-muon-use-syrk".split())
        global_vars._GLOBAL_ARGS = args
        assert not built(get_megatron_optimizer_config(args)[0]).options.use_syrk


def test_a_rate_on_the_cpu_is_its_number() -> None:
    """Of whatever dtype and shape, and as it is now where a scheduler changes it in place."""
    register()
    plain, other = (built(OptimizerConfig(optimizer="adaptive_muon", lr=0.1)) for _ in range(2))
    other.param_groups[0]["lr"] = torch.tensor([0.1], dtype=torch.float64)
    for step in range(2):
        for optimizer in (plain, other):
            [p] = optimizer.param_groups[0]["params"]
            p.grad = torch.eye(4, 8) + step
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
    assert torch.equal(plain.param_groups[0]["params"][0], other.param_groups[0]["params"][0])


def test_optimizer_cuda_graph_makes_it_capturable() -> None:
    """A graph has the rate in a tensor, which Megatron's scheduler fills; also after a checkpoint was loaded."""
    register()
    plain, captured = (
        built(OptimizerConfig(optimizer="adaptive_muon", lr=0.5, optimizer_cuda_graph=graph))
        for graph in (False, True)
    )
    assert not plain.capturable and captured.capturable
    for _ in range(2):
        for optimizer in plain, captured:
            [group] = optimizer.param_groups
            scheduler = OptimizerParamScheduler(
                optimizer,
                0.0,
                0.25,
                0.25,
                0,
                10,
                "constant",
                0.01,
                0.01,
                10,
                "constant",
                use_checkpoint_opt_param_scheduler=False,
                override_opt_param_scheduler=True,
            )
            scheduler.step(1)
            assert isinstance(group["lr"], torch.Tensor) is optimizer.capturable and float(group["lr"]) == 0.25
            group["params"][0].grad = torch.eye(4, 8)
            optimizer.step()
        torch.testing.assert_close(captured.param_groups[0]["params"], plain.param_groups[0]["params"])
        saved = captured.state_dict()
        saved["param_groups"][0]["lr"] = 0.125
        captured.load_state_dict(saved)


@pytest.mark.parametrize(
    "flags",
    ["--adaptive-muon-moment2-method adam", "--muon-tp-mode sharded", "--adaptive-muon-weight-decay-method none"],
)
def test_wrong_choices_stop_the_command_line(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(monkeypatch, *flags.split())
    assert "invalid choice" in capsys.readouterr().err


def test_flags_are_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher and by the script, or by a Megatron that has them."""
    args = parsed(monkeypatch, provider=lambda parser: add_adaptive_muon_args(add_adaptive_muon_args(parser)))
    assert args.adaptive_muon_moment2_method == "adamuon"


def test_a_megatron_without_emerging_optimizers_is_refused() -> None:
    """Its import fails as with the main branch of emerging-optimizers, which has no module ``soap``."""
    script = """
import sys
sys.modules["emerging_optimizers.soap"] = None
from emerging_optimizers.adaptive_muon.integrations.megatron import register
register()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 1 and "RuntimeError: megatron-core" in done.stderr
    assert "emerging_optimizers.soap" in done.stderr and 'Install "emerging-optimizers>=0.3,<0.5"' in done.stderr
    assert f"got version {upstream_version()} (" in done.stderr


def test_a_megatron_without_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TABLE, "adaptive_muon")
    with pytest.raises(RuntimeError, match="must find all that it imports of .*, got version .*\. Install"):
        register()
    assert "adaptive_muon" not in TABLE


SCRIPT = """
import sys
from megatron.training.arguments import parse_args
import beside_the_script

if __name__ == "__main__":
    args = parse_args()
    print(sys.argv[0] == __file__, args.optimizer, args.adaptive_muon_moment2_method, args.muon_tp_mode)
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
    print(_EMERGING_OPTIMIZERS["adaptive_muon"].optimizer_cls.__module__)
"""


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the launcher on a script that knows nothing of us."""
    (folder / "pretrain.py").write_text(SCRIPT)
    (folder / "beside_the_script.py").touch()
    command = [sys.executable, "-m", "emerging_optimizers.adaptive_muon.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


def test_launcher_runs_an_unmodified_script(tmp_path: Path) -> None:
    flags = ["--optimizer", "adaptive_muon", "--adaptive-muon-moment2-method", "namo_d"]
    done = launched(tmp_path, str(tmp_path / "pretrain.py"), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "True adaptive_muon namo_d layer_sharded",
        TensorParallelAdaptiveMuon.__module__,
    ]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["nowhere.py", "--lr", "1"]])
def test_launcher_says_how_it_is_used(arguments: list[str], tmp_path: Path) -> None:
    done = launched(tmp_path, *arguments)
    assert done.returncode == 1
    assert "SCRIPT" in done.stderr or "a training script, got 'nowhere.py'. Check" in done.stderr
