# SPDX-License-Identifier: Apache-2.0
"""Experts in one tensor: each a matrix with ``stacked_experts``, in its true orientation; and routers."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
from expert_matrices import check_matrices
from separate import Apart, Language, check_separate
from side_by_side import normal
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon


def fields(**values: Any) -> Callable[[Any], None]:
    """An edit of a config: these values in these fields."""
    return lambda config: vars(config).update(values)


SPARSE = fields(mlp_layer_types=["sparse"] * 2, first_k_dense_replace=0)
GATED, TRANSPOSED = ("gate_up_proj", "down_proj"), "stored (in, out)"
HALVES = "gate and up projection of 48 rows each"
# The type of model, an edit of its config, the class of its experts, their projections up (with the gate) and down, and
# what describe() says of the first.
EXPERTS: list[tuple[str, Any, str, tuple[str, str], str]] = [
    ("qwen3_moe", None, "Qwen3MoeExperts", GATED, HALVES),
    ("mixtral", None, "MixtralExperts", GATED, HALVES),
    ("deepseek_v3", SPARSE, "DeepseekV3Experts", GATED, HALVES),
    ("qwen3_next", None, "Qwen3NextExperts", GATED, HALVES),
    ("olmoe", None, "OlmoeExperts", GATED, HALVES),
    ("granitemoe", None, "GraniteMoeExperts", GATED, HALVES),
    ("gpt_oss", None, "GptOssExperts", GATED, f"{TRANSPOSED}; {HALVES}, in turn"),
    ("llama4_text", None, "Llama4TextExperts", GATED, f"{TRANSPOSED}; {HALVES}"),
    ("aria_text", None, "AriaExperts", GATED, f"{TRANSPOSED}; {HALVES}"),
    ("longcat_flash", fields(expert_ffn_hidden_size=48), "LongcatFlashExperts", GATED, HALVES),
    ("jetmoe", None, "JetMoeMoE", ("input_linear.weight", "output_linear.weight"), HALVES),
    ("nemotron_h", None, "NemotronHExperts", ("up_proj", "down_proj"), "stack of hidden matrices"),
]
NAMES = [kind for kind, *_ in EXPERTS]


def experts_of(kind: str, change: Any, name: str) -> tuple[nn.Module, str, Any]:
    """A tiny model, and the first of its modules of a class with its name."""
    model = tiny_models.tiny(kind, change)
    path = next(path for path, module in model.named_modules() if type(module).__name__ == name)
    return model, path, model.get_submodule(path)


@pytest.mark.parametrize(("kind", "change", "name", "leaves", "text"), EXPERTS, ids=NAMES)
def test_each_expert_is_a_matrix_as_the_model_multiplies_by_it(
    kind: str, change: Any, name: str, leaves: tuple[str, str], text: str
) -> None:
    """Hugging Face's own forward decides."""
    model, path, module = experts_of(kind, change, name)
    optimizer = HybridAdaptiveMuon.from_model(model, stacked_experts=True, split_gate_up=True)
    up, down = (module.get_parameter(leaf) for leaf in leaves)
    assert f"{path}.{leaves[0]}  (stack of hidden matrices" in optimizer.describe()
    routes = {id(p): route for _, p, route in optimizer.routes}
    assert routes[id(up)].text.endswith(text) and routes[id(down)].algorithm == "adaptive_muon"
    check_matrices(module, up, down, lambda: tiny_models.run(model))


def stacks(*leaves: str) -> dict[str, Apart]:
    """Each expert is a matrix."""
    return {leaf: lambda w: [*w] for leaf in leaves}


STACKED, SPLIT = {"stacked_experts": True}, {"stacked_experts": True, "split_gate_up": True}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, bool], dict[str, Apart]]] = {
    "mixtral": (lambda: Language("mixtral"), STACKED, stacks("gate_up_proj", "experts.down_proj")),
    "qwen3_moe": (
        lambda: Language("qwen3_moe"),
        SPLIT,
        {"gate_up_proj": lambda w: [half for each in w for half in each.chunk(2)]} | stacks("down_proj"),
    ),
    "deepseek_v3": (lambda: Language("deepseek_v3", SPARSE), STACKED, stacks("gate_up_proj", "experts.down_proj")),
    "gpt_oss": (
        lambda: Language("gpt_oss"),
        SPLIT,
        {"gate_up_proj": lambda w: [half for each in w for half in (each[::2], each[1::2])]} | stacks("down_proj"),
    ),
    "llama4": (
        lambda: Language("llama4_text"),
        SPLIT,
        {"gate_up_proj": lambda w: [half for each in w for half in each.chunk(2)]} | stacks("experts.down_proj"),
    ),
}


@pytest.mark.parametrize("method", ["namo_d", "normuon", "adamuon"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_separate_weights(name: str, method: str) -> None:
    check_separate(*MODELS[name], method)


# ---- what is said, and what decides


def reasons(model: nn.Module, **options: Any) -> dict[str, tuple[str, str]]:
    """The algorithm and the text of each parameter, by its name."""
    routes = HybridAdaptiveMuon.from_model(model, **options).routes
    return {name: (route.algorithm, route.text) for name, _, route in routes}


def test_without_the_switch_experts_go_to_adamw_and_it_is_named() -> None:
    model = tiny_models.tiny("gpt_oss")
    said = reasons(model)
    for leaf in GATED:
        algorithm, text = said[f"layers.0.mlp.experts.{leaf}"]
        assert algorithm == "adamw" and text == "3-D, a stack of experts; stacked_experts=True makes each a matrix"
    made = HybridAdaptiveMuon.from_model(model)
    assert "4 of them 3-D, stacks of experts" in made.describe(each=False)
    found = [finding.remedy for finding in made.further_findings()]
    assert found and set(found) == {"pass stacked_experts=True to from_model"}
    with pytest.raises(ValueError, match="stacked_experts=True makes each a matrix"):
        HybridAdaptiveMuon.from_model(model, routes={"*experts.down_proj": "adaptive_muon"})
    said = reasons(model, stacked_experts=True)
    for leaf in ("gate_up_proj_bias", "down_proj_bias"):
        assert said[f"layers.0.mlp.experts.{leaf}"][0] == "adamw"


def test_another_optimizer_of_the_model_makes_its_own_choice() -> None:
    """What one has tagged is not another's."""
    model = tiny_models.tiny("gpt_oss")
    p = model.layers[0].mlp.experts.down_proj
    assert reasons(model, stacked_experts=True)["layers.0.mlp.experts.down_proj"][0] == "adaptive_muon"
    assert reasons(model)["layers.0.mlp.experts.down_proj"][0] == "adamw"
    with pytest.raises(ValueError, match="parameters of AdaptiveMuon must be matrices"):
        AdaptiveMuon([p])
    assert not HybridAdaptiveMuon([p]).param_groups[0]["use_muon"]


@pytest.mark.parametrize(
    ("by", "algorithm"), [("use_muon", "adamw"), ("routes", "adamw"), ("routes", "adaptive_muon")]
)
def test_use_muon_and_routes_decide_before(by: str, algorithm: str) -> None:
    model = tiny_models.tiny("gpt_oss")
    name = "layers.0.mlp.experts.down_proj"
    if by == "use_muon":
        model.get_parameter(name).use_muon = False
    said = reasons(model, stacked_experts=True, routes={name: algorithm} if by == "routes" else None)
    assert said[name][0] == algorithm and said[name.replace("layers.0", "layers.1")][0] == "adaptive_muon"
    assert getattr(model.get_parameter(name), "muon_form", None) == ("stack" if algorithm != "adamw" else None)


class Unknown(nn.Module):
    """Experts that nothing shows the order of."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.w1, self.experts.w2 = nn.Parameter(normal((3, 8, 6))), nn.Parameter(normal((3, 6, 8)))
        self.table = nn.Parameter(normal((3, 8, 6)))


class Contradictory(Unknown):
    """Projections that do not fit together in the order that an attribute gives, or in any."""

    def __init__(self, down: tuple[int, ...], said: bool) -> None:
        super().__init__()
        self.experts.gate_up_proj, self.experts.down_proj = nn.Parameter(normal((3, 8, 6))), nn.Parameter(normal(down))
        self.experts.is_transposed, self.experts.has_gate, self.experts.is_concatenated = said, True, True


def test_what_is_not_recognized_is_said(caplog: pytest.LogCaptureFixture) -> None:
    said = reasons(Unknown(), stacked_experts=True)
    for name in ("experts.w1", "experts.w2"):
        assert said[name][0] == "adamw" and said[name][1].endswith(
            "set its muon_stacked = True; not taken for experts, stacked_experts does not recognize the module"
        )
    assert "stacked_experts" not in said["table"][1]
    [record] = caplog.records
    assert (
        "2 weights are not taken for experts" in record.getMessage()
        and "experts.w1, experts.w2" in record.getMessage()
    )
    for down, transposed in (((3, 6, 4), True), ((3, 4, 6), False), ((3, 6, 6), False)):
        said = reasons(Contradictory(down, transposed), stacked_experts=True)
        assert said["experts.gate_up_proj"][0] == said["experts.down_proj"][0] == "adamw"
    assert reasons(Contradictory((3, 6, 4), False), stacked_experts=True)["experts.down_proj"][0] == "adaptive_muon"


def test_a_tag_of_the_users_needs_no_switch() -> None:
    """And the order of the dimensions is then the user's business, as before."""
    model = Unknown()
    for p in model.experts.parameters():
        p.muon_stacked = True
    assert reasons(model)["experts.w1"] == ("adaptive_muon", "stack of hidden matrices")


class Counted(nn.Module):
    """A grouped linear layer of its own kind, whose attributes give outputs and inputs."""

    def __init__(self, outputs: int, inputs: int, *, transposed: bool, number: int = 3) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = number, inputs, outputs
        self.weight = nn.Parameter(normal((3, inputs, outputs) if transposed else (3, outputs, inputs)))


@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_and_inputs_by_attributes(transposed: bool) -> None:
    model = Counted(8, 6, transposed=transposed)
    [route] = [route for _, _, route in HybridAdaptiveMuon.from_model(model, stacked_experts=True).routes]
    assert route.algorithm == "adaptive_muon" and route.transposed is transposed
    for unclear in (Counted(8, 8, transposed=transposed), Counted(8, 6, transposed=transposed, number=4)):
        assert reasons(unclear, stacked_experts=True)["weight"][0] == "adamw"


# ---- routers


ROUTERS = {
    **{"mixtral": "layers.0.mlp.gate.weight", "qwen3_moe": "layers.0.mlp.gate.weight"},
    **{"gpt_oss": "layers.0.mlp.router.weight", "llama4_text": "layers.0.feed_forward.router.weight"},
    **{"deepseek_v3": "layers.0.mlp.gate.weight", "jamba": "layers.1.feed_forward.router.weight"},
    **{"jetmoe": "layers.0.mlp.router.layer.weight", "longcat_flash": "layers.0.mlp.router.classifier.weight"},
    "switch_transformers": "encoder.block.1.layer.1.mlp.router.classifier.weight",
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_go_to_adamw_unless_they_are_sent(kind: str) -> None:
    model, name = tiny_models.tiny(kind, SPARSE if kind == "deepseek_v3" else None), ROUTERS[kind]
    assert reasons(model)[name] == ("adamw", "router")
    assert reasons(model, routes={name: "adaptive_muon"})[name][0] == "adaptive_muon"
    model.get_parameter(name).use_muon = True
    assert reasons(model)[name] == ("adaptive_muon", "its attribute use_muon=True")


class Beside(nn.Module):
    """A gate beside experts, and one that has none beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.moe, self.glu, self.router = nn.Module(), nn.Module(), nn.Module()
        self.moe.gate, self.moe.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.glu.gate, self.glu.up = nn.Linear(6, 8), nn.Linear(6, 8)
        self.router.gate, self.router.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))


def test_a_gate_is_a_router_only_beside_experts() -> None:
    model = Beside()
    model.moe.gate = checkpoint_wrapper(model.moe.gate)
    said = {name: algorithm for name, (algorithm, _) in reasons(model).items() if name.endswith("weight")}
    expected = {
        name: "adamw" if name in ("moe.gate.weight", "router.gate.weight") else "adaptive_muon" for name in said
    }
    assert said == expected


def test_a_router_by_its_name() -> None:
    """Without the model a gate may be any, and goes where it went."""
    model = Beside()
    groups = HybridAdaptiveMuon(
        [("mlp.router.weight", model.glu.gate.weight), ("mlp.gate.weight", model.glu.up.weight)]
    )
    assert [(group["use_muon"], group["param_names"]) for group in groups.param_groups] == [
        (True, ["mlp.gate.weight"]),
        (False, ["mlp.router.weight"]),
    ]
