# SPDX-License-Identifier: Apache-2.0
"""Convolutions with ``flatten_conv``: the weight is worked on as the matrix (out, in x kernel)."""

import copy
from typing import Any

import pytest
import torch
from separate import check_separate
from side_by_side import difference, each_method, normal, noting, smooth
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


class Convolutions(nn.Module):
    """Convolutions of one, two and three dimensions, grouped, depthwise and pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.wide, self.depthwise = nn.Conv2d(6, 8, 3, stride=2), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.pointwise, self.grouped = nn.Conv2d(8, 12, 1), nn.Conv1d(12, 8, 3, groups=2)
        self.volume, self.hidden = nn.Conv3d(8, 4, (1, 1, 2)), nn.Linear(4, 6)
        self.back = nn.ConvTranspose1d(6, 5, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns a loss."""
        x = F.one_hot(tokens, 90).float().unflatten(-1, (9, 10)).flatten(0, 1)[:, None]
        x = torch.tanh(self.wide(torch.tanh(self.stem(x))))
        x = torch.tanh(self.pointwise(self.depthwise(x)).flatten(2))
        x = torch.tanh(self.grouped(x))[:, :, None, None]
        x = torch.tanh(self.hidden(torch.tanh(self.volume(x)).mean((2, 3, 4))))
        return self.back(x[..., None]).square().mean()


FLATTENED = ("stem", "wide", "pointwise", "grouped", "volume")
FLATTEN = {"flatten_conv": True}


@pytest.mark.parametrize("method", ["namo_d", "normuon", "adamuon"])
def test_the_same_as_separate_weights(method: str) -> None:
    """Also saved and loaded."""
    rules = {f"{name}.weight": lambda w: [w.reshape(len(w), -1)] for name in FLATTENED}
    check_separate(Convolutions, FLATTEN, rules, method)


def test_describe_says_what_each_convolution_is() -> None:
    def said(**switches: bool) -> dict[str, tuple[str, str]]:
        routes = HybridAdaptiveMuon.from_model(Convolutions(), **switches).routes
        return {name: (route.algorithm, route.text) for name, _, route in routes if name.endswith("weight")}

    without, flattened = said(), said(**FLATTEN)
    for name in FLATTENED:
        assert without[f"{name}.weight"][0] == "adamw"
        assert without[f"{name}.weight"][1].endswith("not a matrix; flatten_conv=True takes the convolution for one")
    assert flattened["wide.weight"] == ("adaptive_muon", "convolution, a matrix of 8 x 54")
    assert flattened["grouped.weight"] == ("adaptive_muon", "convolution, a matrix of 8 x 18")
    assert flattened["volume.weight"] == ("adaptive_muon", "convolution, a matrix of 4 x 16")
    assert flattened["depthwise.weight"] == ("adamw", "4-D, not a matrix; depthwise convolution")
    assert flattened["back.weight"] == ("adamw", "3-D, not a matrix; transposed convolution")
    assert without["hidden.weight"] == flattened["hidden.weight"] == ("adaptive_muon", "hidden matrix")


def stepped(p: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        p.grad = normal(tuple(p.shape), 10 + step)
        optimizer.step()


def small(method: str) -> tuple[nn.Conv2d, HybridAdaptiveMuon]:
    """A convolution, the same in each call, and its optimizer."""
    model = nn.Conv2d(3, 4, 2, bias=False)
    model.weight.data = normal((4, 3, 2, 2))
    return model, HybridAdaptiveMuon.from_model(model, moment2_method=method, **FLATTEN)


@each_method
@pytest.mark.parametrize("options", [{}, {"scale_mode": "unit_rms_norm", "weight_decay_method": "palm"}], ids=str)
def test_state_and_factors_are_those_of_the_matrix(method: str, options: dict[str, Any]) -> None:
    model = nn.Conv2d(3, 20, 5, bias=False)
    matrix = nn.Parameter(model.weight.detach().flatten(1).clone())
    hyper = {"moment2_method": method, "weight_decay": 0.1, "fp32_matmul_prec": "highest", **smooth(method), **options}
    one, other = HybridAdaptiveMuon.from_model(model, 1e-2, **FLATTEN, **hyper), AdaptiveMuon([matrix], 1e-2, **hyper)
    for step in range(3):
        model.weight.grad = normal((20, 3, 5, 5), step)
        matrix.grad = model.weight.grad.flatten(1).clone()
        one.step()
        other.step()
    assert difference(model.weight.detach().flatten(1), matrix.detach()) <= 1e-6
    mine, its = one.state[model.weight], other.state[matrix]
    assert mine["momentum_buffer"].shape == model.weight.shape and mine.keys() == its.keys()
    V, of_matrix = mine["moment2_buffer"], its["moment2_buffer"]
    assert V.shape == (model.weight.shape if of_matrix.shape == matrix.shape else of_matrix.shape)
    assert difference(V.reshape(of_matrix.shape), of_matrix) <= 1e-6


@each_method
def test_hooks_get_the_weight_and_the_update_as_they_are(method: str) -> None:
    seen: list[tuple[int, ...]] = []
    model = nn.Conv2d(3, 4, 2, bias=False)
    HybridAdaptiveMuon.from_model(model, **FLATTEN)
    optimizer, before = (
        noting(seen, 0.0)([model.weight], moment2_method=method, weight_decay=0.0),
        model.weight.detach().clone(),
    )
    stepped(model.weight, optimizer, 1)
    assert seen == [(4, 12), (4, 3, 2, 2)] and torch.equal(model.weight, before)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_diagnostics_have_one_matrix(ndim: int) -> None:
    model = [nn.Conv1d, nn.Conv2d, nn.Conv3d][ndim - 1](3, 4, 2, bias=False)
    optimizer = HybridAdaptiveMuon.from_model(model, diagnostics_every=1, **FLATTEN)
    stepped(model.weight, optimizer)
    assert [*optimizer.diagnostics()] == ["weight"]


def test_bfloat16_weights_are_rounded_stochastically() -> None:
    model = nn.Conv2d(3, 4, 2, bias=False).bfloat16()
    twin = nn.Linear(12, 4, bias=False).bfloat16()
    twin.weight.data = model.weight.data.flatten(1).clone()
    options = {"stochastic_rounding": True, "momentum_dtype": "bfloat16"}
    for step in range(3):
        for each in (model, twin):
            each.weight.grad = normal((4, 12), step).bfloat16().view(each.weight.shape)
            if step == 0:
                each.optimizer = HybridAdaptiveMuon.from_model(each, **FLATTEN, **options)
            each.optimizer.step()
    assert torch.equal(model.weight.detach().flatten(1), twin.weight.detach())


def test_another_memory_format_is_said_or_refused() -> None:
    model = Convolutions()
    for module in (model.wide, model.pointwise):
        module.to(memory_format=torch.channels_last)
    reasons = {name: route.reason for name, _, route in HybridAdaptiveMuon.from_model(model, **FLATTEN).routes}
    assert (
        reasons["wide.weight"]
        == "4-D, not a matrix; convolution that is not contiguous, as in the memory format channels_last"
    )
    assert reasons["pointwise.weight"] == "convolution, a matrix of 12 x 8"
    model = nn.Conv2d(3, 4, 2, bias=False)
    optimizer = HybridAdaptiveMuon.from_model(model, **FLATTEN)
    model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="'weight' must be contiguous to be flattened.*contiguous_format"):
        stepped(model.weight, optimizer, 1)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv1d(8, 8, 3, groups=8), "depthwise convolution"),
        (nn.ConvTranspose1d(8, 6, 3), "transposed convolution"),
        (nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last), "convolution that is not contiguous"),
    ],
    ids=["depthwise", "transposed", "channels_last"],
)
def test_routes_cannot_make_a_matrix_of_what_is_none(module: nn.Module, reason: str) -> None:
    """The error has the reason, and no switch that would not help; a pattern before it helps."""
    model = nn.ModuleDict({"conv": module, "linear": nn.Linear(3, 4)})
    routes: dict[str, Any] = {"*.weight": "adaptive_muon"}
    for switches in {}, FLATTEN:
        with pytest.raises(ValueError, match=rf"must be a matrix, or several.*conv.weight.*{reason}") as error:
            HybridAdaptiveMuon.from_model(model, routes=routes, **switches)
        assert "flatten_conv" not in str(error.value)
        optimizer = HybridAdaptiveMuon.from_model(model, routes={"conv.*": "adamw"} | routes, **switches)
        assert {name for name, _, route in optimizer.routes if route.algorithm == "adaptive_muon"} == {"linear.weight"}
    with pytest.raises(ValueError, match="flatten_conv=True takes the convolution for one"):
        HybridAdaptiveMuon.from_model(nn.Sequential(nn.Conv2d(8, 6, 3)), routes={"0.weight": "adaptive_muon"})


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_in_another_memory_format(method: str) -> None:
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, optimizer = small(method)
        model.weight.grad = normal((4, 3, 2, 2), 1).contiguous(memory_format=memory_format)
        optimizer.step()
        ends.append(model.weight.detach())
    assert torch.equal(*ends)


def test_a_weight_that_is_parametrized() -> None:
    model = weight_norm(nn.Conv1d(3, 4, 2))
    routes = {name: route.algorithm for name, _, route in HybridAdaptiveMuon.from_model(model, **FLATTEN).routes}
    assert routes["parametrizations.weight.original1"] == "adaptive_muon"
    assert routes["parametrizations.weight.original0"] == routes["bias"] == "adamw"


def with_adapter(base: nn.Module, *factors: nn.Module) -> nn.ModuleDict:
    """A layer with the two factors of LoRA, as peft wraps it."""
    adapter = nn.Module()
    adapter.base_layer = base
    adapter.lora_A, adapter.lora_B = (nn.ModuleDict({"default": factor}) for factor in factors)
    return nn.ModuleDict({"a": adapter, "last": nn.Linear(3, 5)})


def reasons_of_factors(model: nn.Module, **switches: bool) -> list[tuple[str, str]]:
    routes = HybridAdaptiveMuon.from_model(model, **switches).routes
    return [(route.algorithm, route.reason) for name, _, route in routes if "lora" in name]


def test_adapters_go_where_their_convolution_goes() -> None:
    model = with_adapter(nn.Conv2d(8, 16, 3), nn.Conv2d(8, 4, 3, bias=False), nn.Conv2d(4, 16, 1, bias=False))
    assert reasons_of_factors(model, **FLATTEN) == [
        ("adaptive_muon", "convolution, a matrix of 4 x 72"),
        ("adaptive_muon", "convolution, a matrix of 16 x 4"),
    ]
    reason = "adapter of Conv2d, 4-D, not a matrix; flatten_conv=True takes the convolution for one"
    assert reasons_of_factors(model) == [("adamw", reason)] * 2
    back = with_adapter(nn.ConvTranspose1d(8, 6, 3), nn.Conv1d(8, 4, 3, bias=False), nn.Conv1d(4, 6, 1, bias=False))
    reason = "adapter of ConvTranspose1d, 3-D, not a matrix; transposed convolution"
    assert reasons_of_factors(back, **FLATTEN) == [("adamw", reason)] * 2


def test_adapters_of_experts_and_of_other_modules() -> None:
    """One pair of factors has the rows of all experts."""
    experts = nn.Module()
    experts.gate_up_proj, experts.down_proj = nn.Parameter(normal((3, 16, 6))), nn.Parameter(normal((3, 6, 8)))
    model = with_adapter(experts, nn.Linear(6, 12, bias=False), nn.Linear(12, 16, bias=False))
    for switches in {}, {"stacked_experts": True}:
        reason = "adapter of Module, a stack of linear maps and not one"
        assert reasons_of_factors(model, **switches) == [("adamw", reason)] * 2
    model = with_adapter(nn.GRU(6, 6), nn.Linear(6, 12, bias=False), nn.Linear(12, 16, bias=False))
    assert reasons_of_factors(model) == [("adamw", "adapter of GRU, which is not a linear map")] * 2


def test_an_output_head_stays_with_adamw() -> None:
    """By its name; by its shape, that of an embedding; and by a tag."""
    model = nn.Sequential()
    model.embed, model.body, model.classifier = nn.Embedding(40, 8), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 5, 1)
    model.last = nn.Conv1d(8, 40, 1)
    reasons = {name: route.reason for name, _, route in HybridAdaptiveMuon.from_model(model, **FLATTEN).routes}
    assert reasons["body.weight"] == "convolution, a matrix of 8 x 24"
    assert reasons["classifier.weight"] == "output head by its name, 'classifier'"
    assert reasons["last.weight"] == "output head by its shape, 40 x 8 as an embedding"
    model.body.weight.is_embedding_or_output_parameter = True
    reasons = {name: route.reason for name, _, route in HybridAdaptiveMuon.from_model(model, **FLATTEN).routes}
    assert reasons["body.weight"] == "tagged as embedding or output"


def test_copies_go_on_alike() -> None:
    model = nn.Conv1d(3, 4, 2, bias=False)
    optimizer = HybridAdaptiveMuon.from_model(model, moment2_method="namo_d", **FLATTEN)
    stepped(model.weight, optimizer)
    other, copied = copy.deepcopy((model, optimizer))
    for each, its in ((model, optimizer), (other, copied)):
        stepped(each.weight, its)
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("method", ["adamuon", "namo_d"])
def test_a_checkpoint_in_another_memory_format(method: str) -> None:
    """Its buffers go on as if they were contiguous."""
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, optimizer = small(method)
        stepped(model.weight, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state |= {key: V.contiguous(memory_format=memory_format) for key, V in state.items() if V.ndim == 4}
        optimizer.load_state_dict(saved)
        stepped(model.weight, optimizer)
        ends.append(model.weight.detach())
    assert torch.equal(*ends)
