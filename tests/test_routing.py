# SPDX-License-Identifier: Apache-2.0
"""Which parameter goes to AdaptiveMuon, which to AdamW, and why."""

import pytest
import torch
from small_model import MATRICES, Model, model_and_optimizer, names_of
from torch import nn

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.routing import route_model, route_parameter


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
    "conv.weight": "3-D, not a matrix",
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


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "DataParallel"])
def test_wrapping_changes_no_route_and_no_name(wrap):
    model = Model()
    routes = {"blocks.0.query.weight": "adamw"}
    plain, wrapped = route_model(model, routes), route_model(wrap(model), routes)
    assert [(name, route) for name, _, route in plain] == [(name, route) for name, _, route in wrapped]


def test_lazy_parameters_are_refused_by_name():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'0.weight': run the model once"):
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
    ],
)
def test_bad_patterns_are_refused(routes, text):
    with pytest.raises(ValueError, match=text):
        model_and_optimizer(routes=routes)
