# SPDX-License-Identifier: Apache-2.0
"""Fused matrices: every block of ``muon_blocks``, of rows or of columns, is optimized as a matrix of its own."""

import copy
import pickle
import re
from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch
from side_by_side import assert_resumes, assert_same, difference, each_dtype, each_method, legal, normal, saved, smooth
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, HybridAdaptiveMuon, update
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.orthogonalize import batches, newton_schulz


# Two tall halves; tall and wide blocks; four query groups, of which the queries are tall and keys and values wide;
# three groups in which only the middle block is square; heads, worked on as one batch. The same with columns.
Blocks = tuple[int, ...] | ColumnBlocks
FUSED: dict[str, tuple[tuple[int, int], Blocks]] = {
    "halves": ((96, 32), (48, 48)),
    "tall and wide": ((96, 32), (64, 24, 8)),
    "query groups": ((96, 32), (16, 4, 4)),
    "three of each": ((144, 32), (8, 32, 8)),
    "heads": ((96, 32), (16,) * 6),
    "halves of columns": ((32, 96), ColumnBlocks((48, 48))),
    "tall and wide, of columns": ((32, 96), ColumnBlocks((64, 24, 8))),
    "column groups": ((32, 96), ColumnBlocks((16, 4, 4))),
    "heads of columns": ((32, 96), ColumnBlocks((16,) * 6)),
}
QUERY_GROUPS = FUSED["query groups"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nesterov": {"nesterov": True, "beta2": 0.8, "scale_mode": "unit_rms_norm"},
    "corrected": {"bias_correction": True, "nesterov": True, "extra_scale_factor": 0.2},
    "not corrected": {"bias_correction": False, "weight_decay_method": "independent", "weight_decay": 0.01},
    "palm": {"weight_decay_method": "palm", "num_ns_steps": 3},
    "l2": {"weight_decay_method": "l2", "scale_mode": "shape_scaling"},
    "cautious": {"weight_decay_method": "cautious"},
    "adaptive": {"weight_decay_method": "adaptive", "bias_correction": True, "namo_d_clamp": 0.3},
}


PAIRS = [(method, name) for method, name in product(METHODS, OPTIONS) if legal(method, OPTIONS[name])]


def gradient(shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Noise of which some rows and columns are larger, so that every block has another size."""
    return normal(shape, 100 + step) * torch.linspace(0.1, 3, shape[0])[:, None] * torch.linspace(0.5, 2, shape[1])


def fused(shape: tuple[int, int], blocks: Any, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    p = nn.Parameter(normal(shape).to(dtype))
    p.muon_blocks = blocks
    return p


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    for p in params:
        p.grad = gradient(p.shape, step).to(p.dtype)


def walk(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(optimizer.param_groups[0]["params"], step)
        optimizer.step()


def apart(tensor: torch.Tensor, blocks: Blocks) -> list[torch.Tensor]:
    """The blocks of what lies like the fused matrix, by another road than the package's: one view, one split."""
    if isinstance(blocks, ColumnBlocks):
        return [part.mT for part in apart(tensor.mT, tuple(blocks.sizes))]
    groups = tensor.detach().view(-1, sum(blocks), tensor.size(-1))
    return [part.reshape(-1, tensor.size(-1)) for part in groups.split(list(blocks), dim=1)]


def state_apart(state: dict[str, torch.Tensor], blocks: Blocks) -> list[dict[str, torch.Tensor]]:
    """The state of each block, under the names that the state of a separate matrix has."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in getattr(blocks, "sizes", blocks)]
    for key, value in state.items():
        if key == "step":
            for part in parts:
                part[key] = value
        elif key[-1].isdigit():
            name, _, block = key.rpartition("_")
            parts[int(block)][name] = value
        else:
            for part, rows in zip(parts, apart(value, blocks), strict=True):
                part.setdefault(key, rows)
    return parts


@each_dtype
@pytest.mark.parametrize(("method", "options"), PAIRS)
def test_equal_to_separate_matrices(method: str, options: str, dtype: torch.dtype) -> None:
    """A block is worked on as its own matrix.

    Its rows lie apart in the fused matrix, and sums over other strides may turn a last bit, which the iteration
    magnifies. V squares the result. A bfloat16 weight may be rounded to the next number then.
    """
    # In full precision, since bfloat16 turns the last bit of a sum into a difference of 2^-8.
    hyper = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "fp32_matmul_prec": "highest"}
    hyper |= {"moment2_method": method, **smooth(method), **OPTIONS[options]}
    within = {"momentum_buffer": 1e-6, "moment2_buffer": 1e-5, "step": 0.0}
    of_weights = 2**-7 if dtype == torch.bfloat16 else 1e-4 if method == "adamuon" else 2e-6
    params = [fused(*each, dtype) for each in FUSED.values()]
    parts = [[nn.Parameter(part.clone()) for part in apart(p, p.muon_blocks)] for p in params]
    one, other = AdaptiveMuon(params, **hyper), AdaptiveMuon([part for each in parts for part in each], **hyper)
    for step in range(3):
        set_gradients(params, step)
        for p, each in zip(params, parts, strict=True):
            for part, grad in zip(each, apart(p.grad, p.muon_blocks), strict=True):
                part.grad = grad.clone()
        one.step()
        other.step()
        for p, each in zip(params, parts, strict=True):
            assert p.dtype == dtype
            states = state_apart(one.state[p], p.muon_blocks)
            for part, rows, state in zip(each, apart(p, p.muon_blocks), states, strict=True):
                assert difference(part, rows) <= of_weights, (step, p.muon_blocks)
                assert state.keys() == other.state[part].keys()
                for key, value in other.state[part].items():
                    assert difference(state[key], value) <= within[key], (key, step, p.muon_blocks)


@each_method
def test_blocks_change_the_result(method: str) -> None:
    """Without the tag the fused matrix is one, and other blocks are another matrix: by more than any rounding."""
    results = []
    of_columns = map(ColumnBlocks, [(16, 16), (8, 8), (8,) * 4, (24, 8)])
    for blocks in (None, (96,), ColumnBlocks((32,)), (16, 4, 4), (4, 4, 16), (64, 16, 16), *of_columns):
        p = fused((96, 32), blocks)
        walk(AdaptiveMuon([p], lr=0.05, moment2_method=method), range(2))
        results.append(p.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for one, other in combinations(results[2:], 2):
        assert (one - other).norm() > 0.01 * (one - normal((96, 32))).norm()


@each_method
def test_blocks_fn_says_the_blocks(method: str) -> None:
    """Before the attribute, which holds where the function returns None; it gets the parameter itself."""
    said, tagged = fused((96, 32), (96,)), fused((48, 32), [24, 24])
    others = [fused((96, 32), (16, 4, 4)), fused((48, 32), (24, 24))]
    asked = []

    def blocks_of(p: torch.Tensor) -> list[int] | None:
        asked.append(p)
        return [16, 4, 4] if p is said else None

    one = AdaptiveMuon([said, tagged], moment2_method=method, blocks_fn=blocks_of)
    other = AdaptiveMuon(others, moment2_method=method)
    for optimizer in (one, other):
        walk(optimizer, range(2))
    assert_same((one, [said, tagged]), (other, others))
    assert {id(p) for p in asked} == {id(said), id(tagged)}


def test_orthogonalize_gets_one_block_at_a_time() -> None:
    class Listening(AdaptiveMuon):
        def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            heard.append((p, tuple(grad.shape), kwargs["lr"]))
            return super().orthogonalize(p, grad, **kwargs)

    heard: list[Any] = []
    p = fused(*QUERY_GROUPS)
    walk(Listening([p], lr=0.25), range(1))
    assert [(each is p, shape, lr) for each, shape, lr in heard] == [(True, (rows, 32), 0.25) for rows in (64, 16, 16)]


@pytest.mark.parametrize("blocks", [(8,) * 12, ColumnBlocks((8,) * 12)], ids=str)
@each_method
def test_equal_blocks_are_one_batch(method: str, blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two parameters; blocks of other sizes are alone."""
    taken: list[tuple[int, ...]] = []
    iterate = newton_schulz.iterate
    monkeypatch.setattr(
        newton_schulz, "iterate", lambda part, *rest: (taken.append((*part.shape,)), iterate(part, *rest))[1]
    )

    def shapes(*of: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(count, 96, size) if isinstance(blocks, ColumnBlocks) else (count, size, 96) for count, size in of]

    walk(AdaptiveMuon([fused((96, 96), blocks) for _ in range(2)], moment2_method=method), range(1))
    assert taken == shapes((24, 8))
    taken.clear()
    sizes = (16,) * 5 + (4, 12)
    other = ColumnBlocks(sizes) if isinstance(blocks, ColumnBlocks) else sizes
    walk(AdaptiveMuon([fused((96, 96), other)], moment2_method=method), range(1))
    assert taken == shapes((5, 16), (1, 4), (1, 12))


def test_no_more_blocks_at_a_time_than_make_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which bounds the memory of a step."""
    monkeypatch.setitem(batches.LIMITS, "cpu", (256, 4 * 16 * 32 * 4))
    taken: list[int] = []
    real = update.average

    def average(Ms: list[torch.Tensor], *rest: Any, **options: Any) -> Any:
        taken.append(len(Ms))
        return real(Ms, *rest, **options)

    monkeypatch.setattr(update, "average", average)
    walk(AdaptiveMuon([fused((96, 32), (16,) * 6)]), range(1))
    assert taken == [4, 2]


def test_column_blocks_are_values() -> None:
    """They travel between ranks, and are compared there."""
    one = ColumnBlocks([64, 32])
    assert one == ColumnBlocks((64, 32)) == pickle.loads(pickle.dumps(one)) and hash(one) == hash(
        ColumnBlocks((64, 32))
    )
    assert one != ColumnBlocks((32, 64)) and one != (64, 32) and repr(one) == "ColumnBlocks(sizes=(64, 32))"
    with pytest.raises(AttributeError):
        one.sizes = (1,)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------ state

# Statistics with an entry a row lie together as the rows do; the others apart, by the number of the block.
STATE = {
    "adamuon": {"moment2_buffer": (96, 32)},
    "normuon": {"moment2_buffer_0": (64, 1), "moment2_buffer_1": (1, 32), "moment2_buffer_2": (1, 32)},
    "namo": {f"moment2_buffer_{block}": (1,) for block in range(3)},
    "namo_d": {f"moment2_buffer_{block}": (1, 32) for block in range(3)},
}
STATE_OF_COLUMNS = {
    "adamuon": {"moment2_buffer": (32, 96)},
    "normuon": {"moment2_buffer_0": (1, 64), "moment2_buffer_1": (32, 1), "moment2_buffer_2": (32, 1)},
    "namo": {f"moment2_buffer_{block}": (1,) for block in range(3)},
    "namo_d": {"moment2_buffer_0": (1, 64), "moment2_buffer_1": (1, 16), "moment2_buffer_2": (1, 16)},
}


@each_dtype
@pytest.mark.parametrize(
    ("method", "name", "expected"),
    [
        (method, name, of_method[method])
        for name, of_method in (("query groups", STATE), ("column groups", STATE_OF_COLUMNS))
        for method in of_method
    ],
)
def test_state(method: str, name: str, expected: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    shape, blocks = FUSED[name]
    p = fused(shape, blocks, dtype)
    optimizer = AdaptiveMuon([p], moment2_method=method)
    walk(optimizer, range(2))
    state = {key: value for key, value in optimizer.state[p].items() if key != "step"}
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "momentum_buffer": shape,
        **expected,
    }
    assert all(value.dtype == torch.float32 for value in state.values())
    assert ("step" in optimizer.state[p]) == METHODS[method].bias_correction


@each_dtype
@each_method
def test_checkpoint_resumes(method: str, dtype: torch.dtype) -> None:
    params, options = [fused(*each, dtype) for each in FUSED.values()], {"lr": 0.05, "moment2_method": method}
    optimizer = AdaptiveMuon(params, **options, bias_correction=True)
    others = [fused(*each, dtype) for each in FUSED.values()]
    resumed = AdaptiveMuon(others, **options, bias_correction=True)
    assert_resumes((optimizer, params), (resumed, others), walk)


@each_method
def test_checkpoint_loads_into_a_model_of_another_dtype(method: str) -> None:
    params, others = [fused(*QUERY_GROUPS)], [fused(*QUERY_GROUPS, torch.float64)]
    one, other = AdaptiveMuon(params, moment2_method=method), AdaptiveMuon(others, moment2_method=method)
    walk(one, range(2))
    other.load_state_dict(saved(one))
    walk(other, range(2, 3))
    assert {value.dtype for key, value in other.state[others[0]].items() if key != "step"} == {torch.float64}


# Blocks when it was saved and when it is loaded. V of adamuon lies entry by entry, whatever the blocks are.
OTHER_BLOCKS = {
    "namo": [((48, 48), None), (None, (48, 48)), ((48, 48), (32, 32, 32)), ((32, 32, 32), (48, 48))],
    "namo_d": [((48, 48), None), (None, (48, 48)), ((48, 48), (32, 32, 32)), ((32, 32, 32), (48, 48))],
    "normuon": [((64, 32), (72, 24)), ((64, 16, 16), (64, 32)), ((72, 24), None), (None, (72, 24))],
}
OTHER_BLOCKS["namo_d"] += [((48, 48), ColumnBlocks((24, 8))), (ColumnBlocks((24, 8)), ColumnBlocks((8, 24)))]
OTHER_BLOCKS["normuon"] += [((72, 24), ColumnBlocks((24, 8)))]


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [(method, *blocks) for method, pairs in OTHER_BLOCKS.items() for blocks in pairs],
    ids=str,
)
def test_state_of_other_blocks_is_refused(method: str, before: Any, after: Any) -> None:
    p, q = fused((96, 32), before), fused((96, 32), after)
    one = AdaptiveMuon([("qkv", p)], lr=0.1, moment2_method=method)
    other = AdaptiveMuon([("qkv", q)], lr=0.2, moment2_method=method)
    walk(one, range(2))
    walk(other, range(5, 6))
    weights, state = q.detach().clone(), copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"(?=.*moment2_buffer)(?=.*'qkv').*blocks"):
        other.load_state_dict(saved(one))
    assert other.state_dict()["param_groups"] == state["param_groups"] and torch.equal(q, weights)
    torch.testing.assert_close(other.state_dict()["state"], state["state"], atol=0, rtol=0)


def test_one_buffer_for_all_blocks_is_refused() -> None:
    """As development versions saved it: the blocks may well have been the same."""
    p = fused((96, 32), (64, 32))
    optimizer = AdaptiveMuon([p], moment2_method="normuon")
    walk(optimizer, range(1))
    old = saved(optimizer)
    [state] = old["state"].values()
    state["moment2_buffer"] = torch.cat([state.pop(f"moment2_buffer_{block}") for block in range(2)])
    with pytest.raises(ValueError, match=r"blocks and the version with which it was saved.* before 0\.1\.0"):
        optimizer.load_state_dict(old)


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after steps"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
@each_method
def test_copy_goes_on_alike(method: str, copied: Callable[[Any], Any], steps: int) -> None:
    params = [fused(*each) for each in FUSED.values()]
    optimizer = AdaptiveMuon(params, lr=0.05, moment2_method=method)
    walk(optimizer, range(steps))
    others, other = copied((params, optimizer))
    for each in (optimizer, other):
        walk(each, range(steps, steps + 2))
    assert_same((optimizer, params), (other, others))


# ----------------------------------------------------------------------------------------------------------- errors

BAD: list[Any] = [
    (7, 7),
    (96, 96),
    (),
    (0, 24),
    (-24, 48),
    (12.0, 12.0),
    ("12", "12"),
    (None,),
    (True, 47),
    48,
    [48, 0],
    {48: 1},
    b"00",
    range(47, 49),
    (size for size in (48, 48)),  # which the check would use up
]
BAD += [ColumnBlocks(size for size in (16, 16)), ColumnBlocks({16: 1})]
BAD += [ColumnBlocks(sizes) for sizes in ((7, 7), (96,), (48, 48), (), (0, 32), (-32, 64), (16.0,), (True, 31), 16)]


@pytest.mark.parametrize(
    "blocks", BAD, ids=lambda blocks: re.sub(" at 0x[0-9a-f]+", "", str(blocks))
)  # the same in every process
@pytest.mark.parametrize("told", ["attribute", "function"])
def test_bad_blocks_are_refused_at_construction(told: str, blocks: Any) -> None:
    p, good = fused((96, 32), blocks if told == "attribute" else None), fused((96, 32), (48, 48))
    options = {"blocks_fn": lambda each: blocks if each is p else None} if told == "function" else {}
    shown = tuple(blocks) if isinstance(blocks, list) else blocks
    length = "32 columns" if isinstance(blocks, ColumnBlocks) else "96 rows"
    expected = rf"blocks of parameter 'qkv.weight'.* {length}, got {re.escape(repr(shown))}. Give the "
    with pytest.raises(ValueError, match=expected):
        AdaptiveMuon([("qkv.weight", p)], **options)
    with pytest.raises(ValueError, match=expected):
        HybridAdaptiveMuon([("qkv.weight", p)], **options)
    optimizer = AdaptiveMuon([("good", good)], **options)
    with pytest.raises(ValueError, match=expected):
        optimizer.add_param_group({"params": [("qkv.weight", p)]})
    assert len(optimizer.param_groups) == 1 and torch.equal(p, normal((96, 32)))


def test_describe_shows_blocks() -> None:
    model = nn.ModuleDict({name: nn.Linear(12, 12, bias=False) for name in ("q", "kv", "out", "up", "table")})
    model.q.weight.muon_blocks, model.kv.weight.muon_blocks = (4, 4, 4), [2, 4, 4, 2]
    model.out.weight.muon_blocks = model.table.weight.muon_blocks = ColumnBlocks((6, 6))
    optimizer = HybridAdaptiveMuon.from_model(model, routes={"table.*": "adamw"})
    assert [line.split("  ")[-1] for line in optimizer.describe().splitlines()[1:5]] == [
        "(hidden matrix, blocks of 3 x 4 rows)",
        "(hidden matrix, blocks of 2, 2 x 4, 2 rows)",
        "(hidden matrix, blocks of 2 x 6 columns)",
        "(hidden matrix)",
    ]
    assert optimizer.describe().endswith("(pattern 'table.*')\nfrozen: 0 parameters, 0 elements")


# ------------------------------------------------------------------------------------------------------------ a GPT

WIDTH, HEADS, GROUPS, VOCABULARY = 32, 4, 2, 19
HEAD = WIDTH // HEADS
QKV = (HEADS // GROUPS * HEAD, HEAD, HEAD)  # rows of one query group: its heads of queries, a key and a value


class Attention(nn.Module):
    """Causal attention in query groups, with one weight for queries, keys and values as Megatron's, or with three.

    Of the output projection, each head has a weight of its own in the other case.
    """

    def __init__(self, fused: bool):
        super().__init__()
        rows = [GROUPS * sum(QKV)] if fused else [GROUPS * size for size in QKV]
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, size, bias=False) for size in rows)
        columns = [WIDTH] if fused else [HEAD] * HEADS
        self.proj = nn.ModuleList(nn.Linear(size, WIDTH, bias=False) for size in columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        of_groups = [layer(x).view(batch, length, GROUPS, -1) for layer in self.qkv]
        q, k, v = of_groups[0].split(QKV, dim=-1) if len(of_groups) == 1 else of_groups
        q = q.reshape(batch, length, HEADS, HEAD)
        k, v = (each.repeat_interleave(HEADS // GROUPS, dim=2) for each in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        inputs = mixed.reshape(batch, length, WIDTH).split([layer.in_features for layer in self.proj], dim=-1)
        return sum(layer(of_layer) for layer, of_layer in zip(self.proj, inputs, strict=True))


class Block(nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(fused), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(12, WIDTH)
        self.blocks = nn.ModuleList(Block(fused) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.positions.weight[: tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


BLOCKS: dict[str, Blocks] = {"qkv": QKV, "proj": ColumnBlocks((HEAD,) * HEADS)}


def separate_weights(model: GPT) -> dict[str, torch.Tensor]:
    """The weights of a model with fused attention, under the names that they have in one with separate weights."""
    weights: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        prefix, _, layer = name.removesuffix(".0.weight").rpartition(".")
        parts = apart(value, BLOCKS[layer]) if layer in BLOCKS else []
        weights |= {f"{prefix}.{layer}.{i}.weight": part for i, part in enumerate(parts)} or {name: value}
    return weights


def trained(model: GPT, method: str) -> tuple[list[float], GPT]:
    optimizer = HybridAdaptiveMuon.from_model(
        model, lr=0.05, weight_decay=0.1, moment2_method=method, extra_scale_factor=0.2, fp32_matmul_prec="highest"
    )
    assert sum(route.algorithm == "adaptive_muon" for *_, route in optimizer.routes) == (
        2 * (len(model.blocks[0].attention.qkv) + len(model.blocks[0].attention.proj) + 2)
    )
    losses = []
    for step in range(12):
        tokens = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(step)).sort().values
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@each_method
def test_a_gpt_with_fused_attention_trains_as_one_with_separate_weights(method: str) -> None:
    """In float64, so that products of the whole and of the parts differ by less than the optimizer's float32."""
    first = GPT(fused=True).double()
    tagged, untagged, separate = copy.deepcopy(first), first, GPT(fused=False).double()
    separate.load_state_dict(separate_weights(first))
    for block in tagged.blocks:
        for layer, blocks in BLOCKS.items():
            getattr(block.attention, layer)[0].weight.muon_blocks = blocks
    (losses, model), (expected, other), (apart_from, whole) = (
        trained(each, method) for each in (tagged, separate, untagged)
    )
    torch.testing.assert_close(losses, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(separate_weights(model), dict(other.state_dict()), atol=1e-6, rtol=0)
    assert expected[-1] < 0.9 * expected[0]
    assert max(abs(a - b) for a, b in zip(apart_from, expected, strict=True)) > 1e-3
    far = [
        (separate_weights(whole)[name] - value).norm() / value.norm()
        for name, value in other.state_dict().items()
        if ".qkv." in name or ".proj." in name
    ]
    assert min(far) > 0.05
