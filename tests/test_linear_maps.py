# SPDX-License-Identifier: Apache-2.0
"""Only the weights of linear maps go to AdaptiveMuon, whoever made the layer; other packages' layers are stand-ins."""

import copy

import pytest
import torch
from small_model import names_of
from torch import nn
from torch.nn.utils import prune

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.routing.heads import head_by_name
from emerging_optimizers.adaptive_muon.routing.rules import route_model, route_parameter


def weight(*shape):
    return nn.Parameter(torch.ones(shape))


class Raw(nn.Module):
    """A module with the parameters and attributes that a test gives it."""

    def __init__(self, attributes=(), **parameters):
        super().__init__()
        self.__dict__.update(attributes)
        for name, p in parameters.items():
            self.register_parameter(name, p)


def routed(model):
    return {name: route.algorithm for name, _, route in route_model(model)}


def muon(model):
    return {name for name, algorithm in routed(model).items() if algorithm == "adaptive_muon"}


def strip(p, dim):
    p.partition_dim = dim
    return p


class ColumnParallelLinear(Raw):
    """Megatron's, on the second of two ranks, whose strips may differ."""


class FP8Linear(nn.Linear):
    """Hugging Face's, with one scale for each block of the weight."""

    def __init__(self):
        super().__init__(8, 6, bias=False)
        self.weight_scale_inv = weight(6, 2)


IS_MAP = {
    "subclass of Linear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(8, 6), {"weight"}),
    "FP8Linear": (FP8Linear, {"weight"}),
    "column parallel": (
        lambda: ColumnParallelLinear({"input_size": 8, "output_size": 6}, weight=strip(weight(2, 8), 0)),
        {"weight"},
    ),
    "row parallel": (lambda: Raw({"input_size": 8, "output_size": 6}, weight=strip(weight(6, 3), 1)), {"weight"}),
    "grouped": (
        lambda: Raw(
            {"in_features": 8, "out_features": 6}, weight0=weight(6, 8), weight1=weight(6, 8), alpha=weight(6, 8)
        ),
        {"weight0", "weight1"},
    ),
    "parts of one": (
        lambda: Raw({"in_features": 8, "out_features": 6}, query_weight=weight(4, 8), key_weight=weight(2, 8)),
        {"query_weight", "key_weight"},
    ),
    "LayerNormMLP": (
        lambda: Raw(
            {"fc2_bias": torch.Tensor()},  # Transformer Engine's for no bias
            layer_norm_weight=weight(8),
            fc1_weight=weight(12, 8),
            fc1_bias=weight(12),
            fc2_weight=weight(8, 12),
        ),
        {"fc1_weight", "fc2_weight"},
    ),
    "in_dim, out_dim": (lambda: Raw({"in_dim": 8, "out_dim": 6}, weight=weight(6, 8)), {"weight"}),
    "d_in, d_out": (lambda: Raw({"d_in": 8, "d_out": 6}, weight=weight(6, 8)), {"weight"}),
    "infeatures, outfeatures": (lambda: Raw({"infeatures": 8, "outfeatures": 6}, weight=weight(6, 8)), {"weight"}),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"in_proj_weight", "out_proj.weight"}),
    "attention without bias": (
        lambda: nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True),
        {"in_proj_weight", "out_proj.weight"},
    ),
    "attention in three": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
        {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
    ),
    "attention of another package": (
        lambda: Raw({"embed_dim": 8}, in_proj_weight=weight(24, 8), in_proj_bias=None),
        {"in_proj_weight"},
    ),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)),
        {"parametrizations.weight.original1"},
    ),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)),
        {"parametrizations.weight.original"},
    ),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 6), "weight", 0.5), {"weight_orig"}),
    "loralib": (
        lambda: Raw(
            {"in_features": 8, "out_features": 6}, weight=weight(6, 8), lora_A=weight(3, 8), lora_B=weight(6, 3)
        ),
        {"weight", "lora_A", "lora_B"},
    ),
    "AdaLoRA": (
        lambda: nn.ModuleDict({"q": adalora(Raw({"in_features": 8, "out_features": 6}))}),
        {"q.lora_A.default", "q.lora_B.default"},
    ),
    "marked as a strip": (lambda: Raw({"input_size": 8, "output_size": 6}, weight=marked(weight(2, 8))), {"weight"}),
    "torchtune": (
        lambda: nn.ModuleDict({"q": torchtune(Raw({"in_dim": 8, "out_dim": 6}, weight=weight(6, 8)))}),
        {"q.weight", "q.lora_a.weight", "q.lora_b.weight"},
    ),
}


def marked(p):
    p.tensor_model_parallel = True
    return p


def adalora(layer):
    layer.lora_A, layer.lora_B, layer.lora_E = (
        nn.ParameterDict({"default": weight(*shape)}) for shape in ((3, 8), (6, 3), (3, 1))
    )
    return layer


def torchtune(layer):
    layer.lora_a, layer.lora_b = nn.Linear(8, 3, bias=False), nn.Linear(3, 6, bias=False)
    return layer


@pytest.mark.parametrize("kind", IS_MAP)
def test_linear_maps_of_all_makes(kind):
    make, expected = IS_MAP[kind]
    assert muon(make()) == expected
    assert muon(nn.ModuleDict({"it": make()})) == {f"it.{name}" for name in expected}


NO_MAP = {
    "decay rates": lambda: Raw({"in_features": 8, "out_features": 6}, A_log=weight(8, 16)),
    "latents": lambda: Raw(latents=weight(6, 8)),
    "position table": lambda: Raw(positions=weight(6, 8)),
    "raw experts": lambda: Raw(w1=weight(6, 8), w2=weight(8, 6)),
    "codebook": lambda: Raw(weight=weight(6, 8)),
    "bias table": lambda: Raw(relative_position_bias_table=weight(49, 2)),
    "another shape": lambda: Raw({"in_features": 8, "out_features": 6}, weight=weight(8, 6)),
    "a parameter of a linear layer": lambda: Raw({"in_features": 8, "out_features": 6}, gate=weight(6, 8)),
    "half of a pair": lambda: Raw({"in_features": 8}, weight=weight(6, 8)),
    "CLIP's projection": lambda: Raw({"input_resolution": 8, "output_dim": 6}, proj=weight(8, 6)),
    "biases of attention": lambda: Raw({"embed_dim": 8}, bias_weight=weight(6, 8)),
    "a strip that nothing shows": lambda: Raw({"input_size": 8, "output_size": 6}, weight=weight(2, 8)),
    "an unsharded one": lambda: Raw({"input_size": 8, "output_size": 6}, weight=strip(weight(6, 3), -1)),
    "tables of a graph layer": lambda: Raw(
        {"in_channels": 16, "out_channels": 16}, edge_weight=weight(16, 3), attn_weight=weight(4, 16)
    ),
    "parts that do not make up a whole": lambda: Raw(
        {"in_features": 8, "out_features": 6}, query_weight=weight(4, 8), key_weight=weight(3, 8)
    ),
    "positions in a linear layer": lambda: Raw({"in_dim": 8, "out_dim": 6}, rel_pos_weight=weight(6, 8)),
    "codebook in one": lambda: Raw({"in_dim": 8, "out_dim": 6}, codebook_weight=weight(6, 8)),
    "tokens in one": lambda: Raw({"in_dim": 8, "out_dim": 6}, token_weight=weight(6, 8)),
    "a raw head": lambda: Raw({"lm_head_bias": torch.ones(6)}, lm_head_weight=weight(6, 8)),
    "a raw table": lambda: Raw({"embed_bias": torch.ones(6)}, embed_weight=weight(6, 8)),
    "weights of another kind": lambda: Raw({"in_dim": 8, "out_dim": 6}, weight_sigma=weight(6, 8)),
    "no bias": lambda: Raw({"mixing_bias": None}, mixing_weight=weight(6, 8)),
}


@pytest.mark.parametrize("kind", NO_MAP)
def test_what_is_no_linear_map_goes_to_adamw_and_can_be_routed(kind):
    model = nn.ModuleDict({"it": NO_MAP[kind](), "linear": nn.Linear(8, 8)})
    optimizer = HybridAdaptiveMuon.from_model(model)
    assert names_of(optimizer, True) == {"linear.weight"}
    count = sum(p.ndim == 2 for p in model["it"].parameters())
    summary = optimizer.describe(each=False)
    assert f"; {count} of them two-dimensional, but not the weight of a linear map" in summary
    for name, _ in model["it"].named_parameters():
        assert f"pass routes={{'it.{name}': 'adaptive_muon'}})" in optimizer.describe()
        assert f"it.{name}" in names_of(
            HybridAdaptiveMuon.from_model(model, routes={f"it.{name}": "adaptive_muon"}), True
        )


def test_a_model_of_linear_maps_alone_says_nothing_of_others():
    assert "of them" not in HybridAdaptiveMuon.from_model(nn.Linear(4, 4)).describe()


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("layers.0.fc.weight", "adaptive_muon"),
        ("experts.weight12", "adaptive_muon"),
        ("attn.in_proj_weight", "adaptive_muon"),
        ("q_proj.lora_A.default.weight", "adaptive_muon"),
        ("q_proj.lora_B", "adaptive_muon"),
        ("q_proj.lora_B.default", "adaptive_muon"),
        ("mixer.rel_pos_weight", "adamw"),
        ("model.lm_head_weight", "adamw"),
        ("fc.parametrizations.weight.original1", "adaptive_muon"),
        ("fc.weight_orig", "adaptive_muon"),
        ("mixer.A_log", "adamw"),
        ("embed.lora_embedding_A.default", "adamw"),
        ("table.parametrizations.table.original", "adamw"),
        ("latents", "adamw"),
        ("weights", "adamw"),
        ("fc.weight_scale_inv", "adamw"),
        ("class_labels_classifier.layers.0.weight", "adamw"),
    ],
)
def test_the_constructor_goes_by_names_where_it_has_them(name, algorithm):
    p = weight(4, 6)
    (group,) = HybridAdaptiveMuon([(name, p)]).param_groups
    assert group["use_muon"] is (algorithm == "adaptive_muon")
    assert HybridAdaptiveMuon([p]).param_groups[0]["use_muon"], "without a name there is the shape alone"
    assert HybridAdaptiveMuon([{"params": [(name, p)], "use_muon": True}]).param_groups[0]["use_muon"]
    p.muon_blocks = (2, 2)
    assert name.startswith("class") or HybridAdaptiveMuon([(name, p)]).param_groups[0]["use_muon"], "it is tagged"


def test_the_constructor_names_its_remedy():
    assert "set 'use_muon': True in its group" in route_parameter(weight(4, 6), "latents").reason


# ---- adapters ----


class LoraLayer(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base, inputs, outputs, rank=3):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})
        self.lora_magnitude_vector = nn.ParameterDict({"default": weight(outputs)})


class LoraEmbedding(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_embedding_A = nn.ParameterDict({"default": weight(3, base.num_embeddings)})
        self.lora_embedding_B = nn.ParameterDict({"default": weight(base.embedding_dim, 3)})


class Experts(Raw):
    """Experts in one parameter, which peft adapts too."""


class Adapted(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = LoraEmbedding(nn.Embedding(20, 8))
        self.linear_table = LoraLayer(nn.Embedding(20, 8), 20, 8)
        self.hidden = LoraLayer(nn.Linear(8, 8), 8, 8)
        self.twice = LoraLayer(LoraLayer(nn.Linear(8, 8), 8, 8), 8, 8)
        self.experts = LoraLayer(Experts(up=weight(2, 8, 8)), 8, 8)
        self.out = LoraLayer(nn.Linear(8, 20, bias=False), 8, 20)
        self.lm_head = LoraLayer(nn.Linear(8, 24), 8, 24)
        if tied:
            self.out.base_layer.weight = self.embed.base_layer.weight


FACTORS = {f"{name}.lora_{x}.default.weight" for x in "AB" for name in ("hidden", "twice", "twice.base_layer")}
BASES = {"hidden.base_layer.weight", "twice.base_layer.base_layer.weight"}


def test_factors_of_linear_layers_only():
    model = Adapted()
    # An embedding's shape shows the last layer to be the head; here that is the one before it.
    model.lm_head = nn.Identity()
    assert muon(model) == FACTORS | BASES
    reasons = {name: route.reason for name, _, route in route_model(model)}
    assert reasons["embed.lora_embedding_A.default"] == "adapter of an embedding"
    assert reasons["linear_table.lora_B.default.weight"] == "adapter of an embedding"
    assert reasons["out.lora_A.default.weight"] == "adapter of an output head"
    assert reasons["experts.lora_A.default.weight"] == "adapter of Experts, which is not a linear map"


def test_factors_of_a_head_by_its_name_and_of_a_tied_one():
    assert muon(Adapted(tied=True)) == FACTORS | BASES


def test_factors_as_a_parametrization():
    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B, self.other = weight(3, 8), weight(6, 3), weight(6, 8)

        def forward(self, base):
            return base + self.lora_B @ self.lora_A

    linear, table = nn.Linear(8, 6), nn.Embedding(6, 8)
    for layer in (linear, table):
        nn.utils.parametrize.register_parametrization(layer, "weight", Lora())
    expected = {f"parametrizations.weight.{name}" for name in ("original", "0.lora_A", "0.lora_B")}
    assert muon(linear) == expected
    assert muon(nn.Sequential(table)) == set()


def test_peft():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "hidden": nn.Linear(8, 8), "lm_head": nn.Linear(8, 24)})
    config = peft.LoraConfig(r=3, target_modules=["embed", "hidden", "lm_head"], use_dora=True)
    model = peft.inject_adapter_in_model(config, model)
    assert muon(model) == {"hidden.base_layer.weight", *(f"hidden.lora_{x}.default.weight" for x in "AB")}


def test_adalora():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"hidden": nn.Linear(8, 8), "lm_head": nn.Linear(8, 24)})
    config = peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["hidden", "lm_head"])
    model = peft.inject_adapter_in_model(config, model)
    assert muon(model) == {"hidden.base_layer.weight", *(f"hidden.lora_{x}.default" for x in "AB")}


# ---- output heads ----

HEADS = [
    *("lm_head", "head", "heads.head", "v_head.summary", "LMHead", "lmhead", "head2", "score", "qa_outputs"),
    *("class_labels_classifier.layers.0", "class_labels_classifier", "class_labels_proj", "bbox_predictor.layers.2"),
    *("bbox_embed.0.layers.1", "model.decoder.class_embed.3", "enc_score_head", "mask_logits", "box_pred", "cls.fc"),
    *("cls.predictions.transform.dense", "pre_classifier", "0.lm_head", "value_head", "layers.3.classifier"),
    # words in the names of outer modules
    *("cross_encoder.classifier", "self_training_model.classifier", "token_model.classifier", "attention_net.head"),
    *("attention_model.classifier", "multi_head_model.lm_head", "attn.model.model.score", "attention_classifier"),
    # words before a last one that decides
    *("token_classifier", "pos_tag_classifier", "multi_class_head", "pos_head", "query_head", "self_predictor"),
    *("embedding_head", "token_logits", "cross_head", "self_supervised_head.fc", "encoder_bbox_head.layers.1"),
    *("head_dist", "head_dist.linear", "head_linear", "logits_proj", "encoder_output_bbox_embed.layers.2"),
]
HIDDEN = [
    *("attention_head_proj", "multi_head_attention.out", "blocks.0.heads.3.key", "sa_head.key", "attn.score"),
    *("self_attn.heads.0", "score_proj", "layers.2.score", "headless", "class_embedding.linear_1"),
    *("predictor.layer.3.attention.query", "predictor.layer.3.mlp.fc1", "predictor.embeddings.projection"),
    *("joint.pred", "classical", "overhead.fc.inner.outer", "token_class_token", "blocks.1.mlp.fc2"),
    *("multi_head.fc", "cross_attention_heads.0", "attention.heads.1", "crossattention.self.head", "attn.head"),
    *("layers.0.mlp.router.classifier", "gate.classifier", "head.attention.out_proj", "head.layers.0.linear"),
    *("bbox_embeddings.bbox_projection", "bbox_projection", "class_proj", "label_proj", "label_encoder.fc"),
    *("label_features_projection", "class_cond", "y_embedder.label_mlp", "label_emb", "layers.0.head_dist"),
]


@pytest.mark.parametrize("name", HEADS)
def test_names_of_heads(name):
    assert head_by_name(name.split("."))


@pytest.mark.parametrize("name", HIDDEN)
def test_names_of_hidden_layers(name):
    assert head_by_name(name.split(".")) is None


def test_a_head_in_a_block_is_known_by_its_shape():
    """As the heads of DeepSeek's further predicted tokens: layers.61.shared_head.head."""
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(20, 8),
            "layers": nn.ModuleList([nn.ModuleDict({"head": nn.Linear(8, n, bias=False)}) for n in (20, 16)]),
            "up": nn.Linear(8, 20, bias=False),
            "down": nn.Linear(20, 8, bias=False),
        }
    )
    assert muon(model) == {"layers.1.head.weight", "up.weight", "down.weight"}


def nest(**parts):
    """Return a module with parts by their dotted names, "__" for a dot."""
    root = nn.Module()
    for name, part in parts.items():
        *path, last = name.split("__")
        outer = root
        for each in path:
            if not hasattr(outer, each):
                outer.add_module(each, nn.Module())
            outer = getattr(outer, each)
        outer.add_module(last, part)
    return root


def linear(inputs=8, outputs=5):
    return nn.Linear(inputs, outputs, bias=False)


@pytest.mark.parametrize(
    "name",
    [
        *("fc", "out", "out_proj", "proj_out", "output", "last_linear", "final_layer", "final", "readout"),
        *("generator__proj", "final_layer__linear", "net__fc", "net__decoder_out", "predict", "fc_out", "vocab_proj"),
    ],
)
def test_the_last_linear_map_is_the_head_by_its_name(name):
    dotted = name.replace("__", ".") + ".weight"
    assert muon(nest(layers__0__fc=linear(), body=linear(), **{name: linear()})) == {
        "layers.0.fc.weight",
        "body.weight",
    }
    hidden = {
        "followed by another": nest(**{name: linear(), "later": linear()}),
        "square": nest(**{name: linear(8, 8)}),
        "in a block": nest(**{f"layers__0__{name}": linear()}),
        "deep": nest(**{f"a__b__{name}": linear()}),
    }
    for kind, model in hidden.items():
        assert any(each.endswith(dotted) for each in muon(model)), kind


@pytest.mark.parametrize(
    "name",
    ["mlp__out", "attn__out_proj", "self_attn__output", "fc2", "linear2", "conv_out", "mm_projector__out_proj", "0"],
)
def test_the_last_linear_map_of_a_network_in_the_middle_is_no_head(name):
    assert len(muon(nest(**{name: linear()}))) == 1
    assert len(muon(nn.MultiheadAttention(8, 2))) == 2
    assert len(muon(nn.Sequential(linear(), nn.ReLU(), nn.Sequential(linear())))) == 2


def test_adaptive_softmax_is_a_head():
    model = nest(body=linear(8, 8), loss=nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10]))
    assert muon(model) == {"body.weight"}


class AttentionPooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.k_proj, self.output_proj = linear(8, 8), linear(8, 8)


def test_what_contains_attention_or_repeated_blocks_is_no_head():
    model = nest(
        vision__head__attention=nn.MultiheadAttention(8, 2),
        vision__head__mlp__fc1=linear(),  # Siglip's
        pool__head=AttentionPooling(),  # Aimv2's
        predictor__layers__0__fc=linear(),
        predictor__proj=linear(),  # V-JEPA's
        classifier__layers__0=linear(),
        classifier__layers__2=linear(),
    )
    assert {name for name, algorithm in routed(model).items() if algorithm == "adamw"} == {
        *("classifier.layers.0.weight", "classifier.layers.2.weight"),
        *("vision.head.attention.in_proj_bias", "vision.head.attention.out_proj.bias"),
    }


@pytest.mark.parametrize("name", ["pos", "wpe", "position_embeddings", "token_type_embeddings", "segment_embed"])
def test_the_table_of_positions_or_types_makes_no_head(name):
    assert muon(nest(**{name: nn.Embedding(20, 8), "body": linear(8, 8), "up": linear(8, 20)})) == {
        "body.weight",
        "up.weight",
    }


def test_the_reach_back_from_the_last_layer_stops_at_blocks():
    table, up = nn.Embedding(20, 8), lambda: linear(8, 20)
    blocks = {f"layers__{i}__w{j}": up() for i in range(2) for j in (1, 3)}
    assert len(muon(nest(table=table, **blocks))) == 4
    assert len(muon(nest(table=table, **blocks, top=up()))) == 4
    assert len(muon(nest(table=table, a=up(), **{f"heads_of__{i}": up() for i in range(3)}))) == 0
    many = nest(table=table, **{f"layers__{i}": up() for i in range(3)}, top=up())
    assert muon(many) == {f"layers.{i}.weight" for i in range(3)}


def test_all_within_a_head_is_the_head():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.top = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 20))

        def get_output_embeddings(self):
            return self.top

    assert muon(Wrapped()) == {"body.weight"}


# ---- stored (in, out) ----


class Conv1D(nn.Module):
    """Hugging Face's."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = weight(nx, nf), weight(nf)

    def forward(self, x):
        return x @ self.weight + self.bias


def test_conv1d_is_stored_transposed():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(20, 8), "up": Conv1D(12, 8), "down": Conv1D(8, 12), "fc": nn.Linear(8, 8)}
    )
    optimizer = HybridAdaptiveMuon.from_model(model)
    assert names_of(optimizer, True) == {"up.weight", "down.weight", "fc.weight"}
    assert {n for n, p in model.named_parameters() if getattr(p, "muon_transposed", False)} == {
        "up.weight",
        "down.weight",
    }
    assert "up.weight  (hidden matrix, stored (in, out))" in optimizer.describe()


def test_a_head_that_is_stored_transposed_is_known_by_its_shape():
    model = nn.Sequential(nn.Embedding(20, 8), Conv1D(8, 20), Conv1D(20, 8))
    assert muon(model) == {"1.weight"}
    HybridAdaptiveMuon.from_model(model)
    assert not hasattr(model[2].weight, "muon_transposed")
    HybridAdaptiveMuon.from_model(model, params=[{"params": [model[2].weight], "use_muon": True}])
    assert model[2].weight.muon_transposed


def test_what_is_called_conv1d_and_is_none():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight(8, 12)

    Other.__name__ = "Conv1D"
    assert muon(Other()) == set()
    assert muon(nn.Conv1d(8, 8, 3)) == set()


def test_copies_and_replaced_parameters_are_tagged_again():
    model = nn.ModuleDict({"up": Conv1D(12, 8)})
    optimizer = HybridAdaptiveMuon.from_model(model)
    copied, other = copy.deepcopy((model, optimizer))
    other.step()
    assert copied["up"].weight.muon_transposed
    model["up"].weight = optimizer.param_groups[0]["params"][0] = weight(8, 12)
    optimizer.step()
    assert model["up"].weight.muon_transposed


def test_a_refused_group_leaves_no_tag():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "up": Conv1D(12, 8)})
    optimizer = HybridAdaptiveMuon.from_model(model, params=model["fc"].parameters())
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [model["up"].weight], "lr": -1.0})
    assert not hasattr(model["up"].weight, "muon_transposed")
    optimizer.add_param_group({"params": [model["up"].weight]})
    assert model["up"].weight.muon_transposed


def test_gpt2():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20))
    optimizer = HybridAdaptiveMuon.from_model(model)
    expected = {
        f"transformer.h.{i}.{n}.weight"
        for i in (0, 1)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert names_of(optimizer, True) == expected
    assert {n for n, p in model.named_parameters() if getattr(p, "muon_transposed", False)} == expected
