# SPDX-License-Identifier: Apache-2.0
"""Every option of a step on a GPU: the CPU's result, no synchronization, and CUDA graphs. And a whole model's optimizer."""

import subprocess
import sys
from copy import deepcopy
from typing import get_args

import pytest
import torch
from cuda_features import BF16, FEATURES, SHAPES, is_low, made, of_features, of_methods
from on_cuda import OPTIONS, distance, first_step, give_gradients, needs_cuda, no_synchronization, on, replays_equal
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon, WeightDecayMethodT
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.options import Options, options_of


pytestmark = needs_cuda

COEFFICIENTS = next(option.choices for option in options_of(Options) if option.name == "coefficient_type")


@of_methods
@of_features
def test_walks_the_cpus_path(method, feature):
    """bfloat16 numbers that differ by rounding only are the same, but for a few."""
    begin = on("cpu", FEATURES[feature][2], FEATURES[feature][1])
    (params, cpu), (others, cuda) = (made(device, method, feature) for device in ("cpu", "cuda"))
    for step in range(3):
        for each, optimizer in ((params, cpu), (others, cuda)):
            give_gradients(each, step)
            optimizer.step()
    most = 0.3 if method == "adamuon" else 0.05 if is_low(feature) else 1e-3
    assert distance(params, others, begin) <= most
    if cpu.options.diagnostics_every and method != "adamuon":
        for name, measured in cpu.diagnostics().items():
            found = cuda.diagnostics()[name]
            assert set(measured) == set(found)
            for key, value in measured.items():
                assert found[key] == pytest.approx(value, rel=0.05, abs=1e-3, nan_ok=True), (name, key)


@pytest.mark.parametrize("feature", ["bfloat16 momentum", "measured and rounded"])
def test_in_a_process_of_its_own(feature):
    """Where no step before it has launched the kernels with other numbers."""
    chosen = f"test_walks_the_cpus_path and {feature} and namo_d"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@of_methods
@of_features
def test_a_step_never_waits_for_the_device(method, feature):
    params, optimizer = made("cuda", method, feature)
    give_gradients(params, 0)
    optimizer.step()
    with no_synchronization():
        optimizer.step()


@of_methods
@of_features
def test_a_step_in_a_graph(method, feature):
    """Replays round with the noise of their own step, and are measured."""
    rate = torch.tensor(0.02, device="cuda")
    (params, plain), (others, captured) = (
        made("cuda", method, feature, **more) for more in ({}, {"lr": rate, "capturable": True})
    )
    replays_equal(plain, captured, params, others, rate, 0.02 if is_low(feature) else 1e-4)
    if plain.options.diagnostics_every:
        found = captured.diagnostics()
        for name, measured in plain.diagnostics().items():
            assert found[name] == pytest.approx(measured, rel=1e-2, abs=1e-3, nan_ok=True), name


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_all_coefficients(coefficients, precision):
    """Those without a fifth power too, of which no square of the Gram matrix is taken."""
    options = {"coefficient_type": coefficients, "moment2_method": "namo", "lr": 0.02}
    begin, params, others = (on(device, shapes=SHAPES) for device in ("cpu", "cpu", "cuda"))
    optimizers = [AdaptiveMuon(params, fp32_matmul_prec="highest", **options)]
    optimizers += [AdaptiveMuon(others, fp32_matmul_prec=precision, **options)]
    for each, optimizer in zip((params, others), optimizers, strict=True):
        give_gradients(each, 0)
        optimizer.step()
    assert distance(params, others, begin) <= (1e-3 if precision == "highest" else 0.1)


# ----------------------------------------------------------------------------------------------------- a whole model


def model_on(device, dtype):
    """An embedding, maps, norms and a head."""
    torch.manual_seed(0)
    maps = [layer for width in (64, 96) for layer in (nn.Linear(64, width), nn.GELU(), nn.Linear(width, 64))]
    model = nn.Sequential(nn.Embedding(32, 64), *maps, nn.LayerNorm(64), nn.Linear(64, 32))
    return model.to(device, dtype)


KINDS = [
    pytest.param(torch.float32, {}, id="float32"),
    pytest.param(BF16, {}, id="bfloat16"),
    pytest.param(BF16, {"stochastic_rounding": True, "momentum_dtype": "bfloat16"}, id="rounded"),
]


@pytest.mark.parametrize(("dtype", "options"), KINDS)
def test_a_model_walks_the_cpus_path(dtype, options):
    """AdamW's part is fused there."""
    models = [model_on(device, dtype) for device in ("cpu", "cpu", "cuda")]
    options = OPTIONS | {"moment2_method": "namo_d", "fp32_matmul_prec": "highest"} | options
    optimizers = [HybridAdaptiveMuon.from_model(model, **options) for model in models[1:]]
    for step in range(3):
        for model, optimizer in zip(models[1:], optimizers, strict=True):
            give_gradients(list(model.parameters()), step)
            optimizer.step()
    begin, params, others = (list(model.parameters()) for model in models)
    assert distance(params, others, begin) <= (1e-3 if dtype == torch.float32 else 0.05)
    adamw = [group for group in optimizers[1].param_groups if not group["use_muon"]]
    assert all(bool(group.get("fused")) is group["params"][0].is_cuda for group in adamw)


@pytest.mark.parametrize(("dtype", "options"), KINDS)
def test_a_models_step_never_waits(dtype, options):
    model = model_on("cuda", dtype)
    optimizer = HybridAdaptiveMuon.from_model(model, moment2_method="namo", **(OPTIONS | options))
    give_gradients(list(model.parameters()), 0)
    optimizer.step()
    with no_synchronization():
        optimizer.step()


IN_GRAPHS = [
    *KINDS,
    *(pytest.param(torch.float32, {"moment2_method": method}, id=method) for method in METHODS),
    *(
        pytest.param(torch.float32, {"weight_decay_method": decay, "momentum_dtype": "bfloat16"}, id=decay)
        for decay in get_args(WeightDecayMethodT)
        if decay != "l2"
    ),
    pytest.param(BF16, {"stochastic_rounding": True, "diagnostics_every": 1}, id="measured"),
]


@pytest.mark.parametrize(("dtype", "options"), IN_GRAPHS)
def test_a_models_step_in_a_graph(dtype, options):
    """Both parts read their rate on the device."""
    model, other, rate = model_on("cuda", dtype), model_on("cuda", dtype), torch.tensor(0.02, device="cuda")
    options = OPTIONS | {"moment2_method": "namo_d"} | options
    plain = HybridAdaptiveMuon.from_model(model, **options)
    captured = HybridAdaptiveMuon.from_model(other, capturable=True, scalar_lr=rate, **(options | {"lr": rate}))
    most = 0.02 if dtype == BF16 or "momentum_dtype" in options else 1e-4
    replays_equal(plain, captured, list(model.parameters()), list(other.parameters()), rate, most)


def test_schedulers_of_a_captured_step():
    """Each group has a rate of its own, which its scheduler changes in place."""
    models, optimizers, schedules = [], [], []
    for captured in (False, True):
        model = model_on("cuda", torch.float32)
        halves = [[*model.parameters()][:4], [*model.parameters()][4:]]
        rates = [torch.tensor(rate, device="cuda") if captured else rate for rate in (0.02, 0.03)]
        groups = [{"params": half, "lr": rate} for half, rate in zip(halves, rates, strict=True)]
        options = OPTIONS | {"moment2_method": "namo_d", "capturable": captured}
        models.append([*model.parameters()])
        optimizers.append(HybridAdaptiveMuon.from_model(model, params=groups, **options))
        schedules.append(torch.optim.lr_scheduler.ExponentialLR(optimizers[-1], 0.5))
    begin, graph = [p.detach().clone() for p in models[0]], torch.cuda.CUDAGraph()
    give_gradients(models[1], 0)
    first_step(optimizers[1])
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for step in range(3):
        give_gradients(models[0], step)
        optimizers[0].step()
        if step:
            give_gradients(models[1], step)
            graph.replay()
        for schedule in schedules:
            schedule.step()
    assert distance(*models, begin) <= 1e-4


def test_resumed_after_a_graph():
    """A checkpoint of a captured optimizer goes on without a graph, on a GPU and on a CPU."""
    rate = torch.tensor(0.02, device="cuda")
    (params, plain), (others, captured) = (
        made("cuda", "namo_d", "stochastic rounding", **more) for more in ({}, {"lr": rate, "capturable": True})
    )
    replays_equal(plain, captured, params, others, rate, 0.02)
    for device in ("cuda", "cpu"):
        resumed, optimizer = made(device, "namo_d", "stochastic rounding")
        optimizer.load_state_dict(deepcopy(captured.state_dict()))
        for p, q in zip(resumed, others, strict=True):
            p.data.copy_(q)
        give_gradients(resumed, 5)
        optimizer.step()
        assert {int(optimizer.state[p]["step"]) for p in resumed} == {5}


def test_a_capture_without_a_step_before_it_is_refused():
    """Before anything is launched, so that the capture ends well."""
    params, rate = on("cuda", shapes=SHAPES), torch.tensor(0.02, device="cuda")
    optimizer = AdaptiveMuon(params, lr=rate, capturable=True)
    give_gradients(params, 0)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(ValueError, match="Make one step"):
        optimizer.step()
    assert not optimizer.state


def test_a_capture_after_loading_is_refused():
    """The kernels are not compiled then, and indices not on the device."""
    trained, optimizer = made("cuda", "namo_d", "repeating rows", capturable=True)
    give_gradients(trained, 0)
    optimizer.step()
    params, loaded = made("cuda", "namo_d", "repeating rows", capturable=True)
    loaded.load_state_dict(optimizer.state_dict())
    give_gradients(params, 1)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(ValueError, match="Make one step"):
        loaded.step()


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two
@pytest.mark.parametrize("feature", ["bfloat16 momentum", "measured and rounded", "repeating rows", "stacks"])
@pytest.mark.parametrize("with_tensor", [False, True])
def test_parameters_on_another_device_than_the_current(feature, with_tensor):
    """And on two devices in one group, whose rate may be on one of them."""
    rate = {"lr": torch.tensor(0.02, device="cuda:1"), "capturable": True} if with_tensor else {}
    options, shapes, dtype, attributes = FEATURES[feature]
    begin, params = on("cuda:0", dtype, shapes), on("cuda:0", dtype, shapes)
    others = [nn.Parameter(p.detach().to(f"cuda:{number % 2}")) for number, p in enumerate(params)]
    for p in (*params, *others):
        for name, value in attributes.items():
            setattr(p, name, value)
    options = OPTIONS | {"moment2_method": "namo_d", "fp32_matmul_prec": "highest"} | options
    optimizers = [AdaptiveMuon(params, **options), AdaptiveMuon(others, **(options | rate))]
    for step in range(3):
        for each, optimizer in zip((params, others), optimizers, strict=True):
            give_gradients(each, step)
            optimizer.step()
    assert distance(params, others, begin) <= (0.05 if is_low(feature) else 1e-3)
