# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored (in, out), such as Hugging Face's Conv1D: each is worked on as its transpose."""

import copy
from typing import Any

import pytest
import torch
from side_by_side import each_dtype, each_method, normal, noting, saved, smooth
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, HybridAdaptiveMuon


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "corrected": {"bias_correction": True, "nesterov": True, "scale_mode": "unit_rms_norm"},
    "palm": {"weight_decay_method": "palm", "scale_mode": "shape_scaling", "fp32_matmul_prec": "highest"},
    "cautious": {"weight_decay_method": "cautious", "fp32_matmul_prec": "highest"},
    "standard": {"ns_algorithm": "standard", "fp32_matmul_prec": "highest"},
}
# Shape as it is stored, and blocks of the transpose.
STORED: list[tuple[tuple[int, ...], Any]] = [
    ((24, 40), None),
    ((40, 24), None),
    ((40, 24), None),
    ((24, 72), (24, 24, 24)),
    ((24, 60), (8, 4, 3)),
    ((3, 16, 24), None),
    ((3, 16, 24), (16, 8)),
    ((60, 24), ColumnBlocks((8, 4, 3))),
    ((3, 24, 16), ColumnBlocks((8, 8, 8))),
]


def pair(stored: tuple[int, ...], blocks: Any, dtype: torch.dtype, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A parameter stored (in, out), and its twin stored (out, in)."""
    p = nn.Parameter(normal(stored, seed).to(dtype))
    q = nn.Parameter(p.detach().mT.contiguous())
    for each in (p, q):
        each.muon_blocks, each.muon_stacked = blocks, p.ndim == 3
    p.muon_transposed = True
    return p, q


@each_dtype
@each_method
@pytest.mark.parametrize("options", OPTIONS)
def test_equal_to_its_transpose(method: str, options: str, dtype: torch.dtype) -> None:
    """Weights and state; strides differ and so may the last bit."""
    hyper = {"lr": 0.05, "weight_decay": 0.1, "moment2_method": method, **smooth(method), **OPTIONS[options]}
    pairs = [pair(*each, dtype, i) for i, each in enumerate(STORED)]
    one, other = AdaptiveMuon([p for p, _ in pairs], **hyper), AdaptiveMuon([q for _, q in pairs], **hyper)
    for step in range(3):
        for i, (p, q) in enumerate(pairs):
            p.grad = normal(p.shape, 10 * step + i + 1).to(dtype)
            q.grad = p.grad.mT.contiguous()
        one.step()
        other.step()
    within = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    within = {key: 10 * value for key, value in within.items()} if method == "adamuon" else within
    for p, q in pairs:
        assert p.dtype == dtype
        torch.testing.assert_close(p.detach().mT, q.detach(), **within)
        for key, value in one.state[p].items():
            of_twin = other.state[q][key]
            torch.testing.assert_close(value.mT if value.ndim == p.ndim else value, of_twin, **within)
        assert one.state[p]["momentum_buffer"].shape == p.shape


@each_method
def test_not_what_it_is_without_the_tag(method: str) -> None:
    """For a rectangular matrix: factors for the shape and columns are others."""
    p, q = nn.Parameter(normal((24, 40))), nn.Parameter(normal((24, 40)))
    p.muon_transposed = True
    for each in (p, q):
        each.grad = normal((24, 40), 1) * torch.linspace(0.1, 3, 40)
        AdaptiveMuon([each], lr=0.1, moment2_method=method, scale_mode="unit_rms_norm").step()
    assert (p - q).norm() > 0.01 * (q - normal((24, 40))).norm()


@each_method
def test_hooks_and_own_functions_get_the_matrix_and_the_update_as_they_are(method: str) -> None:
    """The one orthogonalizes (out, in); the other sees the parameter, and an update that lies as it does."""
    seen: list[tuple[int, ...]] = []
    p, q = pair((24, 40), None, torch.float32, 0)
    for each in (p, q):
        each.grad = torch.ones_like(each)
        noting(seen, 0.5)([each], moment2_method=method).step()
    assert seen == [(40, 24), (24, 40), (40, 24), (40, 24)]
    torch.testing.assert_close(p.detach().mT, q.detach(), atol=1e-5, rtol=1e-5)


@each_method
def test_resumes_and_copies(method: str) -> None:
    p, _ = pair((24, 60), (8, 4, 3), torch.float32, 0)
    optimizer = AdaptiveMuon([p], moment2_method=method, bias_correction=True)

    def walk(which: AdaptiveMuon, step: int) -> None:
        [each] = which.param_groups[0]["params"]
        each.grad = normal((24, 60), step)
        which.step()

    walk(optimizer, 1)
    copied = copy.deepcopy(optimizer)
    r = nn.Parameter(p.detach().clone())
    r.muon_blocks, r.muon_transposed = p.muon_blocks, True
    resumed = AdaptiveMuon([r], moment2_method=method, bias_correction=True)
    resumed.load_state_dict(saved(optimizer))
    for each in (optimizer, copied, resumed):
        walk(each, 2)
    for each in (copied, resumed):
        [q] = each.param_groups[0]["params"]
        assert torch.equal(p, q)
        torch.testing.assert_close(dict(each.state[q]), dict(optimizer.state[p]), atol=0, rtol=0)


@each_method
def test_gpt2_of_hugging_face_trains_as_the_same_model_of_linears(method: str) -> None:
    """Whose Conv1D's are replaced by torch's Linear, with transposed weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = transformers.GPT2LMHeadModel(config).double().train()
    twin = copy.deepcopy(model)
    for name, module in [*twin.named_modules()]:
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape, dtype=torch.float64)
            linear.weight.data, linear.bias.data = module.weight.data.mT.contiguous(), module.bias.data.clone()
            twin.set_submodule(name, linear)
    options = {
        "lr": 0.02,
        "moment2_method": method,
        "scalar_lr": 1e-3,
        "fp32_matmul_prec": "highest",
        **smooth(method),
    }
    losses = []
    for each in (model, twin):
        optimizer = HybridAdaptiveMuon.from_model(each, **options)
        assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == 2 * 12 * 16**2
        losses.append([])
        tokens = torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(0))
        for _ in range(5):
            loss = each(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-4 if method == "adamuon" else 1e-6)


class Conv1D(nn.Module):
    """As Hugging Face's."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx, self.weight = nf, nx, nn.Parameter(normal((nx, nf)))


@each_method
def test_loads_after_its_parameters_were_replaced(method: str) -> None:
    """As a wrapper does after the optimizer was made: what is new in the groups has the tag before it is looked for."""
    model = nn.Sequential(Conv1D(6, 12), nn.Linear(4, 6))
    optimizer = HybridAdaptiveMuon.from_model(model, moment2_method=method)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    state = saved(optimizer)
    for group in optimizer.param_groups:
        for index, p in enumerate(group["params"]):
            group["params"][index] = nn.Parameter(p.detach().clone())
    optimizer.state.clear()
    optimizer.load_state_dict(state)
    new = [p for group in optimizer.param_groups for p in group["params"]]
    assert [bool(getattr(p, "muon_transposed", False)) for p in new] == [True, False, False]
    for p in new:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (6, 6)], ids=str)
def test_a_tag_set_after_a_step_is_refused_and_changes_nothing(shape: tuple[int, int]) -> None:
    """Of namo_d, whose V would be of other columns; the others' V fits either way."""
    p = nn.Parameter(normal(shape))
    optimizer = AdaptiveMuon([("w", p)], moment2_method="namo_d")
    p.grad = normal(shape, 1)
    optimizer.step()
    weights, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    p.muon_transposed = True
    with pytest.raises(
        ValueError, match=r"state of parameter 'w' must have the shapes .*. Set muon_transposed before"
    ):
        optimizer.step()
    assert torch.equal(p, weights)
    torch.testing.assert_close(dict(optimizer.state[p]), dict(state), atol=0, rtol=0)
    del p.muon_transposed
    optimizer.step()
