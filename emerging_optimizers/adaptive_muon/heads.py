# SPDX-License-Identifier: Apache-2.0
"""Which modules are a model's output heads."""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import takewhile

import torch
from torch import nn

from emerging_optimizers.adaptive_muon.linear_maps import LinearMap


__all__ = ["find_heads", "head_by_name", "is_embedding"]

# Names of output heads that no word below shows.
_NAMES = {"qa_outputs", "output_layer", "output_projection", "embed_out", "unembed", "lm_loss"}
# A word that means what a model puts out, wherever it stands in a name (class_labels_classifier, bbox_embed).
_OUTPUT_WORDS = {
    *("class", "classes", "cls", "classif", "classifier", "classifiers", "classification"),
    *("label", "labels", "logit", "logits", "bbox", "predictor", "predictors", "prediction", "predictions"),
}
# A last word that means an output head outside of repeated blocks. In them it is an attention head or its score.
_LAST_WORDS = {"head", "heads", "score", "scores", "scorer"}
# A word that means a hidden layer, whatever the other words of the name (multi_head, class_embedding).
_HIDDEN_WORDS = {"multi", "embedding", "embeddings", "embedder", "emb", "token", "tokens", "query", "pos"}
# A word that means a hidden layer, wherever it stands in the path (self_attn.score, sa_head.key).
_ATTENTION = {*("attention", "attentions", "attn", "attns", "mha", "mhsa", "sa", "multihead", "self", "cross")}
# How deep in a head its linear maps may lie, indices not counted: head.mlp.0 and predictions.transform.dense. What is
# deeper belongs to a network of its own, such as V-JEPA's predictor.layer.3.attention.query.
_DEPTH = 2


def head_by_name(path: Sequence[str], *, in_blocks: bool = False) -> str | None:
    """Return the component of a module's dotted name that shows it to be an output head, or None.

    Args:
        path: Components of the name of the module that holds a parameter, without those of wrappers.
        in_blocks: Whether a last word such as "head" counts in repeated blocks (``layers.3.head``) too.
    """
    words = [_words(part) for part in path]
    if any(_ATTENTION.intersection(each) for each in words):
        return None
    for index, part in enumerate(path):
        depth = sum(not each.isdigit() for each in path[index + 1 :])
        if any(_HIDDEN_WORDS.intersection(each) for each in words[index + 1 :]):
            continue  # predictor.embeddings.projection
        repeated = not in_blocks and _is_in_block(path[:index])
        if depth <= _DEPTH and (part in _NAMES or _means_head(words[index], repeated=repeated)):
            return part
    return None


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is an embedding by its class or its class's name, such as VocabParallelEmbedding."""
    if isinstance(module, nn.Linear):  # PatchEmbedding, EmbeddingProjection
        return False
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or type(module).__name__.endswith("Embedding")


def find_heads(model: nn.Module, maps: Iterable[tuple[Sequence[str], nn.Module, LinearMap]]) -> dict[nn.Module, str]:
    """Return the output heads that a model itself shows, with the reason.

    Args:
        model: The model.
        maps: Its linear maps in its order: the path and the module, and the map.
    """
    heads: dict[nn.Module, str] = {}
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)  # Hugging Face's
        with suppress(NotImplementedError):
            head = ask() if callable(ask) else None
            if isinstance(head, nn.Module):
                heads[head] = "output head by get_output_embeddings()"
    # An untied head stands last and has the shape of an embedding; where that is square, any layer may have it.
    tables = {tuple(weight.shape) for weight in _embedding_weights(model)}
    in_order = [(path, module, (map_.outputs, map_.inputs)) for path, module, map_ in maps]
    shaped = [each for each in in_order if each[2] in tables and len(set(each[2])) == 2]
    last = in_order[-1][2] if in_order else ()
    trailing = list(takewhile(lambda each: each[2] == last, reversed(in_order)))
    for each in shaped:
        path, module, shape = each
        if each in trailing or head_by_name(path, in_blocks=True):
            heads.setdefault(module, f"output head by its shape, {shape[0]} x {shape[1]} as an embedding")
    return heads


def _embedding_weights(model: nn.Module) -> Iterable[torch.Tensor]:
    """Yield the tables of a model's embeddings."""
    for module in model.modules():
        weight = getattr(module, "weight", None) if is_embedding(module) else None
        if isinstance(weight, torch.Tensor) and weight.ndim == 2:
            yield weight


def _words(part: str) -> list[str]:
    """Return the words of a name in snake_case or CamelCase, without numbers."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)]


def _is_in_block(path: Sequence[str]) -> bool:
    """Return whether a path leads into one of several blocks: layers.3, but not the 0 of an nn.Sequential."""
    return any(part.isdigit() and not before.isdigit() for before, part in zip(path, path[1:], strict=False))


def _means_head(words: Sequence[str], *, repeated: bool) -> bool:
    """Return whether the words of a name mean an output head."""
    if not words or _HIDDEN_WORDS.intersection(words):
        return False
    if _OUTPUT_WORDS.intersection(words):
        return True
    last = words[-1]
    if last in ("pred", "preds"):
        return len(words) > 1  # box_pred; a joint's pred is the projection of its prediction network
    return not repeated and (last in _LAST_WORDS or last.endswith("head"))
