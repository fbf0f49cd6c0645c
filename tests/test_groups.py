# SPDX-License-Identifier: Apache-2.0
"""Parameter groups: what the two halves of a split one keep, and groups that are added later."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from small_model import Model, names_of
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.routing.rules import route_model


def layer(outputs=3, inputs=2):
    return nn.Linear(inputs, outputs)


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def values(optimizer, key):
    return [group.get(key) for group in optimizer.param_groups]


# ---- params that can be read once ----


@pytest.mark.parametrize(
    "params",
    [
        nn.Module.parameters,
        nn.Module.named_parameters,
        lambda m: (p for p in m.parameters()),
        lambda m: filter(lambda p: p.requires_grad, m.parameters()),
        lambda m: map(lambda p: p, m.parameters()),
        lambda m: dict(m.named_parameters()).values(),
        lambda m: dict(m.named_parameters()).items(),
        lambda m: tuple(m.parameters()),
        lambda m: nn.ParameterList(m.parameters()),
    ],
    ids=["parameters", "named_parameters", "generator", "filter", "map", "values", "items", "tuple", "ParameterList"],
)
def test_params_of_a_group_may_be_any_iterable(params):
    model, later = nn.Sequential(layer(), layer(4, 3)), nn.Sequential(layer(), layer(4, 3))
    for make in (HybridAdaptiveMuon, lambda groups: HybridAdaptiveMuon.from_model(model, params=groups)):
        optimizer = make([{"params": params(part)} for part in model])
        optimizer.add_param_group({"params": params(later)})
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        assert trained == {*model.parameters(), *later.parameters()}


# ---- names of groups ----


@pytest.mark.parametrize("key", ["name", "group_name"])
def test_halves_have_names_that_tell_them_apart(key):
    body, top, norm = layer(), layer(), nn.LayerNorm(3)
    groups = [
        {"params": [*body.parameters()], key: "body"},
        {"params": [*top.parameters()], key: "top"},
        {"params": [*norm.parameters()], key: "norm"},
        {"params": [nn.Parameter(torch.ones(2, 2))], key: "matrix"},
    ]
    optimizer = HybridAdaptiveMuon(groups)
    assert values(optimizer, key) == [
        *("body/adaptive_muon", "top/adaptive_muon", "matrix"),
        *("body/adamw", "top/adamw", "norm"),
    ]
    optimizer.add_param_group({"params": [*layer().parameters()], key: "later"})
    assert values(optimizer, key)[-2:] == ["later/adaptive_muon", "later/adamw"]
    names = values(optimizer, key)
    step(optimizer)
    other = HybridAdaptiveMuon([copy.deepcopy(group) for group in groups])
    other.add_param_group({"params": [*layer().parameters()], key: "later"})
    other.load_state_dict(optimizer.state_dict())
    assert values(other, key) == values(copy.deepcopy(optimizer), key) == names
    assert [group[key] for group in groups] == ["body", "top", "norm", "matrix"], "the user's own stay as they are"


def test_a_users_name_is_not_given_twice():
    groups = [
        {"params": [*layer().parameters()], "name": "body"},
        {"params": [nn.Parameter(torch.ones(3))], "name": "body/adamw"},
    ]
    for order in (groups, groups[::-1]):
        optimizer = HybridAdaptiveMuon([dict(group) for group in order])
        assert sorted(values(optimizer, "name")) == ["body/adamw", "body/adamw_", "body/adaptive_muon"]
    optimizer.add_param_group({"params": [*layer().parameters()], "name": "body"})
    assert len(set(values(optimizer, "name"))) == 5, "nor one that an earlier half has"


def test_groups_of_another_optimizer_keep_their_names():
    """As wrappers do that make the inner optimizer from their own groups."""
    first = HybridAdaptiveMuon([{"params": [*layer().named_parameters()], "name": "body"}])
    second = HybridAdaptiveMuon(first.param_groups)
    for key in ("name", "use_muon", "param_names"):
        assert values(second, key) == values(first, key)
    third = HybridAdaptiveMuon([{"params": [*layer().parameters()], "param_names": ["weight", "bias"]}])
    assert values(third, "param_names") == [["weight"], ["bias"]]
    with pytest.raises(ValueError, match="param_names.* 2 params, got 1"):
        HybridAdaptiveMuon([{"params": [*layer().parameters()], "param_names": ["weight"]}])


def test_lists_of_an_entry_for_each_parameter_are_split_with_them():
    model = layer(), nn.LayerNorm(3)
    params = [p for module in model for p in module.parameters()]
    options = {
        "layers": [1, 1, 2, 2],
        "scales": [0.5, 1.0, 1.5, 2.0],
        "lr_scale": 0.5,
        "shape": (1, 2, 3, 4),
        "tags": ["a"],
    }
    muon, rest = HybridAdaptiveMuon([{"params": params, **options}]).param_groups
    assert (muon["layers"], muon["scales"], rest["layers"], rest["scales"]) == ([1], [0.5], [1, 2, 2], [1.0, 1.5, 2.0])
    for group in (muon, rest):
        assert (group["lr_scale"], group["shape"], group["tags"]) == (0.5, (1, 2, 3, 4), ["a"])
    (_, rest) = HybridAdaptiveMuon([{"params": [*layer().parameters()], "betas": [0.5, 0.6]}]).param_groups
    assert rest["betas"] == [0.5, 0.6]


def test_a_schedulers_base_rate_is_that_of_the_half():
    group = {"params": [*layer().parameters()], "lr": 0.25, "initial_lr": 0.5, "scalar_lr": 0.125}
    optimizer = HybridAdaptiveMuon([group])
    assert values(optimizer, "initial_lr") == [0.5, 0.25]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5, last_epoch=4)
    assert values(optimizer, "lr") == [0.25, 0.125] and schedule.base_lrs == [0.5, 0.25]
    assert values(HybridAdaptiveMuon([{**group, "scalar_lr": 0.25}]), "initial_lr") == [0.5, 0.5]


# ---- groups that are added later ----


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_unnamed_layers_can_be_added_and_resumed(copied):
    def make():
        torch.manual_seed(0)
        model = Model()
        optimizer = HybridAdaptiveMuon.from_model(model)
        extra = layer(), layer(4, 3), nn.LayerNorm(4)
        for each in extra:
            optimizer.add_param_group({"params": [*each.parameters()]})
            if copied:
                model, optimizer = copy.deepcopy((model, optimizer))
        return optimizer

    one, other = make(), make()
    named = [name for names in values(one, "param_names") for name in names]
    assert len(named) == len(set(named)) == sum(len(group["params"]) for group in one.param_groups)
    assert values(one, "param_names")[2:] == [
        *(["added.2.0"], ["added.2.1"], ["added.4.0"], ["added.4.1"], ["added.6.0", "added.6.1"])
    ]
    assert values(one, "use_muon")[2:] == [True, False, True, False, False], "by shape alone: the names say nothing"
    step(one)
    other.load_state_dict(one.state_dict())
    assert values(other, "param_names") == values(one, "param_names")
    assert pickle.loads(pickle.dumps(one)).describe() == one.describe() and "added.4.0" in one.describe()


def test_a_made_up_name_is_not_taken():
    optimizer = HybridAdaptiveMuon(
        [("added.2.0", nn.Parameter(torch.ones(3))), ("a.weight", nn.Parameter(torch.ones(2, 2)))]
    )
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert values(optimizer, "param_names")[-1] == ["added.2.0_"]


def test_a_group_of_the_models_and_of_other_parameters():
    model = Model()
    optimizer = HybridAdaptiveMuon.from_model(model, params=model.blocks[0].parameters())
    foreign = nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group(
        {"params": [model.embed.weight, foreign, ("mine.weight", nn.Parameter(torch.ones(2, 3)))]}
    )
    assert names_of(optimizer, True) >= {"added.2.1", "mine.weight"} and "embed.weight" in names_of(optimizer, False)


def test_named_layers_can_be_added_to_an_optimizer_without_names():
    one = HybridAdaptiveMuon(layer().parameters())
    one.add_param_group({"params": [*layer(4, 3).named_parameters(), ("latents", nn.Parameter(torch.ones(2, 2)))]})
    assert values(one, "param_names") == [None] * 4 and values(one, "use_muon") == [True, False, True, False]
    assert "latents  (two-dimensional, but not the weight of a linear map" in one.describe(), "they are routed by name"
    step(one)
    other = HybridAdaptiveMuon(layer().parameters())
    other.add_param_group({"params": [*layer(4, 3).parameters()]})
    other.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": False})
    with pytest.raises(ValueError):
        other.load_state_dict(one.state_dict())


def test_names_for_some_of_the_first_parameters_are_refused():
    """Torch's rule, which is for a slip here: later groups may come from elsewhere."""
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    for params in ([("p", p), q], [{"params": [("p", p)]}, {"params": [q]}]):
        with pytest.raises(ValueError, match="names, or none.*model.named_parameters"):
            HybridAdaptiveMuon(params)


# ---- what the optimizer keeps alive ----


def test_neither_the_model_nor_a_parameter_is_kept_alive_by_the_routes():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = HybridAdaptiveMuon.from_model(model, params=model[2].parameters())
    optimizer.param_groups.clear()
    optimizer.describe()
    alive = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert not any(each() is not None for each in alive)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})  # and nothing is missed


@pytest.mark.parametrize("looked", ["described", "refused"])
def test_a_group_that_is_removed_is_not_kept_alive(looked):
    """By what looked at it before: the description, or a step that was refused."""
    optimizer = HybridAdaptiveMuon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))])
    if looked == "described":
        optimizer.describe()
    else:
        optimizer.param_groups[1]["params"][0].grad = torch.ones(3).to_sparse()
        with pytest.raises(ValueError, match="dense"):
            optimizer.step()
    alive = [weakref.ref(p) for group in optimizer.param_groups for p in group["params"]]
    optimizer.param_groups.clear()
    gc.collect()
    assert not any(each() is not None for each in alive)


def test_description_is_of_the_parameters_that_stand_there_now():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6))
    optimizer = HybridAdaptiveMuon.from_model(model)
    group = optimizer.param_groups[0]
    group["params"][1] = nn.Parameter(torch.ones(2, 4))
    assert "AdaptiveMuon (adamuon): 2 parameters, 24 elements" in optimizer.describe()
    assert "2 x 4  1.weight  (hidden matrix)" in optimizer.describe(), "what replaces a parameter has its route"
    del group["params"][0], group["param_names"][0]
    lines = optimizer.describe().splitlines()
    assert lines[0] == "AdaptiveMuon (adamuon): 1 parameters, 8 elements" and "1.weight  (hidden matrix)" in lines[1]
    unnamed = HybridAdaptiveMuon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 3))])
    del unnamed.param_groups[0]["params"][0]
    assert "3 x 3    (hidden matrix)" in unnamed.describe()
    unnamed.param_groups[0]["params"].append(nn.Parameter(torch.ones(5, 3)))
    assert "5 x 3    (put into a group from outside)" in unnamed.describe()


# ---- groups edited from outside ----


class Conv1D(nn.Module):
    """Hugging Face's, whose weight is stored as (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.ones(nx, nf))


def pop(optimizer):
    optimizer.param_groups[0]["params"].pop(0)


def delete_group(optimizer):
    del optimizer.param_groups[0]


def reverse(optimizer):
    optimizer.param_groups.reverse()


def reverse_params(optimizer):
    for group in optimizer.param_groups:
        group["params"].reverse()
        group["param_names"].reverse()


def insert(optimizer):
    optimizer.param_groups[0]["params"].insert(0, nn.Parameter(torch.ones(2, 5)))


def exchange(optimizer):
    optimizer.param_groups[0]["params"].pop(0)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, 5)))


def move(optimizer):
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())


@pytest.mark.parametrize("edit", [pop, delete_group, reverse, reverse_params, insert, exchange, move])
@pytest.mark.parametrize("together", [True, False], ids=["one group", "a group each"])
@pytest.mark.parametrize("described", [True, False])
def test_names_and_tags_follow_the_parameters(edit, together, described):
    model = nn.ModuleDict(
        {"c": Conv1D(12, 8), "l": nn.Linear(8, 12, bias=False), "d": Conv1D(6, 8), "n": nn.LayerNorm(3)}
    )
    groups = [{"params": [*part.parameters()]} for part in model.values()]
    optimizer = HybridAdaptiveMuon.from_model(model, params=None if together else groups)
    edit(optimizer)
    if described:
        optimizer.describe()
    step(optimizer)
    tagged = {name for name, p in model.named_parameters() if getattr(p, "muon_transposed", False)}
    assert tagged == {"c.weight", "d.weight"}
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert len(group["param_names"]) == len(group["params"])
        for p, name in zip(group["params"], group["param_names"], strict=True):
            replaced = edit is exchange and not together and p not in names
            assert name == names.get(p, "c.weight" if replaced else name)
            assert getattr(p, "muon_transposed", False) == (name in ("c.weight", "d.weight"))
    every = [name for names_of_group in values(optimizer, "param_names") for name in names_of_group]
    assert len(every) == len(set(every)), "what is new has no other parameter's name"
    shown = {p: (name, route) for name, p, route in optimizer.routes}
    for p, (name, route) in shown.items():
        assert name == names.get(p, name)
        assert route.transposed is (name in ("c.weight", "d.weight"))
    text = pickle.loads(pickle.dumps(optimizer)).describe()
    assert text == optimizer.describe() and copy.deepcopy(optimizer).describe() == text


@pytest.mark.parametrize("how", ["replaced", "swapped", "copied", "pickled", "another's"])
def test_what_takes_a_parameters_place_takes_its_route(how):
    """As accelerate, torch's conversions and copies do it."""
    model = nn.ModuleDict({"c": Conv1D(12, 8), "l": nn.Linear(8, 12, bias=False)})
    optimizer = HybridAdaptiveMuon.from_model(model)
    before = optimizer.describe()
    (group,) = optimizer.param_groups
    new = [nn.Parameter(torch.ones_like(p)) for p in group["params"]]
    if how == "another's":
        HybridAdaptiveMuon([{"params": new, "use_muon": True}])
    if how in ("replaced", "another's"):
        group["params"] = new
    elif how == "swapped":
        for p, q in zip(group["params"], new, strict=True):
            torch.utils.swap_tensors(p, q)
    elif how == "copied":
        optimizer = copy.deepcopy(optimizer)
    else:
        optimizer = pickle.loads(pickle.dumps(optimizer))
    step(optimizer)
    assert optimizer.describe() == before
    (group,) = optimizer.param_groups
    assert [getattr(p, "muon_transposed", False) for p in group["params"]] == [True, False]
    group["params"].pop(0)
    step(optimizer)
    assert "l.weight  (hidden matrix)" in optimizer.describe() and group["param_names"] == ["l.weight"]


def test_a_copied_parameter_has_a_name_of_its_own():
    p = torch.ones(3, 3, requires_grad=True)
    optimizer = HybridAdaptiveMuon([("first.weight", p)])
    optimizer.add_param_group({"params": [("second.weight", copy.deepcopy(p))]})
    assert [name for name, *_ in optimizer.routes] == ["first.weight", "second.weight"]


def test_parameters_can_be_loaded_with_weights_only(tmp_path):
    model = layer()
    HybridAdaptiveMuon.from_model(model)
    torch.save([*model.parameters()], tmp_path / "params.pt")
    assert len(torch.load(tmp_path / "params.pt", weights_only=True)) == 2


@pytest.mark.parametrize("use_muon", [True, False])
def test_a_kind_that_is_flipped_from_outside_is_refused(use_muon):
    model = layer(3, 3)
    optimizer = HybridAdaptiveMuon.from_model(model)
    (group,) = (group for group in optimizer.param_groups if group["use_muon"] is not use_muon)
    group["use_muon"] = use_muon
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"lacks.*add_param_group\(\{'params': ..., 'use_muon': ...\}\)"):
        step(optimizer)
    optimizer.describe()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    optimizer.param_groups.remove(group)
    optimizer.param_groups.append({"params": group["params"]})
    with pytest.raises(ValueError, match="must have all options of its kind"):
        step(optimizer)


def test_halves_share_no_tensor():
    """Schedulers change a tensor in place."""
    lr = torch.tensor(0.5)
    group = {"params": [*layer().parameters()], "lr": lr}
    for optimizer in (HybridAdaptiveMuon([group]), HybridAdaptiveMuon(layer().parameters(), lr=lr)):
        torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.5)
        muon, rest = optimizer.param_groups
        muon["lr"].mul_(0.5)
        assert (float(muon["lr"]), float(rest["lr"])) == (0.25, 0.5)
        lr.fill_(0.5)
    optimizer = HybridAdaptiveMuon([{"params": [*layer().parameters()], "bounds": (lr, [lr])}])
    (muon, rest) = values(optimizer, "bounds")
    assert muon[0] is not rest[0] and muon[1][0] is not rest[1][0]


@pytest.mark.parametrize("key", ["name", "group_name"])
def test_two_groups_of_one_name_are_told_apart(key):
    groups = [{"params": [*layer().parameters()], key: "x"}, {"params": [*layer().parameters()], key: "x"}]
    optimizer = HybridAdaptiveMuon(groups)
    optimizer.add_param_group({"params": [*layer().parameters()], key: "x"})
    for _ in range(2):
        optimizer.add_param_group({"params": [*nn.LayerNorm(3).parameters()], key: "norm"})
    assert len(set(values(optimizer, key))) == 8
    assert {"norm", "norm_", "x/adamw", "x/adamw_", "x/adamw__"} <= set(values(optimizer, key))


# ---- a model that has grown ----


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.fc = nn.Embedding(10, 8), nn.Linear(8, 8)

    def grow(self):
        self.classifier, self.new_emb, self.lstm, self.c = (
            *(nn.Linear(8, 5), nn.Embedding(5, 8), nn.LSTM(8, 8)),
            Conv1D(12, 8),
        )
        self.latents, self.more = nn.Parameter(torch.ones(4, 8)), nn.Linear(8, 8)


@pytest.mark.parametrize("named", [False, True])
def test_what_a_model_has_got_since_is_routed_as_from_model_would(named):
    model = Growing()
    routes = {"*fc.*": "adaptive_muon", "fc.bias": "adamw", "more*.weight": "adamw"}
    with pytest.raises(ValueError, match="more"):
        HybridAdaptiveMuon.from_model(model, routes=routes)
    routes = {"fc.bias": "adamw", "[fm]*.weight": "adamw"}
    optimizer = HybridAdaptiveMuon.from_model(model, routes=routes)
    old = set(model.parameters())
    del model.fc.bias  # a pattern that matches nothing any more
    model.grow()
    new = [(name, p) if named else p for name, p in model.named_parameters() if p not in old]
    optimizer.add_param_group({"params": new})
    model.fc.bias = None
    expected = {p: (name, route) for name, p, route in route_model(model, {"[fm]*.weight": "adamw"})}
    shown = {p: (name, route) for name, p, route in optimizer.routes if name != "fc.bias"}
    assert shown == expected and model.c.weight.muon_transposed
    step(optimizer)


def test_a_parameter_replaced_in_the_model_is_added_under_its_name():
    """As fully_shard replaces them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = HybridAdaptiveMuon.from_model(model, params=model[0].parameters(), routes={"1.weight": "adamw"})
    model[1].weight = nn.Parameter(torch.ones(4, 4))
    optimizer.add_param_group({"params": model[1].weight})
    assert names_of(optimizer, False) == {"0.bias", "1.weight"} and "pattern '1.weight'" in optimizer.describe()


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "DP"])
def test_a_wrapper_that_is_gone_leaves_the_model(wrap):
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4))
    optimizer = HybridAdaptiveMuon.from_model(wrap(model), params=model[0].parameters())
    gc.collect()
    optimizer.add_param_group({"params": model[1].parameters()})
    assert names_of(optimizer, False) == {"0.bias", "1.weight"}
