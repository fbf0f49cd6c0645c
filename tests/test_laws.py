# SPDX-License-Identifier: Apache-2.0
"""What must hold of each method by its nature, said without a formula for the whole step."""

from itertools import product
from typing import Any, get_args

import pytest
import torch

import oracle
from emerging_optimizers.adaptive_muon import AdaptiveMuon, Moment2MethodT
from emerging_optimizers.adaptive_muon import moment2 as registered


def decays(method: str) -> list[str]:
    kind = registered.METHODS[method]
    return (
        ["decoupled", "independent", "palm", "cautious"]
        + ["adaptive"] * kind.adaptive_decay
        + ["l2"] * (not kind.reads_gradient)
    )


METHODS = get_args(Moment2MethodT)
NAMOS = [method for method in METHODS if registered.METHODS[method].reads_gradient]
PAIRS = [(method, decay) for method in METHODS for decay in decays(method)]
TINY = 1e-30  # an eps that takes no part
LR = 0.02
NO_DECAY = {"weight_decay": 0.0, "fp32_matmul_prec": "highest", "lr": LR}

each_method = pytest.mark.parametrize("method", METHODS)
each_shape = pytest.mark.parametrize("shape", [(15, 6), (6, 15), (9, 9)], ids=["tall", "wide", "square"])
each_momentum = pytest.mark.parametrize("nesterov", [False, True], ids=["", "nesterov"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walk(initial: torch.Tensor, gradients: Any, **hyper: Any) -> list[torch.Tensor]:
    return oracle.walk(AdaptiveMuon([torch.nn.Parameter(initial.clone())], **NO_DECAY | hyper), gradients)


# ------------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("bias_correction", [False, True], ids=["", "corrected"])
@each_momentum
@each_shape
@pytest.mark.parametrize("method", NAMOS)
def test_the_size_of_gradients_is_nothing_to_namo(
    method: str, shape: tuple, nesterov: bool, bias_correction: bool, factor: float
) -> None:
    initial, gradients = normal(*shape), normal(4, *shape, seed=1)
    hyper = {
        "moment2_method": method,
        "eps": TINY,
        "nesterov": nesterov,
        "bias_correction": bias_correction,
        "weight_decay_method": "adaptive",
        "weight_decay": 0.1,
    }
    path, other = walk(initial, gradients, **hyper), walk(initial, factor * gradients, **hyper)
    assert oracle.disagreement(other, path, initial) <= 2e-5


@each_shape
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@each_method
def test_a_permutation_goes_through(method: str, dim: int, shape: tuple) -> None:
    initial, gradients = normal(*shape), normal(4, *shape, seed=1)
    gradients[:, :, ::2] += 2.0  # columns that differ, so that namo_d's scales do
    order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(2))
    hyper = {"moment2_method": method, "namo_d_clamp": 0.9}  # it binds
    path = walk(initial, gradients, **hyper)
    permuted = walk(initial.index_select(dim, order), gradients.index_select(1 + dim, order), **hyper)
    expected = [W.index_select(dim, order) for W in path]
    tolerance = 1e-3 if method == "adamuon" else 2e-5  # adamuon: see ADAMUON_TOLERANCE in test_oracle.py
    assert oracle.disagreement(permuted, expected, initial.index_select(dim, order)) <= tolerance


# --------------------------------------------------------------------------------------------------- what D is like


def orthogonal(gradients: torch.Tensor, momentum: float = 0.0) -> list[torch.Tensor]:
    """The oracle's O in each step."""
    M, result = torch.zeros(()), []
    for G in gradients.double():
        M = oracle.ema(M, G, momentum)
        result.append(oracle.newton_schulz(M))
    return result


def changes(shape: tuple, gradients: torch.Tensor, **hyper: Any) -> list[torch.Tensor]:
    """Each step's own change of W, from W = 0, in the unit lr * s."""
    path = [W.double() for W in walk(torch.zeros(shape), gradients, **hyper)]
    unit = LR * oracle.muon_scale(*shape, "spectral")
    return [(old - new) / unit for old, new in zip([torch.zeros(shape), *path], path, strict=False)]


@each_shape
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99])
def test_normuon_keeps_the_length_of_O(beta2: float, shape: tuple) -> None:
    gradients = normal(4, *shape)
    gradients[:, :2] *= 5.0  # rows of different size
    moved = changes(shape, gradients, moment2_method="normuon", beta2=beta2, momentum=0.8)
    for change, O in zip(moved, orthogonal(gradients, 0.8), strict=True):
        torch.testing.assert_close(change.norm(), O.norm(), atol=0, rtol=2e-5)
        assert (change - O).norm() > 1e-3 * O.norm()  # and it is not O itself


@pytest.mark.parametrize("bias_correction", [False, True], ids=["", "corrected"])
@each_shape
def test_adamuon_without_memory_is_a_sign(shape: tuple, bias_correction: bool) -> None:
    gradients = normal(3, *shape)
    hyper = {"moment2_method": "adamuon", "beta2": 0.0, "eps": TINY, "bias_correction": bias_correction}
    for change, O in zip(changes(shape, gradients, momentum=0.0, **hyper), orthogonal(gradients), strict=True):
        certain = O.abs() > 1e-4  # nearer to 0 the sign is the rounding's
        assert certain.double().mean() > 0.95
        torch.testing.assert_close(change[certain], O.sign()[certain], atol=2e-5, rtol=0)


@each_shape
def test_namo_d_clamped_to_1_is_a_multiple_of_O(shape: tuple) -> None:
    gradients = normal(3, *shape)
    gradients[:, :, ::2] += 2.0
    freed, bound = (
        changes(shape, gradients, moment2_method="namo_d", momentum=0.8, namo_d_clamp=clamp) for clamp in (0.1, 1.0)
    )
    Os = orthogonal(gradients, 0.8)
    for change, O in zip(bound, Os, strict=True):
        multiple = (change * O).sum() / (O * O).sum()
        torch.testing.assert_close(change, multiple * O, atol=2e-5, rtol=0)
    assert (freed[-1] - multiple * Os[-1]).norm() > 0.01 * Os[-1].norm()  # without the clamp the columns do differ


# --------------------------------------------------------------------------------------------- nothing, and nearly


def all_options(method: str) -> list[dict[str, Any]]:
    """Every option that could divide by nothing."""
    scales = ["shape_scaling", "spectral", "unit_rms_norm"]
    choices = product([False, True], [None, False, True], scales, decays(method))
    return [
        {
            "moment2_method": method,
            "nesterov": nesterov,
            "bias_correction": bias_correction,
            "scale_mode": scale_mode,
            "weight_decay_method": decay,
        }
        for nesterov, bias_correction, scale_mode, decay in choices
    ]


def check_finite(optimizer: torch.optim.Optimizer) -> None:
    for p, state in optimizer.state.items():
        for name, value in {"weight": p.detach(), **state}.items():
            assert torch.as_tensor(value).isfinite().all(), f"{name} of a matrix {tuple(p.shape)}"


@each_shape
@each_method
def test_no_gradient_no_movement(method: str, shape: tuple) -> None:
    initial = normal(*shape)
    for hyper in all_options(method):
        optimizer = AdaptiveMuon([torch.nn.Parameter(initial.clone())], **NO_DECAY | hyper)
        path = oracle.walk(optimizer, torch.zeros(3, *shape))
        check_finite(optimizer)
        assert all(torch.equal(W, initial) for W in path), hyper
        oracle.walk(optimizer, normal(2, *shape))  # a first gradient after all
        check_finite(optimizer)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)], ids=lambda shape: "x".join(map(str, shape)))
@each_method
def test_empty_and_single(method: str, shape: tuple) -> None:
    for hyper in all_options(method):
        optimizer = AdaptiveMuon([torch.nn.Parameter(torch.ones(shape))], **hyper)
        oracle.walk(optimizer, [torch.full(shape, g) for g in (0.0, 1.0, -1.0)])
        check_finite(optimizer)


@each_shape
@each_method
def test_zero_rows_and_columns_stay(method: str, shape: tuple) -> None:
    initial, gradients = normal(*shape), normal(3, *shape, seed=1)
    gradients[:, 1] = gradients[:, :, 2:4] = 0
    for hyper in all_options(method):
        optimizer = AdaptiveMuon([torch.nn.Parameter(initial.clone())], **NO_DECAY | hyper)
        change = oracle.walk(optimizer, gradients)[-1] - initial
        check_finite(optimizer)
        assert not change[1].any() and not change[:, 2:4].any(), hyper
        assert change[0].any(), hyper


# ------------------------------------------------------------------------------------------- parameters as they come


@each_method
def test_a_parameter_without_gradient_is_left_alone(method: str) -> None:
    without, beside = (torch.nn.Parameter(normal(5, 4)) for _ in range(2))
    optimizer = AdaptiveMuon([without, beside], moment2_method=method, weight_decay=0.5)
    for _ in range(2):
        beside.grad = normal(5, 4, seed=1)
        optimizer.step()
    assert torch.equal(without, normal(5, 4)) and without not in optimizer.state
    assert not torch.equal(beside, normal(5, 4))


@pytest.mark.parametrize(("method", "decay"), PAIRS)
def test_a_gradient_is_only_read(method: str, decay: str) -> None:
    p = torch.nn.Parameter(normal(5, 4))
    optimizer = AdaptiveMuon([p], moment2_method=method, weight_decay_method=decay, weight_decay=0.3, nesterov=True)
    p.grad = normal(5, 4, seed=1)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(p.grad, normal(5, 4, seed=1))


def test_bias_is_corrected_as_in_the_methods_sources() -> None:
    corrected = {method for method in METHODS if registered.METHODS[method].bias_correction}
    assert corrected & {"adamuon", "normuon", "namo", "namo_d"} == {"namo_d"}


@pytest.mark.parametrize("bias_correction", [None, False, True])
@each_shape
@each_method
def test_state(method: str, shape: tuple, bias_correction: bool | None) -> None:
    optimizer = AdaptiveMuon([torch.zeros(shape)], moment2_method=method, bias_correction=bias_correction)
    oracle.walk(optimizer, normal(3, *shape))
    [state] = optimizer.state.values()
    m, n = shape
    V = {"adamuon": (m, n), "normuon": (m, 1) if m >= n else (1, n), "namo": (1,), "namo_d": (1, n)}
    V = V.get(method, tuple(state["moment2_buffer"].shape))
    corrected = registered.METHODS[method].bias_correction if bias_correction is None else bias_correction
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "momentum_buffer": (m, n),
        "moment2_buffer": V,
    } | ({"step": ()} if corrected else {})
    assert all(value.dtype == torch.float32 for value in state.values())
    assert state.get("step", 3) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_shape
@pytest.mark.parametrize(("method", "decay"), PAIRS)
def test_a_low_precision_weight_is_rounded_once(method: str, decay: str, shape: tuple, dtype: torch.dtype) -> None:
    low = torch.nn.Parameter(normal(*shape).to(dtype))
    full = torch.nn.Parameter(low.detach().float())
    hyper = {"moment2_method": method, "weight_decay_method": decay, "lr": 0.01, "weight_decay": 0.3, "nesterov": True}
    of_low, of_full = AdaptiveMuon([low], **hyper), AdaptiveMuon([full], **hyper)
    for G in normal(3, *shape, seed=1).to(dtype):
        [W] = oracle.walk(of_low, [G])
        [expected] = oracle.walk(of_full, [G])
        assert W.dtype == dtype and torch.equal(W, expected.to(dtype))
        for name in ("momentum_buffer", "moment2_buffer"):
            assert of_low.state[low][name].dtype == torch.float32, name
            assert torch.equal(of_low.state[low][name], of_full.state[full][name]), name
        full.data = W.float()  # both go on from the same weights
