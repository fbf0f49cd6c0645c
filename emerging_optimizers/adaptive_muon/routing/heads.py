# SPDX-License-Identifier: Apache-2.0
"""Which modules are a model's output heads."""

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

import torch
from torch import nn

from emerging_optimizers.adaptive_muon.routing.linear_maps import LinearMap


__all__ = ["find_heads", "head_by_name", "is_embedding", "networks_in", "table_by_name"]

# Names of output heads that no word below shows.
_NAMES = {"qa_outputs", "output_layer", "output_projection", "embed_out", "unembed", "lm_loss"}
# A word that means what a model puts out, wherever it stands in a name (class_labels_classifier, bbox_embed).
_OUTPUT_WORDS = {
    *("class", "classes", "cls", "classif", "classifier", "classifiers", "classification"),
    *("label", "labels", "logit", "logits", "bbox", "predictor", "predictors", "prediction", "predictions"),
}
# Of these a layer of inputs may be made too, and then its last word says so (label_proj, bbox_encoder).
_INPUTS = {"class", "cls", "label", "bbox"}
_INPUT_LAYERS = {"proj", "projection", "projector", "encoder", "cond", "conditioning", "conditioner", "coefs"}
# A last word that means an output head outside of repeated blocks. In them it is an attention head or its score.
_LAST_WORDS = {"head", "heads", "score", "scores", "scorer"}
# A last word that decides, whatever the other words of the name (token_classifier, pos_head).
_DECISIVE = {"classifier", "classifiers", "predictor", "logits"}
# A word that means a hidden layer, whatever the other words of the name (multi_head, class_embedding).
_HIDDEN_WORDS = {"multi", "embedding", "embeddings", "embedder", "emb", "token", "tokens", "query", "pos"}
# A word that means a hidden layer in a head's own name and in the one around it (self_attn.score, sa_head.key).
_ATTENTION = {"attn", "attns", "mha", "mhsa", "sa", "multihead"}
# What chooses among experts is no head, whatever its layers are called (router.classifier).
_ROUTERS = {"router", "gate"}
# Tables that are as long as a text, or as the number of its parts, and not as a vocabulary.
_POSITIONS = {"pos", "position", "positions", "positional", "wpe", "type", "segment"}
# How deep in a head its linear maps may lie, indices not counted: head.mlp.0 and predictions.transform.dense. What is
# deeper belongs to a network of its own, such as V-JEPA's predictor.layer.3.attention.query.
_DEPTH = 2
# A last linear map so called is the head, if it is no deeper than that: ResNet's fc, timm_model.fc.
_LAST_NAMES = {"fc", "proj_out", "out_proj", "output_proj", "last_linear", "last_layer", "vocab_proj", "to_vocab"}
_LAST_MAPS = {"out", "output", "outputs", "readout", "generator", "predict"}
_TOP = 2
_HIDDEN_NETWORKS = {"mlp", "ffn", "ff", "feed", "forward", "block", "conv", "projector"}


def head_by_name(
    path: Sequence[str], *, in_blocks: bool = False, networks: Collection[tuple[str, ...]] = ()
) -> str | None:
    """Return the component of a module's dotted name that shows it to be an output head, or None.

    Args:
        path: Components of the name of the module that has a parameter, without those of wrappers.
        in_blocks: Whether a last word such as "head" counts in repeated blocks (``layers.3.head``) too.
        networks: Paths of modules that are no heads, see :func:`networks_in`.
    """
    if _ROUTERS.intersection(path):
        return None
    words = [_words(part) for part in path]
    for index, part in enumerate(path):
        inner = path[index + 1 :]
        depth = sum(not each.isdigit() for each in inner)
        if depth > _DEPTH or tuple(path[: index + 1]) in networks or _is_network(inner):
            continue
        around = next((words[at] for at in reversed(range(index)) if not path[at].isdigit()), [])
        in_attention = _is_attention(words[index]) and not words[index][-1].startswith("classifier")
        if in_attention or _is_attention(around[-2:] if around[-1:] in (["head"], ["heads"]) else around[-1:]):
            continue
        if any(_HIDDEN_WORDS.intersection(each) for each in words[index + 1 :]):
            continue  # predictor.embeddings.projection
        repeated = not in_blocks and _is_in_block(path[:index])
        if part in _NAMES or _means_head(words[index], around, repeated=repeated):
            return part
    return None


def networks_in(paths: Iterable[tuple[Sequence[str], Sequence[nn.Module]]]) -> set[tuple[str, ...]]:
    """Return the paths of the modules that contain attention or repeated blocks, and so are no output heads.

    Args:
        paths: The path of each module that has a parameter, and the modules from the model down to it.
    """
    found = set()
    for path, around in paths:
        for at in range(1, len(path) + 1):
            by_class = at < len(around) and "attention" in type(around[at]).__name__.lower()
            if by_class or _is_network(path[at:]):
                found.add(tuple(path[:at]))
    return found


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding by its class or its class's name, such as VocabParallelEmbedding."""
    if isinstance(module, nn.Linear):  # PatchEmbedding, EmbeddingProjection
        return False
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or type(module).__name__.endswith("Embedding")


def table_by_name(path: Sequence[str]) -> str | None:
    """Return "embedding" or "norm" if a module's dotted name shows it to be one, else None."""
    path = path[: path.index("parametrizations")] if "parametrizations" in path else path
    words = _words(next((part for part in reversed(path) if not part.isdigit()), ""))
    if any(word.endswith("norm") for word in words):
        return "norm"
    return "embedding" if {"embed", "embeds", "embedding", "embeddings"}.intersection(words) else None


def find_heads(
    model: nn.Module,
    maps: Iterable[tuple[Sequence[str], nn.Module, LinearMap]],
    networks: Collection[tuple[str, ...]] = (),
) -> dict[nn.Module, str]:
    """Return the output heads that a model itself shows, with the reason.

    Args:
        model: The model.
        maps: The path, the module and the map of each of its linear maps, in its order.
        networks: Paths of modules that are no heads, see :func:`networks_in`.
    """
    heads: dict[nn.Module, str] = {}
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)  # Hugging Face's
        with suppress(NotImplementedError):
            head = ask() if callable(ask) else None
            if isinstance(head, nn.Module):
                heads[head] = "output head by get_output_embeddings()"
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            heads[module] = "output head, AdaptiveLogSoftmaxWithLoss"
    in_order = [(path, module, (map_.outputs, map_.inputs)) for path, module, map_ in maps]
    if not in_order:
        return heads
    # An untied head stands last and has the shape of an embedding; where that is square, any layer may have it.
    tables = {tuple(weight.shape) for weight in _tables(model)}
    last_path, last, last_shape = in_order[-1]
    trailing = set()
    for path, module, shape in reversed(in_order):
        is_beside = path[:-1] == last_path[:-1]  # output_linears.0 to output_linears.3
        if shape != last_shape or _is_in_block(path[:-1] if is_beside else path):
            break
        trailing.add(module)
    for path, module, shape in in_order:
        if shape not in tables or len(set(shape)) == 1:
            continue
        if module in trailing or head_by_name(path, in_blocks=True, networks=networks):
            heads.setdefault(module, f"output head by its shape, {shape[0]} x {shape[1]} as an embedding")
    if len(set(last_shape)) == 2 and _is_last_head(last_path):
        heads.setdefault(last, f"output head by its place and name, {'.'.join(last_path)!r}")
    return heads


def _is_last_head(path: Sequence[str]) -> bool:
    """Return whether the last linear map of a model is its head by its name, which means less elsewhere."""
    while path and path[-1].isdigit():
        path = path[:-1]
    in_words = [_words(part) for part in path]
    if not in_words or not in_words[-1] or len(path) > _TOP or any(part.isdigit() for part in path):
        return False
    if any(_is_attention(words) or _HIDDEN_NETWORKS.intersection(words) for words in in_words):
        return False
    last = in_words[-1]
    if path[-1].lower() in _LAST_NAMES or last[-2:] == ["out", "proj"] or last[-1] in _LAST_MAPS:
        return True
    # final_layer, final_proj, generator
    return any(words[:1] == ["final"] or words in (["generator"], ["readout"]) for words in in_words)


def _is_network(inner: Sequence[str]) -> bool:
    """Return whether what a module contains, a path in it, is attention or in a repeated block: layers.0.linear."""
    attention = any(_is_attention(_words(part)) for part in inner)
    return attention or any(
        part.isdigit() and not before.isdigit() and not all(each.isdigit() for each in inner[at + 2 :])
        for at, (before, part) in enumerate(zip(inner, inner[1:], strict=False))
    )


def _is_attention(words: Sequence[str]) -> bool:
    """Return whether the words of a name mean attention."""
    if list(words) == ["self"] or list(words[-2:]) in (["multi", "head"], ["multi", "heads"]):
        return True
    return any(word in _ATTENTION or word.rstrip("s").endswith("attention") for word in words)


def _tables(model: nn.Module) -> Iterable[torch.Tensor]:
    """Yield the tables of a model's embeddings, except those of positions and types."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if is_embedding(module) else None
        last = next((part for part in reversed(name.split(".")) if not part.isdigit()), "")
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and not _POSITIONS.intersection(_words(last)):
            yield weight


def _words(part: str) -> list[str]:
    """Return the words of a name in snake_case or CamelCase, without numbers."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)]


def _is_in_block(path: Sequence[str]) -> bool:
    """Return whether a path leads into one of several blocks: layers.3, but not the 0 of an nn.Sequential."""
    return any(part.isdigit() and not before.isdigit() for before, part in zip(path, path[1:], strict=False))


def _means_head(words: Sequence[str], around: Sequence[str], *, repeated: bool) -> bool:
    """Return whether the words of a name, below the module whose words are ``around``, mean an output head."""
    if not words:
        return False
    first, last = words[0], words[-1]
    if last in _DECISIVE or (last == "head" and not repeated):
        return True
    if _HIDDEN_WORDS.intersection(words) or (last in _INPUT_LAYERS and _INPUTS.issuperset(_OUTPUT_WORDS & {*words})):
        return False
    if _OUTPUT_WORDS.intersection(words):
        return not _HIDDEN_WORDS.intersection(around[-1:])  # bbox_embeddings.label_layer
    if last in ("pred", "preds"):
        return len(words) > 1  # box_pred; a joint's pred is the projection of its prediction network
    return not repeated and (first == "head" or last in _LAST_WORDS or last.endswith("head"))
