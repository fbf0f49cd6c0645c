# SPDX-License-Identifier: Apache-2.0
"""Training goes on from Megatron's checkpoints as if it had not stopped, also at another tensor-parallel size."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from models import RUNNING, gpt, optimizer_of, parallel, train
from side_by_side import each_method
from torch import distributed as dist

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.integrations.megatron import register


@pytest.fixture(autouse=True)
def registered() -> None:
    register(bias_correction=True)  # which needs the number of steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that all processes share."""
    paths = [tmp_path]
    dist.broadcast_object_list(paths)
    return paths[0]


def sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "dp_reshardable",  # of the AdamW part, in the layer-wise layout
    }
    of_model = model.module.sharded_state_dict(metadata=metadata)
    return {
        "model": of_model,
        "optimizer": optimizer.sharded_state_dict(of_model, is_loading=is_loading, metadata=metadata),
    }


def load(model: Any, optimizer: Any, folder: Path) -> None:
    state = dist_checkpointing.load(sharded_state(model, optimizer, is_loading=True), str(folder))
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def muon_state(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    """A copy of the state of the matrices, in the optimizer's own form."""
    if hasattr(optimizer, "chained_optimizers"):
        return sum(map(muon_state, optimizer.chained_optimizers), [])
    inner = optimizer.optimizer
    params = [p for group in inner.param_groups for p in group["params"]] if isinstance(inner, AdaptiveMuon) else []
    return [{key: value.clone() for key, value in inner.state[p].items()} for p in params]


def trained_and_saved(
    method: str, bf16: bool, folder: Path, **options: Any
) -> tuple[Any, Any, list[dict[str, torch.Tensor]]]:
    """A model and its optimizer after three steps, which are saved, and the matrices' state."""
    model = gpt(bf16=bf16, **options)
    optimizer = optimizer_of(model, method)
    train(model, optimizer, range(3))
    dist_checkpointing.save(sharded_state(model, optimizer, is_loading=False), str(folder))
    return model, optimizer, muon_state(optimizer)


@each_method
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_torch_dist(method: str, bf16: bool, folder: Path) -> None:
    with parallel(2):
        model, optimizer, saved = trained_and_saved(method, bf16, folder)
        expected = train(model, optimizer, range(3, 8))
    for tp in 2, 1, 4:
        with parallel(tp):
            model = gpt(bf16=bf16)
            optimizer = optimizer_of(model, method)
            load(model, optimizer, folder)
            assert all(state["step"] == 3 for state in muon_state(optimizer))
            if tp == 2:
                torch.testing.assert_close(muon_state(optimizer), saved, atol=0, rtol=0)
                assert train(model, optimizer, range(3, 8)) == expected
            else:  # the model's own bfloat16 products round differently in other pieces
                rel = 1e-2 if bf16 else 1e-5
                assert train(model, optimizer, range(3, 8)) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("method", ["normuon", "namo_d"])
@pytest.mark.parametrize("options", [{}, RUNNING], ids=["grouped queries", "latent attention"])
def test_heads_and_gates_that_are_split(options: dict[str, Any], method: str, folder: Path) -> None:
    """V is of every head, and of the gate and the up projection of each rank; what is saved is the whole weight's."""
    register(bias_correction=True, split_heads=True, split_gate_up=True)
    with parallel(2):
        model, optimizer, saved = trained_and_saved(method, False, folder, **options)
        expected = train(model, optimizer, range(3, 8))
    for tp in 2, 1:
        with parallel(tp):
            model = gpt(**options)
            optimizer = optimizer_of(model, method)
            load(model, optimizer, folder)
            if tp == 2:
                torch.testing.assert_close(muon_state(optimizer), saved, atol=0, rtol=0)
            losses = train(model, optimizer, range(3, 8))
            assert losses == (expected if tp == 2 else pytest.approx(expected, rel=5e-4 if options else 1e-5))


@pytest.mark.parametrize(("method", "bf16"), [("namo", True), ("adamuon", False)])
def test_a_momentum_in_bfloat16(method: str, bf16: bool, folder: Path) -> None:
    """Saved and loaded without a change, at any tensor-parallel size; then every step rounds as it would have."""
    register(momentum_dtype="bfloat16", stochastic_rounding=True)
    with parallel(2):
        model, optimizer, saved = trained_and_saved(method, bf16, folder)
        assert all(state["momentum_buffer"].dtype == torch.bfloat16 for state in saved)
        expected = train(model, optimizer, range(3, 6))
        after = muon_state(optimizer)
    for tp in 2, 1, 4:
        with parallel(tp):
            model = gpt(bf16=bf16)
            optimizer = optimizer_of(model, method)
            load(model, optimizer, folder)
            loaded = muon_state(optimizer)
            assert all(state["step"] == 3 for state in loaded)
            assert all(state["momentum_buffer"].dtype == torch.bfloat16 for state in loaded)
            if tp == 2:
                torch.testing.assert_close(loaded, saved, atol=0, rtol=0)
            losses = train(model, optimizer, range(3, 6))
            assert losses == (expected if tp == 2 else pytest.approx(expected, rel=1e-2 if bf16 else 1e-4))
            if tp == 2:
                torch.testing.assert_close(muon_state(optimizer), after, atol=0, rtol=0)


@pytest.mark.parametrize(("saved_in", "loaded_in"), [(None, "bfloat16"), ("bfloat16", None)])
def test_a_momentum_of_another_dtype(saved_in: str | None, loaded_in: str | None, folder: Path) -> None:
    """A float32 momentum is loaded into bfloat16, rounded to nearest, and back without a change; V and the count stay."""
    with parallel(2):
        register(bias_correction=True, momentum_dtype=saved_in)
        _, _, saved = trained_and_saved("adamuon", False, folder)
        register(bias_correction=True, momentum_dtype=loaded_in)
        model = gpt(bf16=False)
        optimizer = optimizer_of(model, "adamuon")
        load(model, optimizer, folder)
        dtype = torch.bfloat16 if loaded_in else torch.float32
        expected = [{**state, "momentum_buffer": state["momentum_buffer"].to(dtype)} for state in saved]
        torch.testing.assert_close(muon_state(optimizer), expected, atol=0, rtol=0)
        assert all(map(math.isfinite, train(model, optimizer, range(3, 5))))


@each_method
def test_torch_format(method: str, tmp_path: Path) -> None:
    with parallel(2):
        model = gpt(bf16=True)
        optimizer = optimizer_of(model, method)
        train(model, optimizer, range(3))
        torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
        expected = train(model, optimizer, range(3, 8))

        model = gpt(bf16=True)
        optimizer = optimizer_of(model, method)
        state = torch.load(tmp_path / "saved.pt", weights_only=False)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        assert train(model, optimizer, range(3, 8)) == expected


@each_method
@pytest.mark.parametrize("kind", ["legacy", "layout"])
def test_layer_wise_distributed_optimizer(method: str, kind: str, folder: Path) -> None:
    with parallel(2):
        model, resumed = gpt(bf16=True, layer_wise=kind), gpt(bf16=True, layer_wise=kind)
        optimizer = optimizer_of(model, method, use_layer_wise_distributed_optimizer=True)
        train(model, optimizer, range(3))
        dist_checkpointing.save(sharded_state(model, optimizer, is_loading=False), str(folder))
        saved, expected = muon_state(optimizer), train(model, optimizer, range(3, 8))

        optimizer = optimizer_of(resumed, method, use_layer_wise_distributed_optimizer=True)
        if kind == "layout":  # without Apex, Megatron's distributed AdamW cannot be loaded before its first step
            train(resumed, optimizer, range(7, 8))
        load(resumed, optimizer, folder)
        torch.testing.assert_close(muon_state(optimizer), saved, atol=0, rtol=0)
        losses = train(resumed, optimizer, range(3, 8))
        if kind == "layout":  # nor does it restore AdamW's step, so only the first loss can be the same
            losses, expected = losses[:1], expected[:1]
        assert losses == expected


def test_another_method_is_refused(folder: Path) -> None:
    with parallel(2):
        model = gpt()
        optimizer = optimizer_of(model, "namo")
        train(model, optimizer, range(1))
        dist_checkpointing.save(sharded_state(model, optimizer, is_loading=False), str(folder))
        other = optimizer_of(model, "namo_d")
        with pytest.raises(ValueError, match="moment2_method of the checkpoint must be \"namo_d\".* got 'namo'"):
            load(model, other, folder)
