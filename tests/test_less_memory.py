# SPDX-License-Identifier: Apache-2.0
"""Weights and momenta in bfloat16 that are rounded stochastically: what a step does, saves and resumes."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from side_by_side import assert_resumes, assert_same, each_method, normal, saved
from small_model import model_and_optimizer, train
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon, adamw
from emerging_optimizers.orthogonalized_optimizers import adaptive_muon as upstream


HYPER: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1, "fp32_matmul_prec": "highest"}
LESS: dict[str, dict[str, Any]] = {
    "weights": {"stochastic_rounding": True},
    "momentum": {"momentum_dtype": "bfloat16"},
    "both": {"stochastic_rounding": True, "momentum_dtype": "bfloat16"},
}
each_saving = pytest.mark.parametrize("less", LESS.values(), ids=LESS)
# Whole, with blocks that repeat, a stack, a stack with blocks, and what is stored transposed.
KINDS: list[tuple[tuple[int, ...], Any, bool]] = [
    ((24, 16), None, False),
    ((24, 16), None, False),
    ((24, 10), (4, 2), False),
    ((3, 16, 12), None, False),
    ((2, 16, 12), (12, 4), False),
    ((16, 24), (12, 12), True),
]


def matrices(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    """Parameters of every kind, whose values bfloat16 has."""
    params = []
    for seed, (shape, blocks, transposed) in enumerate(KINDS):
        p = nn.Parameter(normal(shape, seed).bfloat16().to(dtype))
        p.muon_stacked, p.muon_transposed = p.ndim == 3, transposed
        if blocks:
            p.muon_blocks = blocks
        params.append(p)
    return params


def give_gradients(params: Iterable[torch.Tensor], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = normal(tuple(p.shape), 100 * step + index).to(p.dtype)


def walk(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()


def made(params: list[nn.Parameter], method: str = "namo", kind: Any = AdaptiveMuon, **options: Any) -> Any:
    return kind(params, moment2_method=method, **HYPER | options)


def is_neighbor(rounded: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Where one is a neighbor in bfloat16 of the other, or the other itself; of zeros, both."""
    bits, nearest = rounded.float().view(torch.int32) >> 16, value.view(torch.int32) >> 16
    return (bits == nearest) | ((bits == nearest + 1) & (value.bfloat16().float() != value))


class Hooked(AdaptiveMuon):
    """One with a function before the update, which makes it go one by one."""

    def pre_weight_update_fn_inplace(self, p: torch.Tensor, update: torch.Tensor) -> None:
        """Change nothing."""


# --------------------------------------------------------------------------------------------------- what a step does


@each_method
def test_weights_are_neighbors_of_those_in_float32(method: str) -> None:
    """Not always the nearest, in equal parts above and below."""
    params, exact = matrices(), matrices(torch.float32)
    optimizer, other = made(params, method, stochastic_rounding=True), made(exact, method)
    give_gradients(params, 1)
    for p, q in zip(params, exact, strict=True):
        q.grad = p.grad.float()  # type: ignore[union-attr]
    optimizer.step()
    other.step()
    above, errors = [], []
    for p, q in zip(params, exact, strict=True):
        assert is_neighbor(p.detach(), q.detach()).all()
        above.append((p.detach().float() > q.detach()).flatten())
        errors.append((p.detach().float() - q.detach()).flatten() / q.detach().abs().flatten())
        assert (p.detach() != q.detach().bfloat16()).any()
    share, error = torch.cat(above).double().mean(), torch.cat(errors).double()
    assert 0.4 < share < 0.6
    assert abs(error.mean()) < 5 * error.std() / len(error) ** 0.5


@pytest.mark.parametrize("kind", [AdaptiveMuon, Hooked], ids=["", "one by one"])
def test_small_updates_are_not_lost(kind: type[AdaptiveMuon]) -> None:
    """Updates of a twentieth of the precision: to nearest nothing moves, and by chance all goes the way of float32."""
    shape, gradient = (64, 48), normal((64, 48), 1)
    W = normal(shape).bfloat16().clamp(-2, 2)
    W[W.abs() < 0.5] = 1.0
    options = {"lr": 3e-5, "weight_decay": 0.05, "momentum": 0.0}
    paths = {}
    for name, dtype, stochastic in (
        ("exact", torch.float32, False),
        ("nearest", torch.bfloat16, False),
        ("chance", torch.bfloat16, True),
    ):
        p = nn.Parameter(W.to(dtype, copy=True))
        optimizer = made([p], kind=kind, **options, stochastic_rounding=stochastic)
        for _ in range(200):
            p.grad = gradient.to(dtype)
            optimizer.step()
        paths[name] = (p.detach().float() - W.float()).double()
    moved = paths["exact"]
    assert not paths["nearest"].any() and 0.001 < moved.abs().mean() < 0.02
    share = float((paths["chance"] * moved).sum() / (moved * moved).sum())
    assert abs(share - 1) < 0.05


@each_method
def test_the_momentum_is_a_neighbor_of_the_average(method: str) -> None:
    params, exact = matrices(torch.float32), matrices(torch.float32)
    optimizer, other = made(params, method, momentum_dtype="bfloat16"), made(exact, method)
    for each in (optimizer, other):
        walk(each, [1])
    for p, q in zip(params, exact, strict=True):
        M, average = optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"]
        assert M.dtype == torch.bfloat16 and is_neighbor(M, average).all()
        assert (M != average.bfloat16()).any()
        assert all(
            value.dtype == torch.float32 for key, value in optimizer.state[p].items() if key != "momentum_buffer"
        )
        # The first M' is made of the average itself.
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


def test_the_state_of_namo_takes_two_bytes_per_parameter() -> None:
    params = [nn.Parameter(normal((300, 200), seed).bfloat16()) for seed in range(2)]
    optimizer = made(params, "namo", momentum_dtype="bfloat16")
    walk(optimizer, [0])
    bytes_each = [sum(value.nbytes for value in optimizer.state[p].values()) for p in params]
    assert bytes_each == [2 * 60_000 + 8] * 2  # V and the step count


@each_saving
@each_method
def test_capturable_rounds_alike(method: str, less: dict[str, Any]) -> None:
    params, others = matrices(), matrices()
    plain, captured = made(params, method, **less), made(others, method, **less, capturable=True)
    for each in (plain, captured):
        walk(each, range(3))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, atol=2e-2, rtol=2e-2)
        assert (p != q).double().mean() < 0.01  # but for the last bits of D, which is corrected on the device


@each_saving
def test_no_generator_is_read_or_moved(less: dict[str, Any]) -> None:
    params, others = matrices(), matrices()
    torch.manual_seed(1)
    walk(made(params, **less), range(2))
    before = torch.get_rng_state()
    torch.manual_seed(2)
    walk(made(others, **less), range(2))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, params, others))


def test_equal_parameters_and_equal_steps_have_noise_of_their_own() -> None:
    twins = [nn.Parameter(normal((24, 16)).bfloat16()) for _ in range(2)]
    optimizer = made(twins, stochastic_rounding=True)
    for p in twins:
        p.grad = normal((24, 16), 1).bfloat16()
    optimizer.step()
    assert 0.1 < (twins[0] != twins[1]).double().mean() < 0.6


def test_nothing_that_a_step_rounds_shares_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and momenta, of parameters in two groups, and their blocks: each has a key of its own."""
    from emerging_optimizers.adaptive_muon import rounding

    make_keys, seen = rounding.make_keys, list[tuple[int, ...]]()

    def recorded(prefixes: Any, *others: Any, **options: Any) -> torch.Tensor:
        seen.extend(prefixes)
        return make_keys(prefixes, *others, **options)

    monkeypatch.setattr(rounding, "make_keys", recorded)
    params, others = matrices(), matrices()
    optimizer = made([{"params": params}, {"params": others}], **LESS["both"])  # type: ignore[list-item]
    give_gradients([*params, *others], 1)
    optimizer.step()
    assert len(seen) == len(set(seen)) > 2 * len([*params, *others])


def test_equal_parameters_of_adamw_have_noise_of_their_own() -> None:
    twins = [nn.Parameter(normal((24, 16)).bfloat16()) for _ in range(2)]
    for p in twins:
        p.use_muon = False  # type: ignore[attr-defined]
    optimizer = made(twins, kind=HybridAdaptiveMuon, stochastic_rounding=True)
    for p in twins:
        p.grad = normal((24, 16), 1).bfloat16()
    optimizer.step()
    assert 0.05 < (twins[0] != twins[1]).double().mean() < 0.6


def test_a_gradient_that_stays_away_changes_no_other_parameters_noise() -> None:
    params, others = matrices(), matrices()
    one, two = made(params, stochastic_rounding=True), made(others, stochastic_rounding=True)
    for each, optimizer, missing in ((params, one, None), (others, two, 0)):
        give_gradients(each, 1)
        if missing is not None:
            each[missing].grad = None
        optimizer.step()
    assert not torch.equal(params[0], others[0]) and all(map(torch.equal, params[2:], others[2:]))


def test_float32_weights_are_what_they_were() -> None:
    params, others = matrices(torch.float32), matrices(torch.float32)
    walk(made(params, stochastic_rounding=True), range(2))
    walk(made(others), range(2))
    assert all(map(torch.equal, params, others))


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("kind", [AdaptiveMuon, HybridAdaptiveMuon])
@pytest.mark.parametrize(
    ("options", "dtype", "words"),
    [
        ({"stochastic_rounding": True}, torch.float16, ("stochastic_rounding=True", "bfloat16", "parameter 0")),
        ({"momentum_dtype": "bfloat16"}, torch.float64, ('momentum_dtype="bfloat16"', "float64", "parameter 0")),
    ],
    ids=["float16", "float64"],
)
def test_a_dtype_that_does_not_go_is_refused(kind: Any, options: Any, dtype: torch.dtype, words: Any) -> None:
    with pytest.raises(ValueError, match="must") as refused:
        made([nn.Parameter(torch.ones(4, 3, dtype=dtype))], kind=kind, **options)
    assert all(word in str(refused.value) for word in words)
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = made([p], kind=kind, **options)
    before = p.data.to(dtype)
    p.data, p.grad = before, None
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="must"):  # converted since
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 3, dtype=dtype))


# ---------------------------------------------------------------------------------------------------------- checkpoints


@each_saving
@each_method
def test_it_resumes_bit_for_bit(method: str, less: dict[str, Any]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        params, others = matrices(dtype), matrices(dtype)
        left, right = (made(params, method, **less), params), (made(others, method, **less), others)
        assert_resumes(left, right, walk)
    copied = copy.deepcopy(left[0])
    copies = [p for group in copied.param_groups for p in group["params"]]
    for each in (left[0], copied):
        walk(each, [9])
    assert_same(left, (copied, copies))


def test_a_float32_momentum_loads_into_bfloat16_and_back() -> None:
    """To the nearest, since one rounding is not many; bfloat16 in float32 is exact."""
    params, less, more = matrices(), matrices(), matrices()
    full = made(params)
    walk(full, range(2))
    short = made(less, momentum_dtype="bfloat16")
    short.load_state_dict(saved(full))
    back = made(more)
    back.load_state_dict(saved(short))
    for p, q, r in zip(params, less, more, strict=True):
        M = full.state[p]["momentum_buffer"]
        assert torch.equal(short.state[q]["momentum_buffer"], M.bfloat16()) and (M.bfloat16() != M).any()
        assert torch.equal(back.state[r]["momentum_buffer"], M.bfloat16().float())
        assert short.state[q]["step"] == 2**20 and "step" not in back.state[r]
    for each in (short, back):
        walk(each, [2])


@each_saving
def test_upstreams_checkpoint_loads(less: dict[str, Any]) -> None:
    p, q = nn.Parameter(normal((24, 16))), nn.Parameter(normal((24, 16)).bfloat16())
    of_upstream = upstream.AdaptiveMuon([p], momentum=0.95, moment2_method="namo", **HYPER)
    walk(of_upstream, range(2))
    optimizer = made([q], **less)
    optimizer.load_state_dict(saved(of_upstream))
    M = optimizer.state[q]["momentum_buffer"]
    assert torch.equal(M, of_upstream.state[p]["momentum_buffer"].to(M.dtype))
    walk(optimizer, [2])


def test_a_checkpoint_without_a_count_corrects_no_bias_later() -> None:
    """Its averages have forgotten that they started at zero, so that a count of the steps since would be wrong."""
    params, others, thirds = matrices(), matrices(), matrices()
    first = made(params, bias_correction=False)
    walk(first, range(30))
    rounding = made(others, bias_correction=False, stochastic_rounding=True)
    rounding.load_state_dict(saved(first))
    corrected, plain = made(thirds, bias_correction=True), made(matrices(), bias_correction=False)
    corrected.load_state_dict(saved(rounding))
    plain.load_state_dict(saved(rounding))
    for each in (corrected, plain):
        walk(each, [31])
    for p, q in zip(*(each.param_groups[0]["params"] for each in (corrected, plain)), strict=True):
        torch.testing.assert_close(p, q, atol=0, rtol=0)


def test_a_model_that_was_converted_must_load_its_state_again() -> None:
    p = nn.Parameter(normal((24, 16)))
    optimizer = made([p], momentum_dtype="bfloat16")
    walk(optimizer, [0])
    optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].float()
    p.data, p.grad = p.data.bfloat16(), None
    with pytest.raises(ValueError, match=r"momentum of parameter 0 of its group must be in torch\.bfloat16"):
        walk(optimizer, [1])
    optimizer.load_state_dict(optimizer.state_dict())
    walk(optimizer, [1])


# --------------------------------------------------------------------------------------------------------- AdamW's part


def scalars(dtype: torch.dtype) -> list[nn.Parameter]:
    """What goes to AdamW: of no, one, and three dimensions, and an embedding."""
    params = [
        nn.Parameter((1 + normal(shape, 9) / 4).bfloat16().to(dtype)) for shape in ((), (50,), (3, 4, 5), (30, 20))
    ]
    params[-1].use_muon = False  # type: ignore[attr-defined]
    return params


def test_adamws_part_steps_as_in_float32_and_is_rounded() -> None:
    """With states in float32. To nearest, an update of a hundredth of the precision would change nothing."""
    options = {"scalar_lr": 2e-5, "scalar_weight_decay": 0.1, "stochastic_rounding": True}
    params, exact = scalars(torch.bfloat16), scalars(torch.float32)
    optimizer, other = (made(each, kind=HybridAdaptiveMuon, **options) for each in (params, exact))
    before = [p.detach().float().clone() for p in params]
    for step in range(400):
        give_gradients(params, 1 if step % 3 else 2)
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.float()  # type: ignore[union-attr]
        optimizer.step()
        other.step()
        if step == 0:
            assert all(is_neighbor(p.detach(), q.detach()).all() for p, q in zip(params, exact, strict=True))
    moved = torch.cat([(p.detach().float() - b).flatten() for p, b in zip(params, before, strict=True)]).double()
    expected = torch.cat([(q.detach() - b).flatten() for q, b in zip(exact, before, strict=True)]).double()
    assert abs(float((moved * expected).sum() / (expected * expected).sum()) - 1) < 0.1
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
        assert p.grad is not None and p.grad.dtype == torch.bfloat16
    assert optimizer.state.keys() == {*params}


@pytest.mark.parametrize("at_once", [1, 7, 64, 600])
def test_adamws_part_by_rows_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Its states too, at the first step and after; of what has no view as a matrix, all at once."""
    params, twins = [*scalars(torch.bfloat16)], [*scalars(torch.bfloat16)]
    for each in (params, twins):
        each.append(nn.Parameter(normal((20, 30), 3).bfloat16().mT))
        each[-1].use_muon = False  # type: ignore[attr-defined]
        each.append(nn.Parameter(torch.empty(0, 5, dtype=torch.bfloat16)))
        each[-1].use_muon = False  # type: ignore[attr-defined]
    groups: list[list[dict[str, Any]]] = [
        [{"params": each[:3]}, {"params": each[3:], "lr": 1e-2}] for each in (params, twins)
    ]
    options = {"scalar_lr": 1e-3, "scalar_weight_decay": 0.1, "stochastic_rounding": True}
    optimizer, other = (made(each, kind=HybridAdaptiveMuon, **options) for each in groups)
    for step in range(4):
        give_gradients(params, step)
        give_gradients(twins, step)
        params[1].grad = twins[1].grad = None if step == 0 else params[1].grad  # whose state comes later
        optimizer.step()
        with monkeypatch.context() as patch:
            patch.setattr(adamw, "AT_ONCE", at_once)
            other.step()
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q)
            assert optimizer.state[p].keys() == other.state[q].keys()
            for key, value in optimizer.state[p].items():
                assert torch.equal(value, other.state[q][key]) and value.dtype == other.state[q][key].dtype, key
        if step == 1:
            other.load_state_dict(saved(optimizer))


def test_few_elements_of_adamws_part_have_copies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "AT_ONCE", 64)
    params = [
        nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((5,), (20,), (30, 20), (40,), (4, 16))
    ]
    for p in params:
        p.use_muon, p.grad = False, torch.ones_like(p)  # type: ignore[attr-defined]
    optimizer = made(params, kind=HybridAdaptiveMuon, stochastic_rounding=True)
    sizes: list[list[int]] = []

    def note(stepping: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(stepping, torch.optim.AdamW):
            sizes.append([p.numel() for group in stepping.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(note)
    optimizer.step()
    handle.remove()
    assert [*filter(None, sizes)] == [[5, 20], *[[60]] * 10, [40], [64]]


def test_a_whole_model_resumes_bit_for_bit() -> None:
    options = {**LESS["both"], "dtype": torch.bfloat16}
    (model, optimizer), (twin, resumed) = (model_and_optimizer(**options) for _ in range(2))
    train(model, optimizer, range(2))
    train(twin, resumed, range(5, 6))
    resumed.load_state_dict(saved(optimizer))
    twin.load_state_dict(model.state_dict())
    assert_same((optimizer, [*model.parameters()]), (resumed, [*twin.parameters()]))
    for each in ((model, optimizer), (twin, resumed)):
        train(*each, range(2, 4))
    assert_same((optimizer, [*model.parameters()]), (resumed, [*twin.parameters()]))
    assert all(
        value.dtype == torch.float32
        for state in optimizer.state.values()
        for key, value in state.items()
        if "exp" in key
    )


def test_a_run_goes_over_to_stochastic_rounding_and_back() -> None:
    model, plain = model_and_optimizer(dtype=torch.bfloat16)
    train(model, plain, range(2))
    twin, rounding = model_and_optimizer(dtype=torch.bfloat16, **LESS["both"])
    rounding.load_state_dict(saved(plain))
    train(twin, rounding, range(2, 3))
    plain.load_state_dict(saved(rounding))
    train(model, plain, range(2, 3))


def test_float16_is_refused_for_adamw_too() -> None:
    with pytest.raises(ValueError, match="weights in 16 bit must be in bfloat16"):
        made([nn.Parameter(torch.ones(3, dtype=torch.float16))], kind=HybridAdaptiveMuon, stochastic_rounding=True)
    made([nn.Parameter(torch.ones(3, dtype=torch.float64))], kind=HybridAdaptiveMuon, momentum_dtype="bfloat16")
