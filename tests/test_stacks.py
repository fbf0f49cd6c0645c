# SPDX-License-Identifier: Apache-2.0
"""Stacks of matrices, such as the experts of a layer: a 3-D parameter tagged ``muon_stacked``."""

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from side_by_side import assert_resumes, assert_same, difference, each_dtype, each_method, legal, normal, saved, smooth
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.orthogonalize import newton_schulz
from emerging_optimizers.adaptive_muon.orthogonalize.newton_schulz import NewtonSchulz


TALL, WIDE, SQUARE, SINGLE = (4, 18, 7), (4, 7, 18), (5, 9, 9), (1, 12, 8)
# Gate and up of three experts, tall and wide; and two groups of a tall, a wide and a wide block. The same with columns.
Blocks = tuple[int, ...] | ColumnBlocks
FUSED: list[tuple[tuple[int, int, int], Blocks]] = [
    ((3, 40, 12), (20, 20)),
    ((3, 16, 24), (8, 8)),
    ((2, 48, 14), (16, 6, 2)),
]
FUSED += [((experts, *shape[::-1]), ColumnBlocks(sizes)) for (experts, *shape), sizes in FUSED]
HYPER: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "fp32_matmul_prec": "highest", "extra_scale_factor": 0.2}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True, "beta2": 0.8, "scale_mode": "unit_rms_norm"},
    "corrected": {"bias_correction": True, "weight_decay_method": "palm"},
    "l2": {"weight_decay_method": "l2", "bias_correction": False},
    "cautious": {"weight_decay_method": "cautious"},
    "adaptive": {"weight_decay_method": "adaptive", "namo_d_clamp": 0.3},
}


PAIRS = [(method, name) for method, name in product(METHODS, OPTIONS) if legal(method, OPTIONS[name])]


def stack(shape: tuple[int, ...], blocks: Blocks | None = None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    p = nn.Parameter(normal(shape).to(dtype))
    p.muon_stacked = True
    if blocks is not None:
        p.muon_blocks = blocks
    return p


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Of experts that learn more and less, and one that no token reached."""
    for p in params:
        size = torch.tensor([1.0, 1e-2, 0.0, 30.0, 1.0])[: p.size(0), None, None]
        p.grad = (size * normal(p.shape, 100 + step) * torch.linspace(0.2, 2, p.size(-1))).to(p.dtype)


def walk(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(optimizer.param_groups[0]["params"], step)
        optimizer.step()


def apart(tensor: torch.Tensor, blocks: Blocks | None) -> list[torch.Tensor]:
    """The matrices of a stack, expert by expert, and of each expert block by block."""
    if isinstance(blocks, ColumnBlocks):
        return [part.mT for part in apart(tensor.mT, tuple(blocks.sizes))]
    parts = []
    for matrix in tensor.detach():
        groups = matrix.view(-1, sum(blocks or matrix.shape[:1]), matrix.size(-1))
        parts += [part.reshape(-1, matrix.size(-1)) for part in groups.split(list(blocks or matrix.shape[:1]), dim=1)]
    return parts


def check_equal(params: list[nn.Parameter], method: str, **options: Any) -> None:
    """Checks a walk of stacks against one of their matrices.

    Products of a batch may round differently, which V doubles and adamuon enlarges, and a bfloat16 weight may be rounded
    to the next number then.
    """
    rounding = 1e-4 if method == "adamuon" else 1e-6
    hyper = {**HYPER, "moment2_method": method, **smooth(method), **options}
    blocks = [getattr(p, "muon_blocks", None) for p in params]
    parts = [[nn.Parameter(part.clone()) for part in apart(*each)] for each in zip(params, blocks, strict=True)]
    one, other = AdaptiveMuon(params, **hyper), AdaptiveMuon([part for each in parts for part in each], **hyper)
    for step in range(3):
        set_gradients(params, step)
        for p, of, each in zip(params, blocks, parts, strict=True):
            for part, grad in zip(each, apart(p.grad, of), strict=True):
                part.grad = grad.clone()
        one.step()
        other.step()
    for p, of, each in zip(params, blocks, parts, strict=True):
        momenta = apart(one.state[p]["momentum_buffer"], of)
        for part, rows, momentum in zip(each, apart(p, of), momenta, strict=True):
            assert difference(rows, part) <= (2**-7 if p.dtype == torch.bfloat16 else rounding), tuple(p.shape)
            assert difference(momentum, other.state[part]["momentum_buffer"]) <= 1e-6, tuple(p.shape)
        if of is None:
            for part, V in zip(each, one.state[p]["moment2_buffer"], strict=True):
                assert difference(V, other.state[part]["moment2_buffer"]) <= 1e-5, tuple(p.shape)


@pytest.mark.parametrize(("method", "options"), PAIRS)
def test_equal_to_separate_matrices(method: str, options: str) -> None:
    check_equal([stack(shape) for shape in (TALL, WIDE, SQUARE, SINGLE)], method, **OPTIONS[options])


@pytest.mark.parametrize(("method", "options"), PAIRS)
def test_equal_to_separate_matrices_with_blocks(method: str, options: str) -> None:
    check_equal([stack(*each) for each in FUSED], method, **OPTIONS[options])


@each_method
def test_low_precision(method: str) -> None:
    check_equal([stack(*each, dtype=torch.bfloat16) for each in ((TALL,), (WIDE,), *FUSED)], method)


@each_method
def test_no_expert_at_all(method: str) -> None:
    p, other = stack((0, 4, 6)), stack(TALL)
    optimizer = AdaptiveMuon([p, other], moment2_method=method)
    walk(optimizer, range(2))
    assert optimizer.state[p]["momentum_buffer"].shape == (0, 4, 6) and not torch.equal(other, normal(TALL))


# ------------------------------------------------------------------------------------------------------- who takes it


def test_a_stack_is_tagged() -> None:
    p, optimizer = nn.Parameter(normal(TALL)), AdaptiveMuon([stack(TALL)])
    for refused in (
        lambda: AdaptiveMuon([p]),
        lambda: optimizer.add_param_group({"params": [p]}),
        lambda: HybridAdaptiveMuon([{"params": [p], "use_muon": True}]),
    ):
        with pytest.raises(ValueError, match=r"\(4, 18, 7\).*muon_stacked = True"):
            refused()
    assert len(optimizer.param_groups) == 1
    p.muon_stacked = False
    with pytest.raises(ValueError, match="muon_stacked"):
        AdaptiveMuon([p])


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5)], ids=str)
def test_the_tag_makes_a_stack_of_three_dimensions_only(shape: tuple) -> None:
    p = stack(shape)
    with pytest.raises(ValueError, match="must be matrices, of two dimensions") as error:
        AdaptiveMuon([p])
    assert "muon_stacked" not in str(error.value)
    assert not HybridAdaptiveMuon([p]).param_groups[0]["use_muon"]


class Experts(nn.Module):
    def __init__(self, tagged: bool):
        super().__init__()
        self.router, self.norm = nn.Linear(6, 3), nn.LayerNorm(6)
        self.up, self.down = nn.Parameter(0.3 * normal((3, 8, 6))), nn.Parameter(0.3 * normal((3, 6, 8), 1))
        for p in (self.up, self.down) if tagged else ():
            p.muon_stacked = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("efd,bd->bef", self.up, self.norm(x)).relu()
        return torch.einsum("edf,bef,be->bd", self.down, hidden, self.router(x).softmax(-1))


@pytest.mark.parametrize("tagged", [False, True], ids=["untagged", "tagged"])
@each_method
def test_routing(method: str, tagged: bool) -> None:
    model = Experts(tagged)
    before = copy.deepcopy(model.state_dict())
    options = {"lr": 0.05, "moment2_method": method, "extra_scale_factor": 0.2, "scalar_lr": 0.01}
    optimizer = HybridAdaptiveMuon.from_model(model, **options)
    by_itself = HybridAdaptiveMuon(model.named_parameters(), **options)
    expected = {"up", "down"} if tagged else set()
    for each in (optimizer, by_itself):
        assert {n for g in each.param_groups if g["use_muon"] for n in g["param_names"]} == expected
    reason = (
        "stack of hidden matrices)" if tagged else "3-D, not a matrix; if it is a stack of matrices (experts), set"
    )
    assert f"3 x 8 x 6  up  ({reason}" in optimizer.describe()
    assert ("2 of them 3-D, stacks of experts perhaps" in optimizer.describe(each=False)) is not tagged
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(normal((16, 6), 7)) - normal((16, 6), 8)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert ("momentum_buffer" in optimizer.state[model.up]) == tagged
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("shape", [(3, 1, 6), (3, 6, 1)], ids=str)
def test_a_stack_of_vectors_belongs_to_adamw(shape: tuple) -> None:
    assert not HybridAdaptiveMuon([stack(shape)]).param_groups[0]["use_muon"]
    tagged = stack(TALL)
    tagged.is_embedding_or_output_parameter = True
    assert not HybridAdaptiveMuon([tagged]).param_groups[0]["use_muon"]


def test_the_kernel_for_symmetric_products_is_not_asked_of_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's raises for more than two dimensions. The kernel wants a GPU: the stack only says it is on one."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    def upstreams(x: torch.Tensor, *, use_syrk: bool, **_: Any) -> torch.Tensor:
        assert not (use_syrk and x.ndim > 2), "use_syrk does not support N-d input."
        return x

    monkeypatch.setattr(newton_schulz.muon_utils, "newton_schulz", upstreams)
    NewtonSchulz("quintic", 5, True, "standard")(torch.ones(8, 16, 16).as_subclass(OnGpu))


# --------------------------------------------------------------------------------------------------------------- state

STATE = {
    "adamuon": lambda rows, columns: (4, rows, columns),
    "normuon": lambda rows, columns: (4, rows, 1) if rows >= columns else (4, 1, columns),
    "namo": lambda rows, columns: (4, 1),
    "namo_d": lambda rows, columns: (4, 1, columns),
}
STATE_OF_BLOCKS = {
    "adamuon": {"moment2_buffer": (2, 48, 14)},
    "normuon": {"moment2_buffer_0": (2, 32, 1), "moment2_buffer_1": (2, 1, 14), "moment2_buffer_2": (2, 1, 14)},
    "namo": {f"moment2_buffer_{block}": (2, 1) for block in range(3)},
    "namo_d": {f"moment2_buffer_{block}": (2, 1, 14) for block in range(3)},
}


@each_dtype
@pytest.mark.parametrize("method", STATE)
def test_state(method: str, dtype: torch.dtype) -> None:
    tall, wide, fused = stack(TALL, dtype=dtype), stack(WIDE, dtype=dtype), stack(*FUSED[2], dtype=dtype)
    optimizer = AdaptiveMuon([tall, wide, fused], moment2_method=method, bias_correction=True)
    walk(optimizer, range(2))
    for p, expected in (
        (tall, {"moment2_buffer": STATE[method](18, 7)}),
        (wide, {"moment2_buffer": STATE[method](7, 18)}),
        (fused, STATE_OF_BLOCKS[method]),
    ):
        shapes = {key: tuple(value.shape) for key, value in optimizer.state[p].items()}
        assert shapes == {"momentum_buffer": tuple(p.shape), "step": (), **expected}
        assert all(value.dtype == torch.float32 for value in optimizer.state[p].values())


@each_dtype
@each_method
def test_checkpoint_resumes(method: str, dtype: torch.dtype) -> None:
    params, others = ([stack(*each, dtype=dtype) for each in ((TALL,), (WIDE,), *FUSED)] for _ in range(2))
    optimizer, resumed = (AdaptiveMuon(each, lr=0.05, moment2_method=method) for each in (params, others))
    assert_resumes((optimizer, params), (resumed, others), walk)


@each_method
def test_state_of_another_number_of_experts_is_refused(method: str) -> None:
    one, other = (AdaptiveMuon([stack(shape)], moment2_method=method) for shape in ((4, 6, 5), (3, 6, 5)))
    walk(one, range(1))
    with pytest.raises(ValueError, match=r"momentum_buffer .*\(3, 6, 5\).*\(4, 6, 5\)"):
        other.load_state_dict(saved(one))
    assert not other.state


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after steps"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_copy_goes_on_alike(copied: Callable[[Any], Any], steps: int) -> None:
    params = [stack(*each) for each in ((TALL,), (WIDE,), *FUSED)]
    optimizer = AdaptiveMuon(params, lr=0.05, moment2_method="namo_d")
    walk(optimizer, range(steps))
    others, other = copied((params, optimizer))
    for each in (optimizer, other):
        walk(each, range(steps, steps + 2))
    assert_same((optimizer, params), (other, others))
