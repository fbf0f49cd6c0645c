# SPDX-License-Identifier: Apache-2.0
"""Which parameters and gradients a step can take, and in which precision it works on them."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _get_capturable_supported_devices
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from emerging_optimizers.adaptive_muon.checks import refusal, require


__all__ = [
    "FormT",
    "check_capturable",
    "check_distinct",
    "check_gradients",
    "check_matrices",
    "check_rows_and_columns",
    "in_work_dtype",
    "is_flattened",
    "is_matrix",
    "parameter_name",
    "unusable_form",
    "use_muon_of",
    "work_dtype",
]

# What HybridAdaptiveMuon.from_model takes a parameter of more than two dimensions for, its attribute muon_form: a stack of
# matrices, or one matrix (out, all the rest).
FormT = Literal["stack", "flattened"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where sharding engines keep the shape of a parameter that they have emptied or flattened: DeepSpeed's ds_shape,
# fairscale's _orig_size. An emptied one may have it anywhere; a flattened one looks like a bias with an attribute.
_SHAPE = re.compile(r"(^|_)(shape|size)$")
_WHOLE_SHAPE = re.compile(r"^_*(ds|orig|original|full|global|logical|unsharded|whole)_(shape|size)$")


def parameter_name(group: dict[str, Any], index: int) -> str:
    """Return what an error calls a group's parameter: its name where the group has names, else its index."""
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} of its group"


def check_distinct(group: dict[str, Any], others: Iterable[dict[str, Any]] = ()) -> None:
    """Raise a ``ValueError`` if a group has a parameter twice, or one of another group's: it would step twice."""
    seen = {p for other in others for p in other["params"]}
    repeated = []
    for index, p in enumerate(group["params"]):
        if p in seen:
            repeated.append(parameter_name(group, index))
        seen.add(p)
    require(
        not repeated,
        "a parameter must be in one group, and there once; repeated is",
        ", ".join(repeated),
        "Remove it from one of its places.",
    )


def use_muon_of(p: torch.Tensor, name: str = "") -> bool | None:
    """Return the attribute ``use_muon`` of a parameter of this name; None where it has none.

    Raises:
        ValueError: If it is neither True, False nor None.
    """
    use_muon = getattr(p, "use_muon", None)
    require(
        use_muon is None or isinstance(use_muon, bool),
        f"the attribute use_muon of {name or 'a parameter'} must be True or False",
        use_muon,
        "Use None to have the parameter routed by the rules.",
    )
    return use_muon


def is_matrix(p: torch.Tensor) -> bool:
    """Return whether a parameter is a matrix, or tagged ``muon_stacked`` as a stack of them."""
    return p.ndim == 2 or (p.ndim == 3 and bool(getattr(p, "muon_stacked", False)))


def is_flattened(p: torch.Tensor) -> bool:
    """Return whether a parameter is stored in more dimensions than the matrix (out, all the rest) that it is worked on as."""
    return getattr(p, "muon_form", None) == "flattened"


def unusable_form(p: torch.Tensor) -> str:
    """Return the class, dtype or layout of a parameter that AdaptiveMuon does not take, whatever its shape; "" if it does."""
    if _is_several(p):
        return f"{type(p).__name__} of several tensors"
    if p.layout != torch.strided:
        return str(p.layout)
    return "" if p.dtype in _DTYPES else str(p.dtype)


def check_rows_and_columns(p: torch.Tensor, name: str) -> None:
    """Raise a ``ValueError`` if a sharding engine has taken a parameter's rows and columns, and so its matrix.

    An empty shard of a small matrix is valid.
    """
    rule = "a parameter must keep its rows and columns to be optimized"
    remedy = "Use FSDP2, torch.distributed.fsdp.fully_shard."
    if getattr(p, "_fsdp_flattened", False):
        raise refusal(rule, f"{name} flattened by FullyShardedDataParallel", remedy)
    if type(p).__name__ == "FlatParameter":
        raise refusal(rule, f"{name}, a FlatParameter", remedy)
    if hasattr(p, "_megatron_fsdp_model") or hasattr(p, "__fsdp_param__"):
        raise refusal(rule, f"{name} sharded by Megatron-FSDP", remedy)
    if p.ndim > 1 or not p.is_floating_point():
        return
    for key, kept in vars(p).items():
        if not (isinstance(kept, tuple | list) and all(isinstance(size, int) for size in kept)):
            continue
        emptied = p.numel() == 0 < math.prod(kept) and _SHAPE.search(key)
        # A user's own orig_size may be on any bias; an engine's is private, or the size is exactly the parameter's.
        own = key.startswith(("_", "ds_")) and p.numel() <= math.prod(kept)
        fits = own or p.numel() == math.prod(kept)
        flattened = p.ndim == 1 < len(kept) and fits and _WHOLE_SHAPE.search(key)
        if emptied or flattened:
            engine = "DeepSpeed's ZeRO stage 3" if key.startswith("ds_") else "a sharding engine"
            raise refusal(
                rule,
                f"{name}, which {engine} holds as {tuple(p.shape)} instead of {tuple(kept)}",
                remedy,
            )


# By the number of dimensions.
_OF_CONVOLUTION = " Pass flatten_conv=True to from_model if it is the weight of a convolution."
_REMEDIES = {
    3: " Set its muon_stacked = True, or pass stacked_experts=True to from_model, if it is a stack of matrices "
    "(experts)." + _OF_CONVOLUTION,
    **dict.fromkeys((4, 5), _OF_CONVOLUTION),
}


def check_matrices(group: dict[str, Any]) -> None:
    """Raise a ``ValueError`` unless every parameter of a group is a real floating-point matrix or stack of them."""
    for index, p in enumerate(group["params"]):
        if is_lazy(p):
            continue  # it has no shape before the model's first forward; the step looks again
        check_rows_and_columns(p, parameter_name(group, index))
        if is_flattened(p) and not p.is_contiguous():
            raise refusal(
                f"{parameter_name(group, index)} must be contiguous to be flattened; it has the strides",
                p.stride(),
                "Convert the model to torch.contiguous_format, or pass flatten_conv=False.",
            )
        if not is_matrix(p) and getattr(p, "muon_form", None) is None:
            raise refusal(
                "parameters of AdaptiveMuon must be matrices, of two dimensions; "
                f"{parameter_name(group, index)} has the shape",
                tuple(p.shape),
                "Give it to AdamW, as HybridAdaptiveMuon does by itself." + _REMEDIES.get(p.ndim, ""),
            )
        if unusable := unusable_form(p):
            raise refusal(
                "parameters of AdaptiveMuon must be real floating-point matrices, each in one tensor; "
                f"{parameter_name(group, index)} is",
                unusable,
                f"Use one of {', '.join(map(str, _DTYPES))}, or give it to another optimizer.",
            )


def check_gradients(
    group: dict[str, Any],
    algorithm: str,
    *,
    complex_too: bool = False,
    converts: Callable[[torch.Tensor], bool] = lambda p: True,
) -> None:
    """Raise a ``ValueError`` if a gradient of a group is sparse or, unless ``complex_too``, complex or several tensors.

    Also if it has another dtype than its parameter, unless the algorithm ``converts`` the gradient of that parameter.
    """
    for index, p in enumerate(group["params"]):
        grad = p.grad
        if grad is None:
            continue
        if not complex_too and _is_several(grad):
            raise refusal(
                f"gradients of {algorithm} must be one tensor each; that of {parameter_name(group, index)} is",
                type(grad).__name__,
                "Convert it to a plain tensor, or give the parameter to another optimizer.",
            )
        if grad.layout != torch.strided or (grad.is_complex() and not complex_too):
            raise refusal(
                f"gradients of {algorithm} must be dense{'' if complex_too else ' and real'}; that of "
                f"{parameter_name(group, index)} is",
                f"{grad.layout}, {grad.dtype}",
                "Make it dense (sparse=False in an embedding), or give the parameter to another optimizer.",
            )
        if grad.dtype != p.dtype and not converts(p):
            raise refusal(
                f"gradients of {algorithm} must have the dtype of their parameters; that of {parameter_name(group, index)}, "
                f"in {p.dtype}, is in",
                grad.dtype,
                "Convert it to that dtype.",
            )


def check_capturable(group: dict[str, Any]) -> None:
    """Raise a ``ValueError`` if torch's AdamW would find, in its step, that a group is on no device with graphs."""
    supported = _get_capturable_supported_devices()
    for index, p in enumerate(group["params"]):
        if group.get("capturable") and p.grad is not None and p.device.type not in supported:
            raise refusal(
                f"with capturable=True parameters of AdamW must be on one of {', '.join(supported)}; "
                f"{parameter_name(group, index)} is on",
                p.device.type,
                "Move the model there, or pass capturable=False.",
            )


def _is_several(tensor: torch.Tensor) -> bool:
    """Return whether a tensor of a wrapper class holds several: an average in place would be repeated for each."""
    while is_traceable_wrapper_subclass(tensor):
        held = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        first, *others = [each for each in held if isinstance(each, torch.Tensor)]  # a DTensor also holds its mesh
        if others:
            return True
        tensor = first
    return False


def work_dtype(p: torch.Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state and arithmetic: float32, or float64 for a float64 parameter."""
    return torch.promote_types(p.dtype, torch.float32)


def in_work_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself where it has the precision to work in, else a copy in that precision."""
    return tensor.to(work_dtype(tensor))
