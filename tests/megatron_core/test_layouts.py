# SPDX-License-Identifier: Apache-2.0
"""Which matrices Megatron's parameters hold, where its layers cannot say so on a CPU: generalized tensor parallelism."""

from inspect import signature
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.process_groups_config import ProcessGroupCollection
from models import parallel
from side_by_side import each_method, normal

from emerging_optimizers.adaptive_muon import AdaptiveMuon
from emerging_optimizers.adaptive_muon.integrations.megatron import TensorParallelAdaptiveMuon


SHAPES = (20, 12), (10, 24), (6, 8), (24, 16)  # of whole matrices; the last is a fused attention weight
QKV = [8, 2, 2]
has_gtp = pytest.mark.skipif(
    "gtp_remat_size" not in signature(parallel_state.initialize_model_parallel).parameters,
    reason="this Megatron has no generalized tensor parallelism",
)
OPTIONS = dict(lr=1e-2, weight_decay=0.1, fp32_matmul_prec="highest", nesterov=True)


def held(whole: torch.Tensor, dim: int, tp: Any, gtp: Any) -> tuple[torch.Tensor, int]:
    """What a rank holds of a matrix, and how much padding all ranks of its GTP group hold together."""
    strip = whole if dim == -1 else whole.chunk(tp.size(), dim)[tp.rank()]
    padding = -strip.size(0) % (2 * gtp.size())
    padded = torch.nn.functional.pad(strip, (0, 0, 0, padding))
    return padded.chunk(gtp.size())[gtp.rank()], padding


@has_gtp
@each_method
@pytest.mark.parametrize("mode", ["layer_sharded", "duplicated"])
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("tp, gtp", [(1, 4), (2, 2)])
@pytest.mark.parametrize("of_experts", [False, True], ids=["dense", "experts"])
def test_gtp(method: str, mode: str, dim: int, tp: int, gtp: int, of_experts: bool) -> None:
    check_gtp(method, mode, dim, tp, gtp, of_experts)


@has_gtp
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("keep", [False, True], ids=["lost", "kept"])
def test_gtp_whether_or_not_main_parameters_keep_their_padding(keep: bool, dim: int) -> None:
    """Megatron 0.19 loses ``pad_length``, and 0.20 copies it; every version is made to do both."""
    check_gtp("namo_d", "layer_sharded", dim, 2, 2, of_experts=False, keep=keep)


def check_gtp(method: str, mode: str, dim: int, tp: int, gtp: int, of_experts: bool, keep: bool | None = None) -> None:
    """Three steps, and a state that is loaded, give what whole matrices give. ``keep`` None is as Megatron does."""
    sizes = (
        {"expert_tensor_parallel_size": tp, "expert_gtp_remat_size": gtp}
        if of_experts
        else {"tp": tp, "gtp_remat_size": gtp}
    )
    with parallel(**sizes):
        groups = ProcessGroupCollection.use_mpu_process_groups()
    tp_group, gtp_group = (groups.expt_tp, groups.expt_gtp_remat) if of_experts else (groups.tp, groups.gtp_remat)
    assert (tp_group.size(), gtp_group.size()) == (tp, gtp)

    wholes = [torch.nn.Parameter(normal(shape, i).bfloat16().float()) for i, shape in enumerate(SHAPES)]
    wholes[-1].muon_blocks = QKV
    whole_optimizer = AdaptiveMuon(wholes, moment2_method=method, **OPTIONS)

    params = []
    for index, whole in enumerate(wholes):
        piece, padding = held(whole.detach(), dim, tp_group, gtp_group)
        p = torch.nn.Parameter(piece.bfloat16())
        p.partition_dim, p.expert_tp, p.is_gtp_weight_remat, p.pad_length = dim, of_experts, True, padding
        if index == len(wholes) - 1:
            p.is_qkv, p.qkv_split_shapes = True, QKV
        params.append(p)

    def wrapped() -> Float16OptimizerWithFloat16Params:
        optimizer = TensorParallelAdaptiveMuon(
            [*params], pg_collection=groups, tp_mode=mode, split_qkv=True, moment2_method=method, **OPTIONS
        )
        config = OptimizerConfig(bf16=True, clip_grad=0.0)
        made = Float16OptimizerWithFloat16Params(optimizer, config, None, lambda *_: None)
        for p in params if keep is not None else ():
            vars(p.main_param).pop("pad_length", None)
            if keep:
                p.main_param.pad_length = p.pad_length
        return made

    megatrons = wrapped()
    mains = [p.main_param for p in params]
    for step in range(3):
        for index, (whole, p) in enumerate(zip(wholes, params, strict=True)):
            whole.grad = normal(whole.shape, 10 * step + index)
            p.main_grad = held(whole.grad, dim, tp_group, gtp_group)[0].clone()
        whole_optimizer.step()
        megatrons.step()
    for whole, main in zip(wholes, mains, strict=True):
        expected = held(whole.detach(), dim, tp_group, gtp_group)[0]
        assert (main - expected).norm() <= 2e-6 * whole.norm()
        assert not main[expected.abs().sum(dim=1) == 0].any()  # padding

    saved = megatrons.optimizer.state_dict()
    assert all(
        state["moment2_buffer"].shape == p.shape for state, p in zip(saved["state"].values(), mains, strict=True)
    )
    resumed = wrapped()
    resumed.optimizer.load_state_dict(saved)
    for p, main in zip(params, mains, strict=True):
        torch.testing.assert_close(
            resumed.optimizer.state[p.main_param], megatrons.optimizer.state[main], atol=0, rtol=0
        )


@has_gtp
def test_blockwise_keeps_what_gtp_cuts_together() -> None:
    with parallel(2, gtp_remat_size=2):
        groups = ProcessGroupCollection.use_mpu_process_groups()
    whole = torch.nn.Parameter(normal((20, 12)))
    whole.grad = normal((20, 12), 1)
    strip = torch.nn.Parameter(whole.detach().chunk(2)[groups.tp.rank()].clone())
    strip.grad = whole.grad.chunk(2)[groups.tp.rank()].clone()
    piece, padding = held(whole.detach(), 0, groups.tp, groups.gtp_remat)
    p = torch.nn.Parameter(piece.clone())
    p.grad = held(whole.grad, 0, groups.tp, groups.gtp_remat)[0].clone()
    p.partition_dim, p.is_gtp_weight_remat, p.pad_length = 0, True, padding
    AdaptiveMuon([strip], moment2_method="namo", **OPTIONS).step()
    TensorParallelAdaptiveMuon([p], pg_collection=groups, tp_mode="blockwise", moment2_method="namo", **OPTIONS).step()
    expected = held(strip.detach(), -1, groups.tp, groups.gtp_remat)[0]
    torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=0)


def test_a_piece_without_a_group_is_refused() -> None:
    """But for blockwise, which needs nobody else."""
    p = torch.nn.Parameter(torch.ones(4, 8))
    p.partition_dim = 0
    with pytest.raises(ValueError, match="must have a tp_group"):
        TensorParallelAdaptiveMuon([p])
    TensorParallelAdaptiveMuon([p], tp_mode="blockwise")
