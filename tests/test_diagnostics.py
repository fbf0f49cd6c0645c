# SPDX-License-Identifier: Apache-2.0
"""What the optimizer shows of whole matrices, beside float64; what it costs nobody who does not ask; and the report."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measured import assert_shows, walked
from side_by_side import each_dtype, each_method, legal, normal, smooth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.orthogonalize.probes import error_of


EXACT: dict[str, Any] = {"lr": 0.05, "fp32_matmul_prec": "highest", "extra_scale_factor": 0.2}
SHAPES = [(24, 64), (64, 24), (6, 30), (30, 6), (16, 16), (5, 5)]


def gradients_of(shape: tuple[int, ...], steps: int = 3) -> list[torch.Tensor]:
    """Gradients with columns of different sizes."""
    return [normal(shape, seed) * torch.linspace(0.1, 3, shape[-1]) for seed in range(steps)]


def step(optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, torch.Tensor]) -> None:
    for p, G in gradients.items():
        p.grad = G.to(p.dtype)
    optimizer.step()


# --------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", ["decoupled", "l2", "adaptive"])
@each_method
def test_values_of_whole_matrices(method: str, decay: str, nesterov: bool, bias_correction: bool) -> None:
    """Two of each shape, which are worked on as one tensor."""
    options = {**EXACT, **smooth(method), "weight_decay_method": decay, "weight_decay": 0.1}
    options |= {"nesterov": nesterov, "bias_correction": bias_correction}
    if not legal(method, options):
        pytest.skip("the method does not take this decay")
    params = [nn.Parameter(normal(shape, seed)) for seed, shape in enumerate(SHAPES * 2)]
    gradients = {p: gradients_of((*p.shape,)) for p in params}
    expected = {p: walked(method, p, gradients[p], **_of_oracle(options)) for p in params}
    optimizer = AdaptiveMuon(params, moment2_method=method, diagnostics_every=1, **options)
    for number in range(3):
        step(optimizer, {p: gradients[p][number] for p in params})
        shown = optimizer.diagnostics()
        assert [*shown] == [f"0.{index}" for index in range(len(params))]
        for p, row in zip(params, shown.values(), strict=True):
            assert_shows(row, expected[p][number], min(p.shape))


def _of_oracle(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "fp32_matmul_prec"}


@each_dtype
@each_method
def test_values_of_stacks_blocks_and_transposed_matrices(method: str, dtype: torch.dtype) -> None:
    """Each expert and each block is a matrix by itself, with a name of its own."""
    whole, options = normal((3, 12, 20)).to(dtype), {**EXACT, **smooth(method)}
    G = normal((3, 12, 20), 1).to(dtype) * 3
    stack, fused, stored = (
        nn.Parameter(whole.clone()),
        nn.Parameter(whole[0].clone()),
        nn.Parameter(whole[1].mT.clone()),
    )
    stack.muon_stacked, fused.muon_blocks, stored.muon_transposed = True, (2, 1), True  # type: ignore[attr-defined]
    named = [("experts", stack), ("fused", fused), ("stored", stored)]
    optimizer = AdaptiveMuon(named, moment2_method=method, diagnostics_every=1, **options)
    step(optimizer, {stack: G, fused: G[0], stored: G[1].mT})
    shown = optimizer.diagnostics()
    first = torch.arange(12) % 3 < 2
    parts = {f"experts[expert {i}]": (whole[i], G[i]) for i in range(3)}
    parts |= {"fused[0]": (whole[0][first], G[0][first]), "fused[1]": (whole[0][~first], G[0][~first])}
    parts |= {"stored": (whole[1], G[1])}
    assert [*shown] == [*parts]
    for name, (W, of_W) in parts.items():
        [expected] = walked(method, W, [of_W], **_of_oracle(options))
        assert_shows(shown[name], expected, min(W.shape), rtol=1e-3)


def test_a_rate_in_a_tensor_and_of_a_group() -> None:
    params = [nn.Parameter(normal((6, 7))) for _ in range(2)]
    groups = [{"params": [params[0]], "lr": torch.tensor(0.5)}, {"params": [params[1]], "lr": 0.25}]
    optimizer = AdaptiveMuon(groups, moment2_method="namo", diagnostics_every=1)
    step(optimizer, dict.fromkeys(params, torch.ones(6, 7)))
    shown = optimizer.diagnostics()
    assert [*shown] == ["0.0", "1.0"]
    assert math.isclose(shown["0.0"]["update_rms"], 2 * shown["1.0"]["update_rms"], rel_tol=1e-6)


@pytest.mark.parametrize("shape", [(64, 200), (300, 128)])
@pytest.mark.parametrize("spectrum", ["one", "all"])
def test_the_error_of_the_estimated_orthogonality(shape: tuple[int, int], spectrum: str) -> None:
    """The docstring's standard errors of its square, over many matrices: one singular value is off, or all are alike."""
    side, number = min(shape), 200
    left, right = (torch.linalg.qr(torch.randn(number, size, side)).Q for size in shape)
    sigma = torch.ones(number, side)
    if spectrum == "one":
        sigma[:, 0] = 0.0
    else:
        sigma = 1 + 0.3 * torch.randn(number, side)
    squares = error_of(left * sigma.unsqueeze(-2) @ right.mT)[:, 0]
    exact = (sigma.square() - 1).square().mean(-1)
    relative = (squares / exact - 1).double()
    stated = math.sqrt(2 / 8) if spectrum == "one" else math.sqrt(2 / (8 * side)) * 2
    assert relative.square().mean().sqrt() <= stated
    assert abs(relative.mean()) <= 4 * stated / math.sqrt(number)


# ------------------------------------------------------------------------------------------- when, and what it costs


def test_every_n_steps_and_a_matrix_without_a_gradient() -> None:
    """Each matrix shows the step in which it was measured last."""
    one, other = (nn.Parameter(normal((6, 7), seed)) for seed in range(2))
    optimizer = AdaptiveMuon([("one", one), ("other", other)], diagnostics_every=3)
    seen = []
    for number in range(1, 8):
        one.grad, other.grad = normal((6, 7)), None if number == 6 else normal((6, 7))
        optimizer.step()
        seen.append({name: row["step"] for name, row in optimizer.diagnostics().items()})
    assert seen == [{}, {}, *[{"one": 3, "other": 3}] * 3, *[{"one": 6, "other": 3}] * 2]


class Recorded(TorchDispatchMode):
    """Keeps the names of what torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operations(optimizer: torch.optim.Optimizer) -> list[str]:
    with Recorded() as mode:
        optimizer.step()
    return mode.names


@each_method
def test_between_measured_steps_nothing_is_done(method: str) -> None:
    """The same operations as without the option, and the same bits."""
    ps = [nn.Parameter(normal((12, 20))) for _ in range(2)]
    plain, measured = (
        AdaptiveMuon([p], moment2_method=method, **o) for p, o in zip(ps, ({}, {"diagnostics_every": 4}), strict=True)
    )
    for number in range(1, 9):
        for p in ps:
            p.grad = normal((12, 20), number)
        names = [operations(each) for each in (plain, measured)]
        assert (names[0] == names[1]) is (number % 4 != 0)
    assert torch.equal(*ps)


@each_method
def test_a_step_reads_nothing_from_the_device(method: str) -> None:
    """No value becomes a Python number, which on CUDA would wait for the device."""
    p = nn.Parameter(normal((12, 20)))
    optimizer = AdaptiveMuon([p], moment2_method=method, diagnostics_every=1, bias_correction=False)
    for number in range(3):
        p.grad = normal((12, 20), number)
        names = operations(optimizer)
    assert not {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"} & {*names}
    optimizer.diagnostics()


@each_method
def test_state_dicts_copies_and_pickles(method: str) -> None:
    p = nn.Parameter(normal((12, 20)))
    optimizer = AdaptiveMuon([p], moment2_method=method, diagnostics_every=1)
    plain = AdaptiveMuon([nn.Parameter(normal((12, 20)))], moment2_method=method)
    for each in (optimizer, plain):
        step(each, {each.param_groups[0]["params"][0]: normal((12, 20), 1)})
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    torch.testing.assert_close(optimizer.state_dict()["state"], plain.state_dict()["state"], atol=0, rtol=0)
    before = optimizer.diagnostics()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.diagnostics() == {}
        step(copied, {copied.param_groups[0]["params"][0]: normal((12, 20), 2)})
        assert copied.diagnostics()["0.0"]["step"] == 2
    assert optimizer.diagnostics() == before


def test_what_leaves_the_groups_is_not_shown() -> None:
    one, other = (nn.Parameter(normal((6, 7), seed)) for seed in range(2))
    optimizer = AdaptiveMuon([one, other], diagnostics_every=1)
    step(optimizer, {one: normal((6, 7)), other: normal((6, 7))})
    del optimizer.param_groups[0]["params"][0]
    assert [*optimizer.diagnostics()] == ["0.0"]


@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
def test_it_must_be_switched_on(make: Callable[..., Any]) -> None:
    optimizer = make([nn.Parameter(torch.ones(4, 3))])
    for method in (optimizer.diagnostics, optimizer.diagnostics_summary, optimizer.report):
        with pytest.raises(
            ValueError, match="diagnostics_every must be a number of steps .* Pass diagnostics_every=100"
        ):
            method()
    for bad in (0, -1, 2.0, True, "3"):
        with pytest.raises(ValueError, match="diagnostics_every must be a whole number >= 1, or None"):
            make([nn.Parameter(torch.ones(4, 3))], diagnostics_every=bad)
    with pytest.raises(ValueError, match="diagnostics_every must be 1 or None with capturable=True"):
        make([nn.Parameter(torch.ones(4, 3))], diagnostics_every=2, capturable=True)


def test_with_capturable_the_device_counts() -> None:
    p = nn.Parameter(normal((6, 7)))
    optimizer = AdaptiveMuon([p], diagnostics_every=1, capturable=True, lr=torch.tensor(0.5))
    steps = []
    for _ in range(3):
        step(optimizer, {p: normal((6, 7))})
        steps.append(optimizer.diagnostics()["0.0"]["step"])
    assert steps == [1, 2, 3]


# ----------------------------------------------------------------------------------------------- summary and report


def healthy(count: int, **options: Any) -> tuple[AdaptiveMuon, list[nn.Parameter]]:
    """An optimizer of named matrices of one shape, and these."""
    params = [nn.Parameter(normal((12, 20), seed)) for seed in range(count)]
    named = [(f"layer{index}", p) for index, p in enumerate(params)]
    return AdaptiveMuon(named, **{"moment2_method": "namo", "diagnostics_every": 1, **options}), params


def rows_of(report: str) -> dict[str, str]:
    """What a report says of each matrix, in its order."""
    return {line.split()[0]: line for line in report.splitlines()[1:]}


def test_summary_is_the_quantiles() -> None:
    optimizer, params = healthy(11)
    step(optimizer, {p: normal((12, 20), 50 + i) * (i + 1) for i, p in enumerate(params)})
    norms = sorted(row["gradient_norm"] for row in optimizer.diagnostics().values())
    summary = optimizer.diagnostics_summary()
    shown = [summary[f"adaptive_muon/gradient_norm/{name}"] for name in ("min", "10%", "median", "90%", "max")]
    assert shown == pytest.approx([norms[i] for i in (0, 1, 5, 9, 10)])
    assert summary["adaptive_muon/matrices"] == 11 and summary["adaptive_muon/not_finite"] == 0
    assert "adaptive_muon/step/min" not in summary
    params[3].grad = torch.full((12, 20), math.nan)
    optimizer.step()
    summary = optimizer.diagnostics_summary()
    assert summary["adaptive_muon/not_finite"] == 1
    assert all(map(math.isfinite, summary.values()))


def test_report_of_healthy_matrices() -> None:
    optimizer, params = healthy(3)
    assert "Nothing has been measured yet" in optimizer.report()
    step(optimizer, {p: normal((12, 20), 9) for p in params})
    assert optimizer.report() == "Nothing stands out among 3 matrices."


@each_method
def test_report_of_gradients_that_are_zero_or_not_finite(method: str) -> None:
    optimizer, params = healthy(4, moment2_method=method)
    bad = [torch.full((12, 20), math.inf), torch.zeros(12, 20)]
    step(optimizer, dict(zip(params, [normal((12, 20), 9), bad[1], bad[0], normal((12, 20), 8)], strict=True)))
    rows = rows_of(optimizer.report())
    assert [*rows] == ["layer2", "layer1"]
    assert "gradient is not finite (inf); look at the loss" in rows["layer2"]
    assert "gradient is zero; see that the loss depends on it" in rows["layer1"]


def test_report_of_a_large_update() -> None:
    """One by its group's rate, one by a weight that is small."""
    params = [nn.Parameter(normal((12, 20), seed)) for seed in range(8)]
    params[5].data *= 1e-2
    groups = [{"params": [params[0]], "lr": 0.5}, {"params": params[1:], "lr": 0.02}]
    optimizer = AdaptiveMuon(groups, moment2_method="namo", diagnostics_every=1)
    step(optimizer, {p: normal((12, 20), 9) for p in params})
    rows = rows_of(optimizer.report())
    assert [*rows] == ["1.4", "0.0"]
    assert "its update is 25 times the others' median; give it a group with a smaller lr" in rows["0.0"]
    assert "its update, relative to the weight, is 9" in rows["1.4"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_report_of_a_large_update_among_few(count: int) -> None:
    """The others' median is without the matrix itself; one alone has no others."""
    params = [nn.Parameter(normal((12, 20), seed)) for seed in range(count)]
    groups = [{"params": params[:1], "lr": 1.0}, {"params": params[1:], "lr": 1e-4}]
    optimizer = AdaptiveMuon(groups, moment2_method="namo", diagnostics_every=1)
    step(optimizer, {p: normal((12, 20), 9) for p in params})
    rows = rows_of(optimizer.report())
    assert [*rows] == ["0.0"] and "its update is 10000 times the others' median" in rows["0.0"]
    alone = AdaptiveMuon(params[:1], lr=1.0, moment2_method="namo", diagnostics_every=1)
    step(alone, {params[0]: normal((12, 20), 9)})
    assert alone.report() == "Nothing stands out among 1 matrices."


@each_method
def test_cosines_are_between_minus_one_and_one(method: str) -> None:
    """At the first step the momentum is a multiple of the gradient, and rounding brings the ratio beyond 1."""
    optimizer, params = healthy(100, moment2_method=method, nesterov=False)
    step(optimizer, {p: normal((12, 20), seed) for seed, p in enumerate(params)})
    cosines = [row["cosine"] for row in optimizer.diagnostics().values()]
    assert all(1 - 1e-6 < cosine <= 1 for cosine in cosines)


def test_report_of_a_clamped_scale() -> None:
    """Of columns whose gradients agree, and such that cancel, none is near the mean."""
    p = nn.Parameter(normal((12, 20)))
    optimizer = AdaptiveMuon([("layer", p)], moment2_method="namo_d", namo_d_clamp=0.95, diagnostics_every=1)
    G = normal((12, 20), 1)
    for number in range(6):
        step(optimizer, {p: torch.cat([G[:, :10], G[:, 10:] * (-1) ** number], 1)})
    assert optimizer.diagnostics()["layer"]["clamped"] == 1
    assert "layer  the clamp moves 100% of its D" in optimizer.report()
    assert "lower namo_d_clamp" in optimizer.report()


def test_report_of_what_is_far_from_orthogonal() -> None:
    optimizer, params = healthy(2)
    step(optimizer, {params[0]: normal((12, 20), 9), params[1]: normal((12, 1), 9) @ normal((1, 20), 8)})
    [(name, row)] = rows_of(optimizer.report()).items()
    assert name == "layer1" and "its O is far from orthogonal (0.9" in row and "raise num_ns_steps" in row


def test_report_of_what_went_to_adamw() -> None:
    model = nn.Module()
    model.hidden, model.table = nn.Linear(8, 8), nn.Parameter(normal((40, 30)))
    model.embed = nn.Embedding(100, 40)  # larger, and rightly AdamW's
    optimizer = HybridAdaptiveMuon.from_model(model, diagnostics_every=1)
    step(optimizer, {p: normal((*p.shape,), 3) for p in model.parameters()})
    assert [*optimizer.diagnostics()] == ["hidden.weight"]
    [(name, row)] = rows_of(optimizer.report()).items()
    assert name == "table" and "AdamW has it, though it is larger than all matrices of AdaptiveMuon" in row
    assert 'routes={"table": "adaptive_muon"}' in row


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        (nn.Conv2d(16, 32, 3, bias=False), "pass flatten_conv=True to from_model"),
        (nn.ParameterList([normal((4, 20, 30))]), "set its muon_stacked = True if it is a stack of matrices"),
        (nn.ParameterList([normal((40, 30))]), 'pass routes={"table.0": "adaptive_muon"} to from_model'),
    ],
    ids=["convolution", "stack", "matrix"],
)
def test_remedies_of_what_went_to_adamw(module: nn.Module, remedy: str) -> None:
    """Following the last two makes matrices of them."""
    model = nn.ModuleDict({"hidden": nn.Linear(8, 8), "table": module})
    optimizer = HybridAdaptiveMuon.from_model(model, diagnostics_every=1)
    step(optimizer, {p: normal((*p.shape,), 3) for p in model.parameters()})
    [(_, row)] = rows_of(optimizer.report()).items()
    assert remedy in row
    alone = HybridAdaptiveMuon.from_model(nn.ModuleDict({"table": module}), diagnostics_every=1)
    assert remedy in alone.report() and "Nothing has been measured yet" in alone.report()


def test_what_went_to_adamw_without_a_model_or_names() -> None:
    params = [("hidden.weight", nn.Parameter(normal((8, 8)))), ("table", nn.Parameter(normal((40, 30))))]
    optimizer = HybridAdaptiveMuon(params, diagnostics_every=1)
    assert "table  AdamW has it" in optimizer.report() and "set 'use_muon': True in its group" in optimizer.report()
    nameless = HybridAdaptiveMuon(
        [nn.Parameter(normal((4, 20, 30))), nn.Parameter(normal((8, 8)))], diagnostics_every=1
    )
    assert "1.0  AdamW has it" in nameless.report()


def test_report_of_many() -> None:
    optimizer, params = healthy(40)
    step(optimizer, {p: torch.zeros(12, 20) if i < 32 else normal((12, 20), i) for i, p in enumerate(params)})
    lines = optimizer.report().splitlines()
    assert lines[0] == "32 findings, 40 matrices measured:"
    assert len(lines) == 22 and lines[-1] == "  and 12 more"
