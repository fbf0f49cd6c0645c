# SPDX-License-Identifier: Apache-2.0
"""Small real GPTModels under every parallelism, and their training."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.training.training import wrap_model_chunks_with_ddp
from torch.nn import functional as F


VOCABULARY, LENGTH, EXPERTS = 64, 32, 4
# Of a configuration with experts.
MOE: dict[str, Any] = dict(
    num_moe_experts=EXPERTS,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    moe_token_dispatcher_type="allgather",
    moe_grouped_gemm=False,
)
# Of a configuration with multi-head latent attention.
LATENT: dict[str, Any] = dict(
    multi_latent_attention=True,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=6,
    num_query_groups=8,
    rope_type="rope",
)
RUNNING = LATENT | dict(v_head_dim=12, kv_channels=12)  # whose forward Megatron's own attention can take

_PRISTINE = dict(vars(parallel_state))
_made: dict[tuple[Any, ...], dict[str, Any]] = {}  # gloo groups cost much, and are made once for each kind


@contextmanager
def parallel(tp: int = 1, **sizes: int) -> Iterator[None]:
    """Megatron's process groups, for tensor parallelism ``tp`` and other sizes as initialize_model_parallel names them."""
    key = (tp, *sorted(sizes.items()))
    if key not in _made:
        parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False, **sizes)
        _made[key] = dict(vars(parallel_state))
    vars(parallel_state).update(_made[key])
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    try:
        yield
    finally:
        vars(parallel_state).update(_PRISTINE)


class NoAttention(torch.nn.Module):
    """In the place of what has no weights, in models that are never run."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class OfOneSize(DotProductAttention):
    """Megatron's own without Transformer Engine, whose keys and values have one size; which latent attention tells it."""

    def __init__(self, *arguments: Any, k_channels: int = 0, v_channels: int = 0, **options: Any) -> None:
        super().__init__(*arguments, **options)


def gpt(
    *, bf16: bool = False, layer_wise: str = "", positions: str = "rope", **overrides: Any
) -> DistributedDataParallel:
    """Two layers with grouped queries, SwiGLU, RMSNorm and a fused QKV weight; the same weights however it is sharded.

    ``layer_wise`` wraps it for the layer-wise distributed optimizer, with its "layout" of parameters or the "legacy" way.
    """
    torch.manual_seed(1)
    tp = parallel_state.get_tensor_model_parallel_world_size()
    options = dict(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=2,  # fewer than four tensor-parallel ranks: these cut within a group
        kv_channels=8,
        ffn_hidden_size=96,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        sequence_parallel=tp > 1 and "num_moe_experts" in overrides,  # which Megatron requires
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    latent = "kv_lora_rank" in overrides
    config = (MLATransformerConfig if latent else TransformerConfig)(**{**options, **overrides})
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm",
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        multi_latent_attention=latent,
    )
    if latent:
        sizes = {config.v_head_dim, config.qk_head_dim + config.qk_pos_emb_head_dim}
        attention = OfOneSize if sizes == {config.kv_channels} else NoAttention
        spec.submodules.self_attention.submodules.core_attention = attention
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type=positions,
        share_embeddings_and_output_weights=False,
    )
    for name, p in model.named_parameters():
        if p.ndim == 2:  # Megatron draws experts by their place on the rank
            p.data.copy_(seeded(name, p, 0.02))
    [wrapped] = wrap_model_chunks_with_ddp(
        [model.to(config.params_dtype)],
        config,
        DistributedDataParallelConfig(),
        use_layer_wise_distributed_optimizer=bool(layer_wise),
        use_layer_wise_param_layout=layer_wise == "layout",
    )
    return wrapped


def whole_name(name: str) -> str:
    """A parameter's name in the model without expert parallelism, in which it has the same weights."""
    local = re.search(r"local_experts\.(\d+)", name)
    if local is None:
        return name
    experts_here = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    index = int(local[1]) + experts_here * parallel_state.get_expert_model_parallel_rank()
    return name.replace(local[0], f"local_experts.{index}")


def cut(whole: torch.Tensor, name: str, p: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a tensor that is whole, for the parameter of that name."""
    of_experts = "local_experts" in name
    group = (
        parallel_state.get_expert_tensor_parallel_group
        if of_experts
        else parallel_state.get_tensor_model_parallel_group
    )
    rank, size = group().rank(), group().size()
    dim, stride = getattr(p, "partition_dim", -1), getattr(p, "partition_stride", 1)
    if dim == -1:
        return whole
    return torch.cat([part.chunk(size, dim)[rank] for part in whole.chunk(stride, dim)], dim)


def seeded(name: str, p: torch.Tensor, scale: float, seed: int = 0) -> torch.Tensor:
    """This rank's piece of random numbers that are the same under every parallelism."""
    size = (
        parallel_state.get_expert_tensor_parallel_world_size()
        if "local_experts" in name
        else parallel_state.get_tensor_model_parallel_world_size()
    )
    dim = getattr(p, "partition_dim", -1)
    shape = [n * size if d == dim else n for d, n in enumerate(p.shape)]
    generator = torch.Generator().manual_seed(crc32(f"{whole_name(name)} {seed}".encode()))
    return cut(torch.randn(shape, generator=generator) * scale, name, p)


def optimizer_of(model: DistributedDataParallel, method: str = "namo_d", **config: Any) -> Any:
    """Megatron's optimizer for a model, with exact products unless told otherwise."""
    options = dict(
        optimizer="adaptive_muon",
        lr=5e-4 if method == "adamuon" else 1e-2,
        bf16=model.config.bf16,
        clip_grad=1.0,
        muon_fp32_matmul_prec="highest",
        muon_tp_mode="layer_sharded",
        adaptive_muon_moment2_method=method,
    )
    return get_megatron_optimizer(OptimizerConfig(**{**options, **config}), [model], config_overrides={})


def train(model: DistributedDataParallel, optimizer: Any, steps: range) -> list[float]:
    """Trains on the same text at every step of the same number, and returns the losses."""
    losses = []
    for step in steps:
        tokens = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(step % 3))
        model.zero_grad_buffer()
        optimizer.zero_grad()
        positions = torch.arange(LENGTH).expand(4, LENGTH)
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean()
        loss.backward()
        model.finish_grad_sync()
        updated, _, _ = optimizer.step()
        assert updated
        losses.append(loss.item())
    return losses
