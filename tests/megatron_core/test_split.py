# SPDX-License-Identifier: Apache-2.0
"""Heads, latent attention and gated MLPs of real GPTModels: the same as separate weights, under every parallelism."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.optimizer import emerging_optimizers
from models import LATENT, RUNNING, cut, gpt, optimizer_of, parallel, seeded, train
from torch import nn

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.integrations.megatron import register


TABLE = emerging_optimizers._EMERGING_OPTIMIZERS
STOCK = TABLE["adaptive_muon"]
SIZE, GROUPS, PER_GROUP = 8, 2, 4  # of models.gpt


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    yield
    TABLE["adaptive_muon"] = STOCK


def parts_of(name: str, whole: torch.Tensor, *, heads: bool, gate_up: bool) -> list[torch.Tensor]:
    """The matrices of a whole weight, by another road than the package's: views of it by the model's own sizes."""
    if gate_up and "linear_fc1" in name:
        return [*whole.chunk(2)]
    if "linear_qkv" in name:
        groups = whole.view(GROUPS, PER_GROUP + 2, SIZE, -1)
        if heads:
            return [*groups.flatten(0, 1)]
        return [groups[:, :PER_GROUP].flatten(0, 2), groups[:, PER_GROUP].flatten(0, 1), groups[:, -1].flatten(0, 1)]
    if heads and "linear_q_up_proj" in name:
        return [*whole.view(8, 12, -1)]
    if heads and "linear_kv_down_proj" in name:
        return [whole[:16], whole[16:]]
    if heads and "linear_kv_up_proj" in name:
        return [part for head in whole.view(8, -1, whole.size(-1)) for part in (head[:8], head[8:])]
    if heads and "linear_proj" in name:
        return [*whole.view(whole.size(0), 8, -1).transpose(0, 1)]
    return [whole]


def trained_apart(options: dict[str, Any], heads: bool, gate_up: bool) -> dict[str, torch.Tensor]:
    """The weights of a whole model after three steps of AdaptiveMuon on separate weights."""
    model = gpt(**options)
    weights = {name: p.detach() for name, p in model.module.named_parameters() if p.ndim == 2 and "layers" in name}
    places = {  # of the elements of each part in its weight
        name: parts_of(name, torch.arange(w.numel()).view(w.shape), heads=heads, gate_up=gate_up)
        for name, w in weights.items()
    }
    params = {name: [nn.Parameter(w.flatten()[part].clone()) for part in places[name]] for name, w in weights.items()}
    optimizer = AdaptiveMuon(
        [p for each in params.values() for p in each],
        lr=1e-2,
        moment2_method="namo_d",
        weight_decay=0.0,
        nesterov=False,
        fp32_matmul_prec="highest",
    )
    for step in range(3):
        for name, p in model.module.named_parameters():
            if name in params:
                grad = seeded(name, p, 0.1, step).bfloat16().float().flatten()
                for part, place in zip(params[name], places[name], strict=True):
                    part.grad = grad[place]
        optimizer.step()
    for name, w in weights.items():
        for part, place in zip(params[name], places[name], strict=True):
            w.view(-1)[place] = part.detach()
    return weights


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, LATENT], ids=["grouped queries", "latent attention"])
@pytest.mark.parametrize("heads, gate_up", [(True, False), (False, True), (True, True), (False, False)])
def test_the_same_as_separate_weights(options: dict[str, Any], heads: bool, gate_up: bool, bf16: bool) -> None:
    """With two and four tensor-parallel ranks, of which four cut within the two query groups."""
    register(split_heads=heads, split_gate_up=gate_up)
    with parallel(1):
        start = {name: p.detach().clone() for name, p in gpt(**options).module.named_parameters()}
        expected = trained_apart(options, heads, gate_up)
    for tp in 1, 2, 4:
        with parallel(tp):
            model = gpt(bf16=bf16, **options)
            optimizer = optimizer_of(model, "namo_d", weight_decay=0.0, clip_grad=0.0, muon_nesterov=False)
            if bf16:
                for name, p in model.module.named_parameters():
                    p.main_param.copy_(cut(start[name], name, p))
            for step in range(3):
                for name, p in model.module.named_parameters():
                    p.main_grad.copy_(seeded(name, p, 0.1, step).bfloat16())  # as it is with bf16
                optimizer.step()
            for name, p in model.module.named_parameters():
                if name in expected:
                    mine, whole = getattr(p, "main_param", p).detach(), cut(expected[name], name, p)
                    moved = (whole - cut(start[name], name, p)).norm()
                    assert (mine - whole).norm() <= 1e-5 * moved, (tp, name)


def latent_parts(name: str, w: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a weight of latent attention."""
    return parts_of(name, w, heads=True, gate_up=False)


@pytest.mark.parametrize("method", ["namo_d", "normuon"])
def test_latent_attention_runs_as_with_separate_weights(method: str) -> None:
    """Forward, backward and step of the model, and steps of its matrices by themselves on the same gradients."""
    register(split_heads=True)
    rules = dict(moment2_method=method, lr=1e-2, weight_decay=0.0, nesterov=False, fp32_matmul_prec="highest")
    for tp in 1, 2:
        with parallel(tp):
            model = gpt(**RUNNING)
            optimizer = optimizer_of(model, method, weight_decay=0.0, clip_grad=0.0, muon_nesterov=False)
            seen: list[dict[str, torch.Tensor]] = []

            def note(*_: Any, model: Any = model, seen: list[dict[str, torch.Tensor]] = seen) -> None:
                seen.append({n: p.main_grad.clone() for n, p in model.module.named_parameters() if p.ndim == 2})

            start = {name: p.detach().clone() for name, p in model.module.named_parameters()}
            finish = model.finish_grad_sync

            def finished(*arguments: Any, finish: Any = finish, note: Any = note, **options: Any) -> Any:
                result = finish(*arguments, **options)
                note()
                return result

            model.finish_grad_sync = finished
            losses = train(model, optimizer, range(3))
            ends = {name: p.detach().clone() for name, p in model.module.named_parameters()}
            if tp == 1:
                whole_losses = losses
                check_apart(start, ends, seen, rules)
    assert losses == pytest.approx(whole_losses, rel=1e-5)


def check_apart(
    start: dict[str, torch.Tensor],
    ends: dict[str, torch.Tensor],
    gradients: list[dict[str, torch.Tensor]],
    rules: dict[str, Any],
) -> None:
    """Checks whole weights that were trained with some gradients against their matrices by themselves."""
    names = [name for name in gradients[0] if "layers" in name]
    assert len(gradients) == 3
    assert any(len(latent_parts(name, start[name])) > 1 for name in names)
    params = {name: [nn.Parameter(part.clone()) for part in latent_parts(name, start[name])] for name in names}
    separate = AdaptiveMuon([part for each in params.values() for part in each], **rules)
    for of_step in gradients:
        for name, parts in params.items():
            for part, grad in zip(parts, latent_parts(name, of_step[name]), strict=True):
                part.grad = grad.clone()
        separate.step()
    for name, parts in params.items():
        for part, mine in zip(parts, latent_parts(name, ends[name]), strict=True):
            assert (mine - part).norm() <= 1e-6 * part.norm(), name
        assert not torch.equal(ends[name], start[name])
