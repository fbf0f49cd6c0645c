# SPDX-License-Identifier: Apache-2.0
"""AdaptiveMuon behaves as any torch optimizer: closures, schedulers, groups, copies, checkpoints."""

import copy
import gc
import io
import pickle
import weakref
from typing import get_args

import pytest
import torch
from side_by_side import legal, normal
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from emerging_optimizers.adaptive_muon import AdaptiveMuon, Moment2MethodT, pipeline
from emerging_optimizers.adaptive_muon.orthogonalize import newton_schulz
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz
from emerging_optimizers.adaptive_muon.update import BatchUpdate
from emerging_optimizers.orthogonalized_optimizers import AdaptiveMuon as Upstream


METHODS = get_args(Moment2MethodT)
SHAPES = [(6, 4), (4, 6), (5, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def matrices(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def assert_same(left, right):
    """The same weights and state, bit for bit."""
    (one, ones), (other, others) = left, right
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
    torch.testing.assert_close(one.state_dict()["state"], other.state_dict()["state"], atol=0, rtol=0)


def saved(optimizer):
    """The optimizer's state_dict after a round trip through torch.save with safe loading."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clones(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("method", METHODS)
def test_closure_is_evaluated_under_grad_and_its_loss_returned(method):
    model = nn.Linear(4, 3, bias=False)
    optimizer = AdaptiveMuon(model.parameters(), lr=1e-2, moment2_method=method)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 4)) - 10).square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    assert [optimizer.step(closure).item() for _ in range(5)] == losses
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


def test_scheduler_reaches_the_update():
    """Halving the rate halves the step; D does not depend on the rate."""
    changes = []
    for factor in (1.0, 0.5):
        params = matrices()
        optimizer = AdaptiveMuon(params, lr=1e-2, weight_decay=0, moment2_method="namo")
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, factor=factor: factor)
        before = clones(params)
        run(optimizer, params, [0])
        changes.append([b - p for p, b in zip(params, before, strict=True)])
    for whole, half in zip(*changes, strict=True):
        torch.testing.assert_close(whole, 2 * half, atol=1e-6, rtol=1e-5)


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5, eta_min=1e-5),
    "one cycle, cycling momentum": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=10),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=True),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_work(make):
    params = matrices()
    optimizer = AdaptiveMuon(params, lr=1e-2)
    scheduler, rates = make(optimizer), set()
    for step in range(4):
        run(optimizer, params, [step])
        scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 1 and all(p.isfinite().all() for p in params)


RATES = {
    "float32": torch.tensor(0.1),
    "float64": torch.tensor(0.1, dtype=torch.float64),
    "one element": torch.tensor([0.1], dtype=torch.float64),
    "bfloat16": torch.tensor(0.1, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["batches", "one by one"])
@pytest.mark.parametrize("decay", ["decoupled", "palm", "l2", "adaptive"])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_a_rate_on_the_cpu_is_its_number(rate, decay, one_by_one, dtype):
    """Of whatever dtype, and as it is now where a scheduler changes it in place."""
    params, others = matrices(dtype), matrices(dtype)
    method = "namo_d" if decay == "adaptive" else "normuon"
    options = {"weight_decay": 0.1, "weight_decay_method": decay, "moment2_method": method}
    numbers, tensors = (
        AdaptiveMuon(params, lr=float(rate), **options),
        AdaptiveMuon(others, lr=rate.clone(), **options),
    )
    for optimizer in (numbers, tensors) if one_by_one else ():
        optimizer.pre_weight_update_fn_inplace = lambda p, update: None
    for step in range(3):
        run(numbers, params, [step])
        run(tensors, others, [step])
        tensors.param_groups[0]["lr"].mul_(0.5)
        numbers.param_groups[0]["lr"] = float(tensors.param_groups[0]["lr"])
    assert_same_weights_and_buffers((numbers, params), (tensors, others))


def assert_same_weights_and_buffers(left, right):
    (one, ones), (other, others) = left, right
    for p, q in zip(ones, others, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(one.state[p], other.state[q], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["cosine", "one cycle, cycling momentum", "plateau"])
def test_schedulers_fill_a_rate_that_is_a_tensor(name):
    params, others = matrices(), matrices()
    pairs = [(AdaptiveMuon(params, lr=0.25), params), (AdaptiveMuon(others, lr=torch.tensor(0.25).double()), others)]
    schedulers = [SCHEDULERS[name](optimizer) for optimizer, _ in pairs]
    for step in range(4):
        for (optimizer, held), scheduler in zip(pairs, schedulers, strict=True):
            run(optimizer, held, [step])
            scheduler.step(*([1.0] if name == "plateau" else []))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert not torch.equal(params[0], matrices()[0])


@pytest.mark.parametrize("method", METHODS)
def test_added_group_is_as_one_given_at_construction(method):
    """Upstream's forgets beta2 and eps here."""
    early, late = matrices(), matrices()
    options = {"lr": 0.1, "beta2": 0.5, "momentum": 0.3, "eps": 1e-3}
    one = AdaptiveMuon([{"params": early[:1]}, {"params": early[1:], **options}], moment2_method=method)
    other = AdaptiveMuon(late[:1], moment2_method=method)
    other.add_param_group({"params": iter(late[1:]), **options})
    run(one, early, range(3))
    run(other, late, range(3))
    assert_same((one, early), (other, late))
    default = AdaptiveMuon(clones(early), moment2_method=method)
    run(default, default.param_groups[0]["params"], range(3))
    assert not torch.equal(default.param_groups[0]["params"][1], early[1])


def test_group_options_reach_the_update_each():
    """Each option of a group changes that group's result and no other group's."""
    for option in ({"lr": 0.2}, {"momentum": 0.1}, {"weight_decay": 0.9}, {"beta2": 0.1}, {"eps": 1.0}):
        params, others = matrices(), matrices()
        run(AdaptiveMuon([{"params": params[:1]}, {"params": params[1:]}]), params, range(3))
        run(AdaptiveMuon([{"params": others[:1]}, {"params": others[1:], **option}]), others, range(3))
        assert torch.equal(params[0], others[0])
        assert not torch.equal(params[1], others[1]), option


def test_zero_grad():
    params = matrices()
    optimizer = AdaptiveMuon(params)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("decay", ["decoupled", "l2"])
def test_gradients_are_left_as_they_were(decay):
    params = matrices()
    optimizer = AdaptiveMuon(params, weight_decay=0.5, weight_decay_method=decay)
    set_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("bias_correction", [None, True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_is_the_uninterrupted_run(method, dtype, bias_correction):
    options = {"lr": 1e-2, "moment2_method": method, "bias_correction": bias_correction}
    params = matrices(dtype)
    optimizer = AdaptiveMuon(params, **options)
    run(optimizer, params, range(3))
    resumed_params = clones(params)
    resumed = AdaptiveMuon(resumed_params, **options)
    resumed.load_state_dict(saved(optimizer))
    run(optimizer, params, range(3, 6))
    run(resumed, resumed_params, range(3, 6))
    assert_same((optimizer, params), (resumed, resumed_params))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("method", METHODS)
def test_copy_goes_on_alike(method, copied):
    options = {
        "nesterov": True,
        "extra_scale_factor": 0.2,
        "scale_mode": "shape_scaling",
        "coefficient_type": "simple",
    }
    params = matrices()
    optimizer = AdaptiveMuon(params, lr=1e-2, moment2_method=method, **options)
    torch.optim.lr_scheduler.LinearLR(optimizer)  # leaves its wrapper of step on the optimizer
    run(optimizer, params, range(2))
    other, other_params = copied((optimizer, params))
    run(optimizer, params, range(2, 4))
    run(other, other_params, range(2, 4))
    assert_same((optimizer, params), (other, other_params))
    other.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert other.moment2_method == method and other.param_groups[1]["eps"] == 1e-8


def test_state_is_lazy_and_frozen_parameters_get_none():
    params = matrices()
    optimizer = AdaptiveMuon(params)
    set_gradients(params[:1], 0)
    optimizer.step()
    assert set(optimizer.state) == set(params[:1])
    run(optimizer, params, [1])
    assert set(optimizer.state) == set(params)


def test_state_can_be_made_without_gradients():
    """Megatron does so before it loads a checkpoint."""
    params = matrices()
    optimizer = AdaptiveMuon(params, moment2_method="namo_d")
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
    assert all({*optimizer.state[p]} == {"momentum_buffer", "moment2_buffer", "step"} for p in params)


def test_names_are_kept():
    optimizer = AdaptiveMuon(nn.Linear(3, 2, bias=False).named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", METHODS)
def test_checkpoint_of_another_method_is_refused(method, other):
    params, others = matrices(), matrices()
    optimizer, target = AdaptiveMuon(params, moment2_method=method), AdaptiveMuon(others, moment2_method=other)
    run(optimizer, params, range(2))
    run(target, others, range(2))
    before = copy.deepcopy(target.state_dict())
    if method == other:
        target.load_state_dict(saved(optimizer))
        return
    with pytest.raises(ValueError) as error:
        target.load_state_dict(saved(optimizer))
    assert f'"{other}"' in str(error.value) and f"'{method}'" in str(error.value)
    assert target.state_dict()["param_groups"] == before["param_groups"]
    torch.testing.assert_close(target.state_dict()["state"], before["state"], atol=0, rtol=0)


def test_a_checkpoint_without_state_leaves_the_optimizer_its_method():
    """Of whatever method it is; else the optimizer's own next checkpoint would be of that."""
    params = matrices()
    optimizer = AdaptiveMuon(params, moment2_method="namo_d")
    optimizer.load_state_dict(saved(AdaptiveMuon(matrices(), moment2_method="namo")))
    run(optimizer, params, range(2))
    AdaptiveMuon(matrices(), moment2_method="namo_d").load_state_dict(saved(optimizer))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("theirs", ["adamuon", "normuon", "namo"])
def test_upstream_checkpoint_loads_into_its_method_only(method, theirs):
    params, others = matrices(), matrices()
    upstream = Upstream(params, 0.1, 0.9, 0.0, moment2_method=theirs)
    run(upstream, params, range(2))
    ours = AdaptiveMuon(others, moment2_method=method)
    if method == theirs:
        ours.load_state_dict(saved(upstream))
        assert ours.param_groups[0]["lr"] == 0.1 and ours.param_groups[0]["moment2_method"] == method
        return
    with pytest.raises(ValueError) as error:
        ours.load_state_dict(saved(upstream))
    assert f'"{method}"' in str(error.value) and f"'{theirs}'" in str(error.value)


@pytest.mark.parametrize("method", ["adamuon", "normuon", "namo"])
def test_upstream_checkpoint_of_a_shape_that_fits_several_methods_loads(method):
    """In a matrix of one column V of adamuon and of normuon look alike."""
    for shape in ((5, 1), (1, 1)):
        p = nn.Parameter(torch.ones(shape))
        upstream = Upstream([p], 0.1, 0.9, 0.0, moment2_method=method)
        run(upstream, [p], range(2))
        AdaptiveMuon([p], moment2_method=method).load_state_dict(saved(upstream))


def test_upstream_checkpoint_cannot_go_on_with_bias_correction():
    params = matrices()
    upstream = Upstream(params, 0.1, 0.9, 0.0, moment2_method="namo")
    run(upstream, params, range(2))
    with pytest.raises(ValueError, match="number of steps.*bias_correction=False"):
        AdaptiveMuon(matrices(), moment2_method="namo", bias_correction=True).load_state_dict(saved(upstream))


def test_step_count_is_dropped_where_nobody_counts_on():
    params = matrices()
    counting = AdaptiveMuon(params, moment2_method="namo", bias_correction=True)
    run(counting, params, range(2))
    silent = AdaptiveMuon(matrices(), moment2_method="namo", bias_correction=False)
    silent.load_state_dict(saved(counting))
    with pytest.raises(ValueError, match="number of steps"):
        counting.load_state_dict(saved(silent))


def test_checkpoint_of_other_shapes_or_another_optimizer_is_refused():
    params = matrices()
    optimizer = AdaptiveMuon(params, moment2_method="namo")
    run(optimizer, params, range(2))
    with pytest.raises(ValueError, match=r"momentum_buffer.*\(5, 5\).*got \(6, 4\)"):
        AdaptiveMuon(matrices()[::-1], moment2_method="namo").load_state_dict(saved(optimizer))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AdaptiveMuon([{"params": [p]} for p in params], moment2_method="namo").load_state_dict(saved(optimizer))
    adamw = torch.optim.AdamW(params)
    adamw.step()
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(saved(adamw))


def test_load_hooks_see_and_change_what_is_loaded():
    """Our checks come after the user's pre-hooks, our precision before the user's post-hooks."""
    params = matrices(torch.bfloat16)
    optimizer = AdaptiveMuon(params, moment2_method="namo")
    run(optimizer, params, range(2))
    checkpoint, seen = saved(optimizer), []

    def renamed(_, state_dict):
        return {"state": state_dict["old_state"], "param_groups": state_dict["param_groups"]}

    target = AdaptiveMuon(clones(params), moment2_method="namo")
    target.register_load_state_dict_pre_hook(renamed)
    target.register_load_state_dict_post_hook(
        lambda o: seen.extend(s["momentum_buffer"].dtype for s in o.state.values())
    )
    target.load_state_dict({"old_state": checkpoint["state"], "param_groups": checkpoint["param_groups"]})
    assert seen == [torch.float32] * 3
    assert not (
        len(target._optimizer_load_state_dict_pre_hooks) - 1 or len(target._optimizer_load_state_dict_post_hooks) - 1
    )


@pytest.mark.parametrize("method", METHODS)
def test_state_takes_what_the_documentation_says(method):
    """4 bytes a parameter plus vectors; 8 for adamuon; also for bfloat16 parameters."""
    p = nn.Parameter(torch.ones(64, 48, dtype=torch.bfloat16))
    optimizer = AdaptiveMuon([p], moment2_method=method)
    run(optimizer, [p], [0])
    size = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert (
        (8 if method == "adamuon" else 4) * p.numel() <= size <= (8 if method == "adamuon" else 4) * p.numel() + 4 * 65
    )


@pytest.mark.parametrize("method", METHODS)
def test_gradient_scaler_skips_an_overflow(method):
    params = matrices()
    optimizer = AdaptiveMuon(params, moment2_method=method)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = clones(params)
    scaler.scale(sum(p.sum() for p in params)).backward()
    params[0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) and not optimizer.state
    optimizer.zero_grad()
    scaler.scale(sum(p.sum() for p in params)).backward()
    scaler.step(optimizer)
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_syrk_without_a_fit_gpu_goes_on_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    params, others = matrices(), matrices()
    run(AdaptiveMuon(params, use_syrk=True), params, range(2))
    run(AdaptiveMuon(others), others, range(2))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize(("matrix", "taken"), [((8, 16), True), ((8, 12), False), ((9, 16), False)], ids=str)
def test_syrk_is_used_where_the_kernel_takes_the_matrix(monkeypatch, matrix, taken):
    """The kernel wants a GPU: here the matrix only says that it is on one, and upstream's function only listens."""
    asked = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    def listen(x, *, use_syrk, **_):
        asked.append(use_syrk)
        return x

    monkeypatch.setattr(newton_schulz.muon_utils, "newton_schulz", listen)
    x = torch.ones(matrix).as_subclass(OnGpu)
    NewtonSchulz("quintic", 5, True, "standard")(x)
    NewtonSchulz("quintic", 5, True, "standard")(torch.ones(matrix))
    NewtonSchulz("quintic", 5, False, "standard")(x)
    assert asked == [taken, False, False]


@pytest.mark.parametrize("capability", [None, (7, 5), (9, 0)], ids=str)
def test_syrk_is_trusted_where_upstream_trusts_it(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    optimizer = AdaptiveMuon(matrices(), use_syrk=True)
    assert optimizer.scaled_orthogonalize_fn.use_syrk is (capability == (9, 0) and newton_schulz.HAS_TRITON_340)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoint_loads_into_a_model_of_another_dtype(dtype):
    params, others = matrices(), matrices(dtype)
    optimizer, other = AdaptiveMuon(params, moment2_method="namo_d"), AdaptiveMuon(others, moment2_method="namo_d")
    run(optimizer, params, range(2))
    other.load_state_dict(saved(optimizer))
    run(other, others, [2])
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(other.state[p]["momentum_buffer"].dtype == expected for p in others)


def test_checkpoint_in_another_order_of_parameters_is_refused():
    """All shapes fit: only the names tell. New names alone are no reason to refuse."""
    named = [(name, nn.Parameter(torch.eye(3))) for name in "abc"]
    optimizer = AdaptiveMuon(named)
    run(optimizer, [p for _, p in named], range(2))
    with pytest.raises(ValueError, match=r"order.*\('a', 'c'\)"):
        AdaptiveMuon(named[::-1]).load_state_dict(saved(optimizer))
    AdaptiveMuon([(f"new.{name}", p) for name, p in named]).load_state_dict(saved(optimizer))
    AdaptiveMuon([p for _, p in named]).load_state_dict(saved(optimizer))


class Extended(AdaptiveMuon):
    """A subclass with an attribute and a state of its own, as upstream's hyperball variant has them."""

    def __init__(self, params, **options):
        self.radius = 2.0
        super().__init__(params, **options)

    def post_weight_update_fn_inplace(self, p):
        self.state[p].setdefault("norm", torch.linalg.norm(p.float()))
        p.mul_(self.radius / p.norm())


def test_subclass_keeps_its_attributes_and_state():
    params = matrices(torch.bfloat16)
    optimizer = Extended(params)
    run(optimizer, params, range(2))
    other, others = copy.deepcopy((optimizer, params))
    run(optimizer, params, [2])
    run(other, others, [2])
    assert_same((optimizer, params), (other, others))
    other.load_state_dict(saved(optimizer))
    assert all(
        torch.equal(other.state[q]["norm"], optimizer.state[p]["norm"]) for p, q in zip(params, others, strict=True)
    )
    assert all(other.state[q]["norm"].dtype == torch.float32 for q in others)


@pytest.mark.parametrize("decay", ["decoupled", "independent"])
def test_distributed_checkpoints_way_of_making_the_state_changes_no_weight(decay):
    """torch steps with a rate of zero and zero gradients, on saving and on loading."""
    model = nn.Linear(4, 3, bias=False)
    params, before = [model.weight], model.weight.detach().clone()
    optimizer = AdaptiveMuon(params, weight_decay_method=decay, moment2_method="namo_d")
    fresh = get_optimizer_state_dict(model, optimizer)
    assert torch.equal(model.weight, before)
    assert optimizer.state[model.weight]["step"] == 0
    run(optimizer, params, range(2))
    checkpoint, weight = copy.deepcopy(get_optimizer_state_dict(model, optimizer)), model.weight.detach().clone()
    assert fresh["state"].keys() == checkpoint["state"].keys()
    other = nn.Linear(4, 3, bias=False)
    other.load_state_dict(model.state_dict())
    resumed = AdaptiveMuon(other.parameters(), weight_decay_method=decay, moment2_method="namo_d")
    set_optimizer_state_dict(other, resumed, checkpoint)
    assert torch.equal(other.weight, weight)
    run(optimizer, params, [2])
    run(resumed, [other.weight], [2])
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("decay", ["decoupled", "independent", "palm", "adaptive", "cautious", "l2"])
def test_capturable_walks_the_same_path(method, decay):
    """With the count and the rate as tensors, and a schedule between the steps."""
    options = {"moment2_method": method, "weight_decay": 0.1, "weight_decay_method": decay, "bias_correction": True}
    if not legal(method, options):
        return
    params, others = matrices(), matrices()
    rate = torch.tensor(0.25)
    plain, captured = (
        AdaptiveMuon(params, lr=0.25, **options),
        AdaptiveMuon(others, lr=rate, capturable=True, **options),
    )
    for step in range(3):
        plain.param_groups[0]["lr"] = 0.25 / (1 + step)
        rate.fill_(0.25 / (1 + step))
        run(plain, params, [step])
        run(captured, others, [step])
    assert captured.param_groups[0]["lr"] is rate
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
        assert plain.state[p]["step"] == captured.state[q]["step"] == 3


def test_capturable_never_asks_for_a_value(monkeypatch):
    """Which a graph could not answer: neither of the rate nor of the count, in a step that has its state."""
    params = matrices()
    optimizer = AdaptiveMuon(params, lr=torch.tensor(0.25), capturable=True, moment2_method="namo_d", weight_decay=0.1)
    run(optimizer, params, [0])
    for name in ("item", "__bool__", "__float__", "tolist", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"a step called {name}"))
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_one_shape_are_a_stack(method):
    """And each goes as it would by itself, whenever it joined."""
    options = {"moment2_method": method, "fp32_matmul_prec": "highest", "bias_correction": True}
    shapes = [(24, 16)] * 3 + [(16, 24)] * 2
    together, alone = ([torch.nn.Parameter(normal(s, i)) for i, s in enumerate(shapes)] for _ in range(2))
    optimizers = [AdaptiveMuon(together, **options), *(AdaptiveMuon([p], **options) for p in alone)]
    batches: list[int] = []
    for step in range(4):
        batches.clear()
        for index, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = None if step < 2 and index == 1 else normal(p.shape, 10 * step + index)
            q.grad = None if p.grad is None else p.grad.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "BatchUpdate", lambda *args: batches.append(len(args[2])) or BatchUpdate(*args))
            optimizers[0].step()
        for optimizer in optimizers[1:]:
            optimizer.step()
    assert batches == [3, 2]
    for p, q, optimizer in zip(together, alone, optimizers[1:], strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
        assert optimizers[0].state[p]["step"] == optimizer.state[q]["step"]
        torch.testing.assert_close(
            optimizers[0].state[p]["moment2_buffer"], optimizer.state[q]["moment2_buffer"], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_function_that_works_in_place_leaves_the_momentum(method, count):
    """Also where a batch of one is a view of its buffer, as without Nesterov's look ahead."""
    params = [torch.nn.Parameter(normal((6, 4), index)) for index in range(count)]
    optimizer = AdaptiveMuon(params, moment2_method=method, momentum=0.5)
    optimizer.scaled_orthogonalize_fn = torch.Tensor.sign_
    for p in params:
        p.grad = normal(p.shape, 7)
    optimizer.step()
    for p in params:
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.5 * p.grad, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
def test_the_step_count_is_loaded_to_where_it_is_counted(capturable):
    """On the parameter's device for a graph to count, on the host otherwise; "meta" stands for a GPU."""
    params = matrices()
    saved = AdaptiveMuon(params, moment2_method="namo_d")
    run(saved, params, [0])
    others = [torch.nn.Parameter(p.detach().to("meta")) for p in params]
    resumed = AdaptiveMuon(others, moment2_method="namo_d", capturable=capturable)
    resumed.load_state_dict(saved.state_dict())
    assert {state["step"].device.type for state in resumed.state.values()} == {"meta" if capturable else "cpu"}
    assert {state["momentum_buffer"].device.type for state in resumed.state.values()} == {"meta"}


@pytest.mark.parametrize(
    "form",
    [int, float, torch.Tensor.bfloat16, torch.Tensor.long, lambda step: step.reshape(1)],
    ids=["int", "float", "bfloat16", "int64", "one element"],
)
def test_a_step_count_is_loaded_whatever_form_it_has_got(form):
    """A checkpoint that is converted to bfloat16 as a whole would count to 256 and no further."""
    params = matrices()
    optimizer = AdaptiveMuon(params, moment2_method="namo_d", bias_correction=True)
    run(optimizer, params, [0])
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for state in checkpoint["state"].values():
        state["step"] = form(state["step"].fill_(256))
    optimizer.load_state_dict(checkpoint)
    run(optimizer, params, [1])
    steps = [state["step"] for state in optimizer.state.values()]
    assert all(step == 257 and step.dtype == torch.float32 and step.shape == () for step in steps)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.9 and older allow no other dtype")
def test_a_gradient_may_have_another_dtype():
    """As ``grad_dtype`` allows: it is rounded to the dtype of the state, or is exact in it."""
    for dtype, of_gradient in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        p, q = (nn.Parameter(normal((6, 4)).to(dtype)) for _ in range(2))
        grad = normal((6, 4), 1).to(of_gradient)
        p.grad_dtype, p.grad, q.grad = of_gradient, grad, grad.to(dtype)
        for each in (p, q):
            AdaptiveMuon([each], lr=0.1, moment2_method="namo_d").step()
        assert torch.equal(p, q) and p.dtype == dtype


def test_a_model_converted_after_its_state_was_made():
    """It is refused before anything changes, and the remedy in the message works."""
    p = nn.Parameter(normal((6, 4)))
    optimizer = AdaptiveMuon([("w", p)], lr=0.1, weight_decay=0.5, moment2_method="namo_d")
    run(optimizer, [p], [0])
    p.grad = None
    p.data = p.data.double()
    p.grad, before, state = normal((6, 4), 1).double(), p.detach().clone(), copy.deepcopy(optimizer.state[p])
    with pytest.raises(
        ValueError,
        match=r"'w' must be in torch.float64 on cpu, got 'torch.float32 on cpu'. Call optimizer.load_state_dict",
    ):
        optimizer.step()
    assert torch.equal(p, before) and all(torch.equal(optimizer.state[p][key], state[key]) for key in state)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float64 and not torch.equal(p, before)


def test_a_step_at_rate_zero_counts_for_those_that_have_stepped():
    """Whatever is new beside them: only a step that makes all of the state is passed over, as checkpoints take it."""
    params = [nn.Parameter(normal((6, 4), index)) for index in range(2)]
    optimizer = AdaptiveMuon(params, lr=0.1, momentum=0.5, moment2_method="namo_d")
    params[0].grad = normal((6, 4), 2)
    optimizer.step()
    momentum = optimizer.state[params[0]]["momentum_buffer"].clone()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], momentum / 2)
    assert optimizer.state[params[0]]["step"] == 2


def test_a_refused_group_is_forgotten():
    optimizer = AdaptiveMuon([nn.Parameter(normal((6, 4)))])
    params = [nn.Parameter(normal((6, 4))), nn.Parameter(normal((6, 4)))]
    params[1].muon_blocks = (4, 4)
    kept = [weakref.ref(p) for p in params]
    with pytest.raises(ValueError, match="blocks"):
        optimizer.add_param_group({"params": params})
    del params
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
