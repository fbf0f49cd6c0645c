# SPDX-License-Identifier: Apache-2.0
"""HybridAdaptiveMuon: a composition that equals its two parts run apart, its groups and its checkpoints."""

import copy
import gc
import io
import pickle
import weakref
from collections import defaultdict
from typing import get_args

import pytest
import torch
from small_model import MATRICES, Model, model_and_optimizer, names_of, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon, Moment2MethodT


METHODS = get_args(Moment2MethodT)


def test_constructor_routes_what_it_can():
    model = Model()
    model.embed.weight.is_embedding_or_output_parameter = True
    model.scores.weight.is_embedding_or_output_parameter = True
    anonymous = HybridAdaptiveMuon(model.parameters())
    assert not {id(model.embed.weight), id(model.scores.weight), id(model.conv.weight), id(model.table)} & {
        id(p) for p in anonymous.param_groups[0]["params"]
    }
    named = HybridAdaptiveMuon(model.named_parameters())
    assert MATRICES <= names_of(named, True) and "blocks.0.pos_bias_u" in names_of(named, False)
    single = [nn.Parameter(torch.ones(1, 8)), nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.ones(2, 8))]
    assert [g["params"] for g in HybridAdaptiveMuon(single).param_groups] == [single[2:], single[:2]]
    forced = HybridAdaptiveMuon(
        [{"params": model.lstm.weight_ih_l0, "use_muon": False}, {"params": [*model.blocks.parameters()]}]
    )
    of_adamw = [group for group in forced.param_groups if not group["use_muon"]]
    assert of_adamw[0]["params"][0] is model.lstm.weight_ih_l0 and len(forced.param_groups) == 3
    with pytest.raises(ValueError, match=r"\(1, 5, 8\)"):
        HybridAdaptiveMuon([{"params": [model.table], "use_muon": True}])


def test_group_options_and_their_scalar_twins():
    p, q, r, s = (nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (3,), (4, 2), (4,)))
    groups = [
        {"params": [p, q], "lr": 0.5, "weight_decay": 0.25, "eps": 1e-3, "beta2": 0.5},
        {
            "params": [r, s],
            "lr": 0.5,
            "scalar_lr": 0.125,
            "scalar_weight_decay": 0.0,
            "scalar_eps": 1e-4,
            "betas": (0.1, 0.2),
        },
    ]
    made = HybridAdaptiveMuon(groups, weight_decay=0.75)
    of = {id(g["params"][0]): g for g in made.param_groups}
    assert [(of[id(x)]["lr"], of[id(x)]["weight_decay"], of[id(x)]["eps"]) for x in (p, q, r, s)] == [
        (0.5, 0.25, 1e-3),
        (0.5, 0.25, 1e-3),
        (0.5, 0.75, 1e-8),
        (0.125, 0.0, 1e-4),
    ]
    assert of[id(p)]["beta2"] == 0.5 and of[id(s)]["betas"] == (0.1, 0.2) and of[id(q)]["betas"] == (0.9, 0.999)
    assert [g["use_muon"] for g in made.param_groups] == [True, True, False, False]


def test_defaults_of_the_adamw_part():
    p, q = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    _, scalar = HybridAdaptiveMuon([p, q], lr=0.5, weight_decay=0.25).param_groups
    assert (scalar["lr"], scalar["weight_decay"]) == (0.5, 0.25)
    _, scalar = HybridAdaptiveMuon([p, q], lr=0.5, scalar_lr=0.0, scalar_weight_decay=0.0).param_groups
    assert (scalar["lr"], scalar["weight_decay"]) == (0.0, 0.0)
    assert tuple(HybridAdaptiveMuon([p, q], betas=[0.5, 0.6]).param_groups[1]["betas"]) == (0.5, 0.6)


@pytest.mark.parametrize("method", METHODS)
def test_equals_its_two_parts_run_apart(method):
    """Bit for bit AdaptiveMuon on the matrices and torch's own AdamW on the rest, schedulers included."""
    model, optimizer = model_and_optimizer(method, betas=(0.8, 0.9), scalar_eps=1e-6, scalar_weight_decay=0.5)
    other = copy.deepcopy(model)
    named = dict(other.named_parameters())
    apart = [
        AdaptiveMuon([named[n] for n in named if n in MATRICES], lr=1e-2, moment2_method=method),
        torch.optim.AdamW([named[n] for n in named if n not in MATRICES], 1e-3, (0.8, 0.9), 1e-6, 0.5),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 6) for o in (optimizer, *apart)]
    for step in range(5):
        train(model, optimizer, [step])
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad
        for each in apart:
            each.step()
        for scheduler in schedulers:
            scheduler.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_one_checkpoint_resumes_both(method, dtype):
    model, optimizer = model_and_optimizer(method, dtype=dtype)
    train(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    resumed_model, resumed = model_and_optimizer(method, dtype=dtype)
    train(resumed_model, resumed, [7])
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    train(resumed_model, resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True))
    torch.testing.assert_close(optimizer.state_dict()["state"], resumed.state_dict()["state"], atol=0, rtol=0)


@pytest.mark.parametrize("rounding", [False, True])
def test_a_checkpoint_in_memory_can_be_loaded_again_and_elsewhere(rounding):
    """It shares no tensor with an optimizer that it was loaded into, though torch would not copy it."""
    dtype = torch.bfloat16 if rounding else torch.float32
    model, optimizer = model_and_optimizer(dtype=dtype, stochastic_rounding=rounding)
    train(model, optimizer, range(2))
    weights, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    saved = copy.deepcopy(state)
    results = []
    for made in (model_and_optimizer(dtype=dtype, stochastic_rounding=rounding) for _ in range(2)):
        made[0].load_state_dict(weights)
        made[1].load_state_dict(state)
        train(*made, range(2, 4))
        results.append(made[0].state_dict())
        torch.testing.assert_close(state["state"], saved["state"], atol=0, rtol=0)
    torch.testing.assert_close(dict(results[0]), dict(results[1]), atol=0, rtol=0)
    train(model, optimizer, range(2, 4))
    torch.testing.assert_close(dict(results[0]), dict(model.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("made", [False, True], ids=["loaded", "made"])
def test_a_checkpoint_in_inference_mode_can_be_stepped_from_outside_of_it(dtype, made):
    """Whether it was loaded in inference mode, or its tensors were made in it."""
    model, optimizer = model_and_optimizer(dtype=dtype)
    train(model, optimizer, range(2))
    with torch.inference_mode(made):
        state = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode(not made):
        optimizer.load_state_dict(state)
    other, resumed = model_and_optimizer(dtype=dtype)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer), (other, resumed)):
        train(*each, range(2, 4))
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), atol=0, rtol=0)


@pytest.mark.parametrize("rounding", [False, True])
def test_what_a_user_has_put_into_the_state_is_loaded_as_it_was(rounding):
    """As wrappers do that average the weights."""
    dtype = torch.bfloat16 if rounding else torch.float32
    model, optimizer = model_and_optimizer(dtype=dtype, stochastic_rounding=rounding)
    train(model, optimizer, range(2))
    for p in model.parameters():
        optimizer.state[p].update(ema=p.detach().clone(), count=3)
    resumed = model_and_optimizer(dtype=dtype, stochastic_rounding=rounding)[1]
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.testing.assert_close(resumed.state_dict()["state"], optimizer.state_dict()["state"], atol=0, rtol=0)


def test_its_own_state_is_loaded_without_a_copy():
    """As torch.distributed.checkpoint loads it: a copy would double the memory."""
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(2))
    places = [value.data_ptr() for state in optimizer.state.values() for value in state.values() if value.ndim]
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    assert [v.data_ptr() for state in optimizer.state.values() for v in state.values() if v.ndim] == places


def test_checkpoint_of_another_method_or_routing_is_refused():
    model, optimizer = model_and_optimizer("namo")
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match="\"normuon\".*'namo'"):
        model_and_optimizer("normuon")[1].load_state_dict(optimizer.state_dict())
    p, q = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 3))
    one = HybridAdaptiveMuon([{"params": [p], "use_muon": True}, {"params": [q], "use_muon": True}])
    other = HybridAdaptiveMuon([{"params": [p], "use_muon": True}, {"params": [q], "use_muon": False}])
    with pytest.raises(ValueError, match=r"use_muon=False.*describe\(\)"):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copy_goes_on_alike(copied):
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(2))
    other_model, other = copied((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(other_model, other, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other_model.parameters(), strict=True))
    assert other.describe() == optimizer.describe()


def test_checkpoint_of_other_routes_is_refused():
    """Shapes and kinds of the groups fit: only the names tell."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    one, other = (HybridAdaptiveMuon.from_model(model, routes={f"{i}.weight": "adamw"}) for i in (0, 1))
    model(torch.ones(1, 3)).sum().backward()
    one.step()
    with pytest.raises(ValueError, match=r"\('1.weight', '0.weight'\).*routes"):
        other.load_state_dict(one.state_dict())
    assert not other.state


def test_groups_and_state_set_anew_are_the_ones_that_count():
    model, optimizer = model_and_optimizer()
    train(model, optimizer, [0])
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    train(model, optimizer, [1])
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert len(optimizer.state) == len(weights)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="in one group, and there once"):
        optimizer.add_param_group({"params": [("again", model.embed.weight)], "use_muon": True})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="'namo_d'"):
        model_and_optimizer("namo")[1].load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["use_muon"] = int(group["use_muon"])  # a round trip through a format that has no booleans
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["lr"] = 0.1
    query = model.blocks[0].query.weight
    before = query.detach().clone()
    train(model, optimizer, [2])
    assert not torch.equal(query, before)


def test_rates_set_from_outside_reach_both_parts_after_every_change_of_hands():
    """The groups and the state stay shared through loading and copying: at a rate of zero nothing moves."""
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(1))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer))), (model, optimizer)]
    for of, each in pairs:
        rates = [group["lr"] for group in each.param_groups]
        for still in (0, 1):
            for index, group in enumerate(each.param_groups):
                group["lr"] = 0.0 if index == still else rates[index]
            before = [[p.detach().clone() for p in group["params"]] for group in each.param_groups]
            train(of, each, range(1, 2))
            for index, (group, params) in enumerate(zip(each.param_groups, before, strict=True)):
                assert all(
                    torch.equal(*pair) == (index == still) for pair in zip(group["params"], params, strict=True)
                )
        assert each.state.keys() == {p for group in each.param_groups for p in group["params"]}


def test_what_has_left_the_groups_and_the_state_is_let_go():
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(1))
    alive = [weakref.ref(p) for p in model.parameters()]
    del model
    optimizer.param_groups.clear()
    optimizer.state.clear()
    gc.collect()
    assert not any(each() is not None for each in alive)


def test_a_pickle_carries_no_more_of_the_model_than_is_optimized():
    """And a copy does not keep the copied model's parameters alive."""
    model = nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 4))
    optimizer = HybridAdaptiveMuon.from_model(model, params=model[1].parameters())
    assert len(pickle.dumps(optimizer)) < 50_000
    model, optimizer = copy.deepcopy((model, optimizer))
    alive = [weakref.ref(p) for p in model[0].parameters()]
    del model
    gc.collect()
    assert not any(each() is not None for each in alive)


def test_capturable_on_a_device_without_graphs_is_refused_before_anything_moves():
    model, optimizer = model_and_optimizer(capturable=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"capturable=True parameters of AdamW must be on one of .*cuda.* got 'cpu'"):
        train(model, optimizer, range(1))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), atol=0, rtol=0)
    assert not any(optimizer.state.values())


def in_float64(p, state):
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.ones_like(p)


def on_another_device(p, state):
    state.update({key: value.to("meta") for key, value in state.items()})


def pruned(p, state):
    p.grad = None
    p.data = p.data[1:].clone()
    p.grad = torch.ones_like(p)


def without_averages(p, state):
    state.popitem()


def with_a_gradient_of_another_dtype(p, state):
    p.grad = None
    p.grad_dtype, p.grad = torch.float64, torch.ones_like(p, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (in_float64, r"of \(8,\) torch.float64 cpu; it holds, got .*exp_avg of \(8,\) torch.float32 cpu"),
        (on_another_device, r"of \(8,\) torch.float32 cpu; it holds, got .*exp_avg of \(8,\) torch.float32 meta"),
        (pruned, r"exp_avg and exp_avg_sq of \(7,\).*got .*exp_avg of \(8,\)"),
        (without_averages, r"must hold step, and exp_avg and exp_avg_sq.*got 'step, exp_avg of .*'\. Call"),
        (with_a_gradient_of_another_dtype, "in torch.float32, is in, got torch.float64. Convert it"),
    ],
    ids=["dtype", "device", "shape", "keys", "gradient"],
)
def test_a_step_that_adamw_cannot_make_changes_no_matrix(change, got):
    if change is with_a_gradient_of_another_dtype and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("torch 2.9 and older allow no other dtype")
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(2))
    p = model.blocks[0].query.bias
    change(p, optimizer.state[p])
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"][0]])
    with pytest.raises(ValueError, match=r"blocks\.0\.query\.bias'.*" + got):
        optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()["state"][0]]
    torch.testing.assert_close([*map(dict, after)], [*map(dict, before)], atol=0, rtol=0)


@pytest.mark.parametrize(
    "of_bias",
    [
        lambda state: {"momentum_buffer": state["exp_avg"]},
        lambda state: {**state, "exp_avg": state["exp_avg"][1:]},
        lambda state: {key: state[key] for key in ("step", "exp_avg")},
        lambda state: {key: state[key] for key in ("exp_avg", "exp_avg_sq")},
    ],
    ids=["another optimizer's", "another shape", "no second moment", "no step"],
)
def test_a_checkpoint_that_does_not_fit_adamw_changes_nothing(of_bias):
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(2))
    checkpoint, before = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    [place] = [
        place
        for group in checkpoint["param_groups"]
        for place, name in zip(group["params"], group["param_names"], strict=True)
        if name == "blocks.0.query.bias"
    ]
    checkpoint["state"][place] = of_bias(checkpoint["state"][place])
    with pytest.raises(
        ValueError, match=r"query\.bias' must hold step, and exp_avg and.*it holds, got .*the same model"
    ):
        optimizer.load_state_dict(checkpoint)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], atol=0, rtol=0)


def test_added_group_is_split_and_a_bad_one_changes_nothing():
    model, optimizer = model_and_optimizer()
    before = [copy.copy(g) for g in optimizer.param_groups], optimizer.describe()
    p, q = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    for bad in (
        {"params": [("new.weight", p), ("new.bias", q)], "scalar_lr": -1.0},
        {"params": [("new.weight", p), ("new.bias", q)], "lr": -1.0},
        {"params": [("again", model.blocks[0].query.weight)]},
        {"params": [("again", model.blocks[0].query.weight)], "use_muon": False},
        {"params": {p}},
    ):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(bad)
        assert (optimizer.param_groups, optimizer.describe()) == before
    optimizer.add_param_group({"params": [("new.weight", p), ("new.bias", q)], "lr": 0.5})
    assert [(g["use_muon"], g["lr"]) for g in optimizer.param_groups[2:]] == [(True, 0.5), (False, 0.5)]
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert (p != 1).all() and (q != 1).all() and "new.bias" in optimizer.describe()


def test_closure_and_one_kind_only():
    for model in (nn.Linear(3, 2, bias=False), nn.LayerNorm(3)):
        optimizer = HybridAdaptiveMuon.from_model(model, lr=1e-2)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (model(torch.arange(3.0)) - 1).square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(10)]
        assert losses[-1] < losses[0] and len(optimizer.param_groups) == 1


def test_one_cycle_schedule_and_gradient_scaler():
    model, optimizer = model_and_optimizer()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 1e-3], total_steps=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(6):
        optimizer.zero_grad()
        scaler.scale(model(torch.arange(6)[None]).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.param_groups[0]["lr"] != optimizer.param_groups[1]["lr"]


def test_model_groups_keep_their_options_and_the_models_routes():
    model = Model()
    groups = [
        {"params": [model.embed.weight, *model.blocks[0].parameters()], "lr": 0.5, "use_muon": None},
        {"params": [("mine", model.blocks[1].query.weight), model.scores.weight], "beta2": 0.5},
        {"params": model.blocks[1].out_proj.weight, "use_muon": False},
    ]
    optimizer = HybridAdaptiveMuon.from_model(model, 0.25, params=groups)
    of = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    left_out = {name for name, _ in model.named_parameters()} - of.keys()
    assert left_out == {
        name
        for name, _ in model.named_parameters()
        if name.split(".")[0] in ("positions", "table", "conv", "lstm") or name.startswith("blocks.1.norm")
    } | {"blocks.1.query.bias", "blocks.1.pos_bias_u"}
    assert {name: group["use_muon"] for name, group in of.items() if "weight" in name and "norm" not in name} == {
        "embed.weight": False,
        "blocks.0.query.weight": True,
        "blocks.0.out_proj.weight": True,
        "blocks.1.query.weight": True,
        "scores.weight": False,
        "blocks.1.out_proj.weight": False,
    }
    assert (of["embed.weight"]["lr"], of["blocks.0.query.weight"]["lr"], of["scores.weight"]["lr"]) == (0.5, 0.5, 0.25)
    assert (of["blocks.0.query.weight"]["beta2"], of["blocks.1.query.weight"]["beta2"]) == (0.95, 0.5)


def test_model_groups_must_be_of_the_model():
    foreign = nn.Parameter(torch.ones(3, 7))
    with pytest.raises(ValueError, match=r"parameters of the model, got \[\(3, 7\)\]"):
        HybridAdaptiveMuon.from_model(Model(), params=[foreign])


@pytest.mark.parametrize("copied", [False, True])
def test_added_later_routed_and_named_as_the_model_says(copied):
    model = Model()
    optimizer = HybridAdaptiveMuon.from_model(
        model, params=model.blocks[0].parameters(), routes={"blocks.1.query.weight": "adamw"}
    )
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    held = len(optimizer.param_groups)
    optimizer.add_param_group({"params": [*model.blocks[1].parameters(), model.embed.weight], "lr": 0.5})
    added = {name: group for group in optimizer.param_groups[held:] for name in group["param_names"]}
    assert added.keys() == {"embed.weight"} | {f"blocks.1.{name}" for name, _ in model.blocks[1].named_parameters()}
    assert {name for name, group in added.items() if group["use_muon"]} == {"blocks.1.out_proj.weight"}
    assert all(group["lr"] == 0.5 for group in added.values())
    assert "pattern 'blocks.1.query.weight'" in optimizer.describe()
    foreign = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [("conv", model.conv.weight), ("extra.weight", foreign)]})
    assert "extra.weight" in names_of(optimizer, True)
    assert "conv.weight" in names_of(optimizer, False)  # the model's name for it


def test_description_in_short():
    _, optimizer = model_and_optimizer()
    lines = optimizer.describe().splitlines()
    assert optimizer.describe(each=False).splitlines() == [line for line in lines if not line.startswith(" ")]


def test_what_is_frozen_is_counted_by_itself_and_learns_once_it_is_not():
    model, optimizer = model_and_optimizer(weight_decay=0.5)
    trained, start = optimizer.describe(each=False), copy.deepcopy(model.blocks[0])
    model.blocks[0].requires_grad_(False)
    counts = [line.split(": ")[1] for line in optimizer.describe(each=False).splitlines()]
    assert counts[0] == "2 parameters, 128 elements"
    assert counts[2] == f"6 parameters, {sum(p.numel() for p in model.blocks[0].parameters())} elements"
    train(model, optimizer, range(2))
    for p, q in zip(model.blocks[0].parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q) and p not in optimizer.state
    model.blocks[0].requires_grad_(True)
    assert optimizer.describe(each=False) == trained and trained.endswith("frozen: 0 parameters, 0 elements")
    train(model, optimizer, range(2, 4))
    for p, q in zip(model.blocks[0].parameters(), start.parameters(), strict=True):
        assert not torch.equal(p, q) and optimizer.state[p]


def test_a_quantized_matrix_is_no_obstacle() -> None:
    """It is frozen by its nature, and lies in the AdamW part, which passes over it."""
    model = torch.nn.Linear(6, 8)
    model.table = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    optimizer = HybridAdaptiveMuon.from_model(model)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert model.table.eq(1).all() and not optimizer.state.get(model.table)


@pytest.mark.parametrize(
    "rate", [torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1])], ids=["float64", "one element"]
)
def test_a_rate_on_the_cpu_gives_what_its_number_gives(rate):
    """To the last bits: torch's AdamW multiplies by the tensor."""
    if rate.ndim and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6's schedules fill tensors without dimensions only")
    generator, weights = torch.Generator().manual_seed(0), []
    start = [torch.randn(shape, generator=generator) for shape in ((6, 4), (5, 5), (5,))]
    for lr in (float(rate), rate.clone()):
        params = [nn.Parameter(p.clone()) for p in start]
        optimizer = HybridAdaptiveMuon(params, lr=lr, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
            schedule.step()
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1 / 4] * 2)
        weights.append(params)
    for p, q, before in zip(*weights, start, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
        assert not torch.equal(p, before)


def test_a_rate_that_is_a_tensor_is_scheduled_once_in_each_part():
    """A scheduler that changes it in place must not meet one tensor in two groups."""
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]
    optimizer = HybridAdaptiveMuon(params, lr=torch.tensor(0.5))
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    for loss in (1.0, 1.0):
        schedule.step(loss)
    torch.testing.assert_close([float(group["lr"]) for group in optimizer.param_groups], [0.05, 0.05])


def test_adamw_is_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the parameters only say that they are on one. A checkpoint goes on where there is none, and comes back."""

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class OnGpu(nn.Parameter):
        is_cuda = True

    def made(kind: type[nn.Parameter]) -> tuple[list[nn.Parameter], HybridAdaptiveMuon]:
        generator = torch.Generator().manual_seed(0)
        params = [kind(torch.randn(shape, generator=generator)) for shape in ((6, 4), (5,), (3,))]
        return params, HybridAdaptiveMuon(params, lr=0.05)

    def trained(params: list[nn.Parameter], optimizer: HybridAdaptiveMuon, steps: range) -> None:
        for step in steps:
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    (params, plain), (others, fused) = made(nn.Parameter), made(OnGpu)
    trained(params, plain, range(3))
    trained(others, fused, range(3))
    assert [bool(group.get("fused")) for group in fused.param_groups] == [False, True]
    assert not any(group.get("fused") for group in plain.param_groups)
    for kind in (nn.Parameter, OnGpu):
        state, before = fused.state_dict(), [p.detach().clone() for p in others]
        others, fused = made(kind)
        fused.load_state_dict(state)
        for p, value in zip(others, before, strict=True):
            p.data.copy_(value)
        steps = range(3, 6) if kind is nn.Parameter else range(6, 9)
        trained(others, fused, steps)
        trained(params, plain, steps)
        assert any(group.get("fused") for group in fused.param_groups) is (kind is OnGpu)
        assert {float(fused.state[p]["step"]) for p in others[1:]} == {float(steps.stop)}
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
