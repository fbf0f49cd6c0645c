# SPDX-License-Identifier: Apache-2.0
"""Which parameter goes to AdaptiveMuon, which to AdamW, and why."""

import pytest
import torch
from small_model import MATRICES, Model, model_and_optimizer, names_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.routing.rules import route_model, route_parameter


def test_use_muon_is_true_or_false():
    """Of a parameter, in a model or by itself; what is neither is taken for neither."""
    model = Model()
    model.blocks[0].query.weight.use_muon = "no"
    for name, optimizer_of in (
        ("blocks.0.query.weight", lambda: HybridAdaptiveMuon.from_model(model)),
        ("blocks.0.query.weight", lambda: HybridAdaptiveMuon(model.named_parameters())),
        ("a parameter", lambda: HybridAdaptiveMuon([model.blocks[0].query.weight])),
    ):
        with pytest.raises(ValueError, match=f"use_muon of {name} must be True or False, got 'no'. Use None"):
            optimizer_of()


@pytest.mark.parametrize("tied", [False, True])
def test_routing_by_module(tied):
    model, optimizer = model_and_optimizer(tied=tied)
    everything = {name for name, _ in model.named_parameters()}
    assert names_of(optimizer, True) == MATRICES
    assert names_of(optimizer, False) == everything - MATRICES
    assert [g["use_muon"] for g in optimizer.param_groups] == [True, False]


REASONS = {
    "embed.weight": "embedding",
    "positions.weight": "embedding",
    "table": "3-D, not a matrix",
    "conv.weight": "3-D, not a matrix; flatten_conv=True takes the convolution for one",
    "lstm.weight_ih_l0": "recurrent, LSTM",
    "blocks.0.norm.weight": "norm, LayerNorm",
    "blocks.0.pos_bias_u": "two-dimensional, but not the weight of a linear map; "
    "to override, pass routes={'blocks.0.pos_bias_u': 'adaptive_muon'}",
    "blocks.0.query.bias": "1-D, not a matrix",
    "blocks.0.query.weight": "hidden matrix",
    "scores.weight": "output head by its shape, 13 x 8 as an embedding",
}


def test_every_route_has_its_reason():
    model, optimizer = model_and_optimizer()
    reasons = {name: route.reason for name, _, route in route_model(model)}
    assert {name: reasons[name] for name in REASONS} == REASONS
    text = optimizer.describe()
    assert text.startswith("AdaptiveMuon (namo_d): 4 parameters, 256 elements\n")
    assert all(name in text and reason in text for name, reason in REASONS.items())
    (tied,) = (route.reason for name, _, route in route_model(Model(tied=True)) if name == "embed.weight")
    assert tied == "embedding, tied"


def test_a_table_as_long_as_the_width_does_not_make_every_layer_a_head():
    """Eight positions in a model of width eight: four linear layers have eight outputs, and none is a head."""
    model = Model()
    model.embed, model.scores = nn.Identity(), nn.Identity()
    assert sum(route.algorithm == "adaptive_muon" for *_, route in route_model(model)) == 4


def test_head_by_shape():
    """The last layers are the head if they are shaped as an embedding; no width or table length misleads."""

    def routed(*modules):
        return [route.algorithm for *_, route in route_model(nn.Sequential(*modules)) if route.reason != "embedding"]

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, bias=False)

    tables = nn.Embedding(256, 64), nn.Embedding(512, 64)
    assert routed(*tables, linear(64, 512), linear(64, 256)) == ["adaptive_muon", "adamw"]
    assert routed(*tables, linear(64, 64), linear(64, 256), linear(64, 256)) == ["adaptive_muon", "adamw", "adamw"]
    assert routed(nn.EmbeddingBag(256, 64), linear(64, 64), linear(64, 256)) == ["adaptive_muon", "adamw"]
    assert routed(*tables, linear(64, 256), linear(64, 8)) == ["adaptive_muon"] * 2
    up, down = linear(64, 256), linear(256, 64)  # as wide as the vocabulary, or the context as long as the width
    assert routed(*tables, up, down, linear(64, 256)) == ["adaptive_muon"] * 2 + ["adamw"]
    assert routed(nn.Embedding(64, 64), up, down) == ["adaptive_muon"] * 2


class LayerNormLinear(nn.Linear):
    """Megatron and Transformer Engine have such names."""


class PatchEmbedding(nn.Linear):
    pass


class RMSNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


class VocabParallelEmbedding(RMSNorm2d):
    pass


class LayerNormColumnParallel(RMSNorm2d):
    def __init__(self):
        super().__init__()
        self.input_size = self.output_size = 4


class Table(RMSNorm2d):
    """Nothing shows that its weight is multiplied with anything."""


@pytest.mark.parametrize(
    ("make", "algorithm"),
    [
        (lambda: LayerNormLinear(4, 4, bias=False), "adaptive_muon"),
        (lambda: PatchEmbedding(4, 4, bias=False), "adaptive_muon"),
        (LayerNormColumnParallel, "adaptive_muon"),
        (Table, "adamw"),
        (lambda: nn.Bilinear(4, 4, 4, bias=False), "adamw"),
        (RMSNorm2d, "adamw"),
        (VocabParallelEmbedding, "adamw"),
        (lambda: nn.LayerNorm((4, 4)), "adamw"),
        (lambda: nn.EmbeddingBag(5, 4), "adamw"),
        (lambda: nn.LSTMCell(4, 4, bias=False), "adamw"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Embedding(5, 4)), "adamw"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4, bias=False)), "adaptive_muon"),
    ],
    ids=[
        "LayerNormLinear",
        "PatchEmbedding",
        "LayerNormColumnParallel",
        "Table",
        "Bilinear",
        "RMSNorm2d",
        "VocabParallelEmbedding",
        "LayerNorm 2-D",
    ]
    + ["EmbeddingBag", "LSTMCell", "weight_norm of an embedding", "orthogonal linear"],
)
def test_routing_by_class(make, algorithm):
    for model in (make(), nn.Sequential(make())):
        assert {route.algorithm for *_, route in route_model(model)} == {algorithm}


@pytest.mark.parametrize("name", ["lm_head", "classifier", "score", "unembed", "qa_outputs", "logits", "embed_out"])
def test_heads_by_name(name):
    model = nn.ModuleDict({"hidden": nn.Linear(4, 4, bias=False), name: nn.Linear(4, 4, bias=False)})
    assert [route.algorithm for *_, route in route_model(model)] == ["adaptive_muon", "adamw"]


def test_a_tag_that_says_no_is_no_tag():
    p = nn.Parameter(torch.ones(4, 4))
    p.is_embedding_or_output_parameter = False
    assert route_parameter(p).algorithm == "adaptive_muon"


def test_use_muon_of_a_parameter_decides_before_the_model():
    class Tagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.in_proj, self.lm_head = (nn.Linear(4, 6) for _ in range(3))
            self.embedding, self.latents = nn.Embedding(8, 4), nn.Parameter(torch.ones(4, 6))
            self.column = nn.Linear(1, 6)

    def algorithms(**tags):
        model = Tagged()
        for name, use_muon in tags.items():
            model.get_parameter(name.replace("__", ".")).use_muon = use_muon
        routed = {name: route for name, _, route in route_model(model)}
        optimizer = HybridAdaptiveMuon.from_model(model)
        to_muon = {name for name, route in routed.items() if route.algorithm == "adaptive_muon"}
        assert to_muon == names_of(optimizer, True)
        return to_muon, routed

    assert algorithms()[0] == {"hidden.weight", "in_proj.weight"}
    to_muon, routed = algorithms(in_proj__weight=False, hidden__bias=False, hidden__weight=None)
    assert to_muon == {"hidden.weight"} and routed["in_proj.weight"].reason == "its attribute use_muon=False"
    tags = {
        name: True for name in ("lm_head__weight", "embedding__weight", "latents", "hidden__bias", "column__weight")
    }
    to_muon, routed = algorithms(**tags)
    assert to_muon == {"hidden.weight", "in_proj.weight", "lm_head.weight", "embedding.weight", "latents"}
    assert routed["latents"].reason == "its attribute use_muon=True"
    assert routed["hidden.bias"].reason == "1-D, not a matrix"
    assert routed["column.weight"].reason == "a single row or column"


def test_names_and_groups_win_over_use_muon_of_a_parameter():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight.use_muon, model[1].weight.use_muon = True, False
    routes = {"0.*": "adamw", "1.*": "adaptive_muon"}
    assert [route.algorithm for *_, route in route_model(model)] == ["adaptive_muon", "adamw", "adaptive_muon"]
    assert [route.algorithm for *_, route in route_model(model, routes)] == ["adamw", "adaptive_muon", "adaptive_muon"]
    for use_muon in True, False:
        group = {"params": [model[0].weight, model[1].weight], "use_muon": use_muon}
        assert [g["use_muon"] for g in HybridAdaptiveMuon([group]).param_groups] == [use_muon]


def test_use_muon_without_a_model():
    p, q, head = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    p.use_muon, head.use_muon = False, True
    assert [g["use_muon"] for g in HybridAdaptiveMuon([p, q]).param_groups] == [True, False]
    assert route_parameter(head, "lm_head.weight").algorithm == "adaptive_muon"
    head.is_embedding_or_output_parameter = True  # which is a guess of Megatron's; the other was set for this
    assert route_parameter(head).algorithm == "adaptive_muon"


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "DataParallel"])
def test_wrapping_changes_no_route_and_no_name(wrap):
    model = Model()
    routes = {"blocks.0.query.weight": "adamw"}
    plain, wrapped = route_model(model, routes), route_model(wrap(model), routes)
    assert [(name, route) for name, _, route in plain] == [(name, route) for name, _, route in wrapped]


def test_lazy_parameters_are_refused_by_name():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'0.weight'. Run the model once"):
        HybridAdaptiveMuon.from_model(model)


def test_heads_by_name_tag_and_hugging_face():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lm_head, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(4))
            self.b.weight.is_embedding_or_output_parameter = True

        def get_output_embeddings(self):
            return self.c

    routed = {name: route.algorithm for name, _, route in route_model(Wrapped())}
    assert routed == {"a.weight": "adaptive_muon"} | {f"{n}.weight": "adamw" for n in ("lm_head", "b", "c")}
    inner = {name: route.algorithm for name, _, route in route_model(nn.Sequential(Wrapped()))}
    assert inner == {f"0.{name}": algorithm for name, algorithm in routed.items()}


def test_patterns_come_first():
    routes = {"blocks.0.query.weight": "adamw", "blocks.*.query.weight": "adaptive_muon", "scores.*": "adaptive_muon"}
    _, optimizer = model_and_optimizer(routes=routes)
    assert names_of(optimizer, True) == MATRICES - {"blocks.0.query.weight"} | {"scores.weight"}


def test_patterns_match_every_name_of_a_shared_parameter():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(4, 4, bias=False)
            self.first.alias = self.first.weight

    for name in ("first.weight", "first.alias", "second.weight", "second.alias"):
        (entry,) = route_model(Shared(), {name: "adamw"})
        assert entry[0] == "first.weight" and entry[2].algorithm == "adamw"


@pytest.mark.parametrize(
    ("routes", "text"),
    [
        ({"blocks.9.*": "adamw"}, "'blocks.9.*'"),
        ({"blocks.*": "sgd"}, "'sgd'"),
        ({"*.norm.weight": "adaptive_muon"}, "'blocks.0.norm.weight'.*AdamW"),
        ("adamw", "routes must be a mapping .*, got 'adamw'. Use"),
    ],
)
def test_bad_patterns_are_refused(routes, text):
    with pytest.raises(ValueError, match=text):
        model_and_optimizer(routes=routes)


# ---- what AdaptiveMuon does not take ----


def untakable():
    """Matrices that torch's AdamW lets a model have, by what is wrong with them."""
    kinds = {str(dtype): torch.ones(4, 6).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    kinds |= {str(dtype): torch.ones(4, 6, dtype=dtype) for dtype in (torch.int8, torch.uint8, torch.bool)}
    kinds["torch.sparse_csr"] = torch.eye(4).to_sparse_csr()
    return {name: nn.Parameter(p, requires_grad=False) for name, p in kinds.items()} | {
        "torch.complex64": nn.Parameter(torch.ones(4, 6, dtype=torch.complex64)),
        "torch.complex128": nn.Parameter(torch.ones(4, 6, dtype=torch.complex128)),
    }


@pytest.mark.parametrize(
    ("kind", "ndim"),
    [(kind, ndim) for kind in untakable() for ndim in (2, 3) if (kind, ndim) != ("torch.sparse_csr", 3)],
)
def test_what_adaptive_muon_does_not_take_goes_to_adamw(kind, ndim):
    model = nn.Linear(6, 4)
    model.weight = untakable()[kind]
    if ndim == 3:
        model.weight = nn.Parameter(torch.stack([model.weight.data] * 2), requires_grad=model.weight.requires_grad)
        model.weight.muon_stacked = True
    fine = nn.Linear(6, 4)
    both = nn.Sequential(model, fine)
    before = model.weight.detach().clone()
    for optimizer in (HybridAdaptiveMuon.from_model(both), HybridAdaptiveMuon(both.named_parameters())):
        assert names_of(optimizer, True) == {"1.weight"}
        assert f"({kind}, which AdaptiveMuon does not take)" in optimizer.describe()
        for p in both.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
    assert HybridAdaptiveMuon(both.parameters())
    trained = model.weight.requires_grad
    assert trained or kind == "torch.sparse_csr" or torch.equal(model.weight.float(), before.float())
    with pytest.raises(ValueError, match="real floating-point matrices.*another optimizer"):
        HybridAdaptiveMuon.from_model(both, routes={"0.weight": "adaptive_muon"})


def test_a_frozen_float8_base_stays_as_it_is_under_its_adapter():
    """Torch's AdamW takes it; so must the AdamW part."""
    model = nn.ModuleDict({"base": nn.Linear(6, 4), "lora_A": nn.Linear(6, 2), "lora_B": nn.Linear(2, 4)})
    model["base"].weight = untakable()["torch.float8_e4m3fn"]
    before = model["base"].weight.float()
    optimizer = HybridAdaptiveMuon.from_model(model, weight_decay=0.5, capturable=False)
    for _ in range(3):
        model["lora_B"](model["lora_A"](torch.ones(2, 6))).square().sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(model["base"].weight.float(), before)
    assert names_of(optimizer, True) == {"lora_A.weight", "lora_B.weight"}


# ---- what a sharding engine has emptied or flattened ----


def engine(numel, **attributes):
    p = nn.Parameter(torch.ones(numel))
    p.__dict__.update(attributes)
    return p


class FlatParameter(nn.Parameter):
    """Of FSDP1 and fairscale."""


PLACEHOLDERS = {
    "ZeRO stage 3": lambda: engine(0, ds_id=0, ds_status=1, ds_shape=torch.Size([6, 4]), ds_tensor=torch.ones(12)),
    "ZeRO stage 3, of a bias": lambda: engine(0, ds_id=0, ds_shape=torch.Size([6])),
    "fairscale": lambda: engine(12, _is_sharded=True, _orig_size=torch.Size([6, 4])),
    "an engine to come": lambda: engine(0, some_shape=[6, 4]),
    "a flat piece": lambda: engine(12, _original_shape=(6, 4)),
    "flat": lambda: engine(24, original_shape=(6, 4)),
    "FSDP1": lambda: engine(24, _fsdp_flattened=True),
    "FlatParameter": lambda: FlatParameter(torch.ones(24)),
    "Megatron-FSDP": lambda: engine((6, 4), __fsdp_param__=True),
    "Megatron-FSDP, wrapped": lambda: engine((6, 4), _megatron_fsdp_model=None),
}


@pytest.mark.parametrize("kind", PLACEHOLDERS)
@pytest.mark.parametrize("owner", ["linear", "embedding", "norm", "raw"])
def test_placeholders_are_refused_wherever_they_are(kind, owner):
    model = nn.ModuleDict(
        {"fine": nn.Linear(3, 3), "linear": nn.Linear(3, 3), "embedding": nn.Embedding(3, 3), "norm": nn.LayerNorm(3)}
    )
    model["raw"] = nn.Module()
    p = model[owner].weight = PLACEHOLDERS[kind]()
    error = rf"must keep its rows and columns.*'?{owner}.weight.*Use FSDP2, torch.distributed.fsdp.fully_shard"
    for make in (
        lambda: HybridAdaptiveMuon.from_model(model),
        lambda: HybridAdaptiveMuon.from_model(model, routes={"*": "adaptive_muon"}),
        lambda: HybridAdaptiveMuon(model.named_parameters()),
        lambda: AdaptiveMuon([("fine.weight", model["fine"].weight), (f"{owner}.weight", p)]),
    ):
        with pytest.raises(ValueError, match=error):
            make()
    with pytest.raises(ValueError, match="Use FSDP2"):
        HybridAdaptiveMuon([p])
    optimizer = HybridAdaptiveMuon(model["fine"].named_parameters())
    with pytest.raises(ValueError, match="Use FSDP2"):
        optimizer.add_param_group({"params": [(f"{owner}.weight", p)]})
    assert len(optimizer.param_groups) == 2


def test_a_placeholder_says_which_shape_was_lost():
    with pytest.raises(ValueError, match=r"DeepSpeed's ZeRO stage 3 holds as \(0,\) instead of \(6, 4\)"):
        HybridAdaptiveMuon([("w.weight", PLACEHOLDERS["ZeRO stage 3"]())])


@pytest.mark.parametrize(
    "p",
    [
        engine((0, 8)),
        engine((8, 0), global_shape=(8, 16)),
        engine(0),
        engine(8, grid_size=(4, 4), qkv_split_shapes=[4, 4], muon_blocks=(4, 4)),
        engine(8, orig_size=(4, 4)),
        engine(8, global_size=[3, 3], full_shape=(2, 2)),
        engine((6, 4), ds_id=0, ds_shape=torch.Size([6, 4])),
        engine(6, ds_id=0, ds_shape=torch.Size([6])),
    ],
    ids=[
        "no rows",
        "no columns",
        "empty bias",
        "attributes of other kinds",
        "own size",
        "own sizes",
        "gathered",
        "persistent",
    ],
)
def test_whole_and_empty_parameters_are_no_placeholders(p):
    p.grad = torch.ones_like(p)
    HybridAdaptiveMuon([p]).step()


# ---- names of wrapped models ----


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


DeepSpeedEngine, Users = (type(name, (Wrapper,), {}) for name in ("DeepSpeedEngine", "Users"))


class UsersEngine(DeepSpeedEngine):
    pass


class GradSampleModule(nn.Module):
    """Opacus's."""

    def __init__(self, module):
        super().__init__()
        self._module = module


class FabricModule(nn.Module):
    """Lightning Fabric's, which holds the module twice."""

    def __init__(self, module):
        super().__init__()
        self._forward_module = self._original_module = module


def compiled(module):
    return torch.compile(module, backend="eager")


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))


def inner(wrap):
    def wrapped(module):
        module[1] = wrap(module[1])
        return module

    return wrapped


WRAPS = {
    "compile": (compiled, "_orig_mod.1.0.weight"),
    "DataParallel": (nn.DataParallel, "module.1.0.weight"),
    "DeepSpeed": (DeepSpeedEngine, "module.1.0.weight"),
    "subclass of a wrapper": (UsersEngine, "module.1.0.weight"),
    "AveragedModel": (torch.optim.swa_utils.AveragedModel, "module.1.0.weight"),
    "QuantWrapper": (torch.ao.quantization.QuantWrapper, "module.1.0.weight"),
    "Opacus": (GradSampleModule, "_module.1.0.weight"),
    "Fabric": (FabricModule, "_forward_module.1.0.weight"),
    "Fabric(compile)": (lambda m: FabricModule(compiled(m)), "_forward_module._orig_mod.1.0.weight"),
    "compile(DP)": (lambda m: compiled(nn.DataParallel(m)), "_orig_mod.module.1.0.weight"),
    "DP(compile)": (lambda m: nn.DataParallel(compiled(m)), "module._orig_mod.1.0.weight"),
    "DP(DP)": (lambda m: nn.DataParallel(nn.DataParallel(m)), "module.module.1.0.weight"),
    "compiled part": (inner(compiled), "1._orig_mod.0.weight"),
    "checkpointed part": (inner(checkpoint_wrapper), "1._checkpoint_wrapped_module.0.weight"),
    "both of a part": (
        inner(lambda m: compiled(checkpoint_wrapper(m))),
        "1._orig_mod._checkpoint_wrapped_module.0.weight",
    ),
    "all at once": (
        lambda m: compiled(nn.DataParallel(inner(lambda part: checkpoint_wrapper(compiled(part)))(m))),
        "_orig_mod.module.1._checkpoint_wrapped_module._orig_mod.0.weight",
    ),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_plain_and_wrapped_names_match_and_checkpoints_fit(kind):
    wrap, own = WRAPS[kind]
    plain, wrapped = net(), wrap(net())
    assert own in dict(wrapped.named_parameters())
    expected = names_of(HybridAdaptiveMuon.from_model(plain, routes={"1.0.weight": "adamw"}), False)
    for pattern in ("1.0.weight", own, "*1.*0.weight"):
        optimizer = HybridAdaptiveMuon.from_model(wrapped, routes={pattern: "adamw"})
        assert names_of(optimizer, False) == expected
    other = HybridAdaptiveMuon.from_model(plain, routes={"1.0.weight": "adamw"})
    for p in wrapped.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(other.state_dict())
    assert len(other.state) == 4


def test_the_remedy_for_a_pattern_without_a_match_works():
    """Print the names, and take one of them."""
    for wrap, _ in WRAPS.values():
        model = wrap(net())
        with pytest.raises(
            ValueError, match=r"Print the names with \[name for name, _ in model.named_parameters\(\)\]"
        ):
            HybridAdaptiveMuon.from_model(model, routes={"2.weight": "adamw"})
        for name in [name for name, _ in model.named_parameters()]:
            HybridAdaptiveMuon.from_model(model, routes={name: "adamw"})


def test_a_users_own_module_keeps_its_name():
    for model in (Users(net()), nn.DataParallel(Users(net())), nn.ModuleDict({"module": net()})):
        names = [name for name, *_ in route_model(model)]
        assert names[0] == "module.0.weight"
    assert route_model(nn.DataParallel(nn.ModuleDict({"_orig_mod": Users(net())})))[0][0] == "module.0.weight"


def test_a_pattern_of_a_compiled_model_serves_the_plain_one():
    routes = {"_orig_mod.0.weight": "adamw"}
    assert "0.weight" in names_of(HybridAdaptiveMuon.from_model(net(), routes=routes), False)


@pytest.mark.parametrize("kind", WRAPS)
def test_a_pattern_of_any_wrapped_model_serves_any_other(kind):
    for wrap, own in WRAPS.values():
        if kind in ("plain", "DataParallel", "DP(compile)", "Fabric", "compiled part"):
            assert "1.0.weight" in names_of(
                HybridAdaptiveMuon.from_model(wrap(net()), routes={WRAPS[kind][1]: "adamw"}), False
            )
        plain = HybridAdaptiveMuon.from_model(net(), routes={own: "adamw"})
        assert "1.0.weight" in names_of(plain, False) and f"pattern {own!r}" in plain.describe()


def test_a_module_of_ones_own_comes_before_a_wrapper_by_that_name():
    model = nn.ModuleDict({"module": nn.Linear(4, 4, bias=False), "0": nn.Linear(4, 4, bias=False)})
    optimizer = HybridAdaptiveMuon.from_model(model, routes={"module.*": "adamw"})
    assert names_of(optimizer, False) == {"module.weight"}
    with pytest.raises(ValueError, match="must match a parameter"):
        HybridAdaptiveMuon.from_model(model, routes={"module.module.1.weight": "adamw"})


def test_a_module_that_is_held_twice_by_its_wrapper_is_not_tied():
    table = nn.ModuleDict({"table": nn.Embedding(4, 4)})
    assert [(name, route.reason) for name, _, route in route_model(FabricModule(table))] == [
        ("table.weight", "embedding")
    ]


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        *(
            (f"{name}.weight", "adamw")
            for name in ("embed", "tok_embeddings", "patch_embedding.0", "q_norm", "layernorm")
        ),
        *((f"{name}.weight", "adaptive_muon") for name in ("embedding.linear", "norm.proj", "normal", "embedder")),
        ("embed.parametrizations.weight.original1", "adamw"),
        ("fc.parametrizations.weight.original1", "adaptive_muon"),
    ],
)
def test_the_constructor_knows_embeddings_and_norms_by_name(name, algorithm):
    p = nn.Parameter(torch.ones(4, 6))
    route = route_parameter(p, name)
    assert route.algorithm == algorithm and (algorithm == "adaptive_muon" or "set 'use_muon': True" in route.reason)
    assert HybridAdaptiveMuon([{"params": [(name, p)], "use_muon": True}]).param_groups[0]["use_muon"]
