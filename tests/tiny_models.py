# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Hugging Face's classes, and which heads of attention each block of a weight reaches.

The second is the oracle for what is recognized: it changes the rows of one block, and looks which columns of what goes
into the output projection change. It knows nothing of names, attributes and classes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from emerging_optimizers.adaptive_muon import ColumnBlocks, HybridAdaptiveMuon


# Sizes, by the words in the names of a config's fields.
_SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, ("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "top_k")),
    (4, ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")),
    (4, ("encoder_attention_heads", "decoder_attention_heads", "qk_rope_head_dim", "rotary_dim")),
    (8, ("head_dim", "d_kv", "attention_head_size", "v_head_dim", "qk_nope_head_dim", "patch_size")),
    (16, ("q_lora_rank", "kv_lora_rank")),
    (32, ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "hidden_dim", "image_size")),
    (48, ("d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size")),
)
_SIZE_OF = {name: size for size, names in _SIZES for name in names}


def tiny(kind: str, change: Callable[[Any], None] | None = None) -> nn.Module:
    """A model of a type, with weights of such size that no head is negligible; ``change`` edits its config."""
    config = small(CONFIG_MAPPING[kind]())
    config._attn_implementation = config._experts_implementation = "eager"
    if change:
        change(config)
    name = MODEL_MAPPING_NAMES[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name if isinstance(name, str) else name[0])(config).double().eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data = torch.randn_like(p) * 0.3
    return model


def run(model: Any) -> None:
    """Run a model on the first of several inputs that it takes."""
    if not hasattr(model, "config"):
        with torch.no_grad():
            model()
        return
    ids = torch.tensor([[5, 7, 11, 13, 17, 19, 23]])
    text = {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})
    generator = torch.Generator().manual_seed(1)
    image = {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.float64)}
    first = next(model.parameters())
    patches = torch.randn(16, first[:1].numel(), generator=generator, dtype=torch.float64)
    grid = {"grid_thw": torch.tensor([[1, 4, 4]])}
    bins = getattr(model.config, "num_mel_bins", 80)
    frames = 2 * getattr(model.config, "max_source_positions", 20)
    sound = torch.randn(1, bins, frames, generator=generator, dtype=torch.float64)
    candidates: list[Mapping[str, torch.Tensor]] = [
        *({"hidden_states": patches, **grid}, {"pixel_values": patches, **grid}),
        *(text, image, {**text, **image}),
        {"input_features": sound, "decoder_input_ids": ids},
        {"input_features": sound.mT[:, :50]},
        {"input_values": torch.randn(1, 4000, generator=generator, dtype=torch.float64)},
    ]
    errors = []
    for inputs in candidates:
        try:
            with torch.no_grad():
                model(**inputs)
            return
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError) as error:
            errors.append(error)
    raise ExceptionGroup("the model takes none of the inputs", errors)


def parts_of(model: nn.Module, *, split_heads: bool = True) -> dict[nn.Parameter, Any]:
    """The blocks that a switch finds in the weights of a model, by HybridAdaptiveMuon."""
    routes = HybridAdaptiveMuon.from_model(model, split_heads=split_heads).routes
    return {p: route.parts.blocks for _, p, route in routes if route.parts is not None and route.parts.blocks}


def reach(model: nn.Module, *, by_head: bool = True) -> dict[str, dict[str, str]]:
    """For each class of attention, each of its weights and each block: the heads that it reaches, with a * if linearly.

    Two query heads, a key and a value that both use are "0 1 01 01*". What a value is multiplied by does not depend on
    it: the heads that it reaches change in proportion. Queries and keys are in a softmax. Not ``by_head``, blocks are those
    of fused weights without split_heads.
    """
    parts, found = parts_of(model), {}
    merged = {} if by_head else parts_of(model, split_heads=False)
    owners = {p: (module, name) for name, module in model.named_modules() for p in module.parameters(recurse=False)}
    for output, blocks in parts.items():
        if not isinstance(blocks, ColumnBlocks):
            continue
        projection, path = owners[output]
        attention, weights = _around(model, path, parts)
        if not by_head:
            weights = {p: merged[p] for p in weights if p in merged}
        if attention is not None and (kind := type(attention).__name__) not in found:
            of_weights = _reached(model, projection, list(blocks.sizes), weights, owners)
            if of_weights:
                found[kind] = of_weights
    return found


def small(config: Any) -> Any:
    """A config with small sizes, and small ones in it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            small(value)
        elif type(value) is int and not name.endswith("token_id"):
            size = _SIZE_OF.get(name)
            size = 2 if "layers" in name or name in ("n_layer", "depth", "num_blocks") else size
            size = 99 if "vocab_size" in name else 48 if "intermediate" in name else size
            size = 4 if name in ("num_experts", "n_routed_experts", "num_local_experts") else size
            size = 1 if name in ("n_group", "topk_group") else size
            if size is not None:
                setattr(config, name, min(value, size))
        elif type(value) is int and value >= 99:
            setattr(config, name, 1)
    if hasattr(config, "kv_lora_rank"):  # latent attention, whose keys are not grouped
        config.num_key_value_heads, config.head_dim = config.num_attention_heads, config.qk_rope_head_dim
        config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    return config


def _around(
    model: nn.Module, path: str, parts: Mapping[nn.Parameter, Any]
) -> tuple[nn.Module | None, dict[nn.Parameter, tuple[int, ...]]]:
    """The nearest module around an output projection that has weights with row blocks, and these."""
    names = path.split(".")
    for end in range(len(names) - 1, -1, -1):
        module = model.get_submodule(".".join(names[:end]))
        weights = {p: parts[p] for p in module.parameters() if isinstance(parts.get(p), tuple)}
        if weights:
            return module, weights
    return None, {}


def _reached(
    model: nn.Module,
    projection: nn.Module,
    columns: list[int],
    weights: Mapping[nn.Parameter, tuple[int, ...]],
    owners: Mapping[nn.Parameter, tuple[nn.Module, str]],
) -> dict[str, str]:
    """The heads that each block of some weights reaches, of those whose output goes into a projection."""
    seen: list[torch.Tensor] = []
    hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))

    def heads() -> Iterator[torch.Tensor]:
        seen.clear()
        run(model)
        return iter(seen[0].split(columns, -1)) if seen else iter(())

    try:
        before, reached = list(heads()), defaultdict[str, list[str]](list)
        for p, sizes in weights.items() if before else ():
            module, name = owners[p]
            rows = p.data.T if type(module).__name__ == "Conv1D" else p.data
            assert len(rows) % sum(sizes) == 0
            for start, stop in pairwise(accumulate(sizes, initial=0)):
                block = [row for row in range(len(rows)) if start <= row % sum(sizes) < stop]
                kept = rows[block]
                change = 0.3 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
                rows[block] = kept + change
                once = [after - b for after, b in zip(heads(), before, strict=True)]
                rows[block] = kept + 2 * change
                twice = [after - b for after, b in zip(heads(), before, strict=True)]
                rows[block] = kept
                changed = "".join(str(head) for head, change in enumerate(once) if change.abs().max() > 1e-9)
                is_linear = all(
                    torch.allclose(two, 2 * one, rtol=1e-6, atol=1e-9) for one, two in zip(once, twice, strict=True)
                )
                reached[name.rpartition(".")[2]].append(changed + "*" * is_linear)
        return {name: " ".join(blocks) for name, blocks in reached.items()}
    finally:
        hook.remove()
