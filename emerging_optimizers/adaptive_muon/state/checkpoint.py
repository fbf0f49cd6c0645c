# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint: reject what does not fit before anything changes, and keep the state's full precision."""

from collections.abc import Callable, Iterator, Set
from copy import deepcopy
from dataclasses import replace
from typing import Any, get_args

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon.parameters import is_flattened, parameter_name
from emerging_optimizers.adaptive_muon.sharding.dtensor import local_of
from emerging_optimizers.adaptive_muon.state.buffers import ADAMW_AVERAGES, StateFormat, check_adamw_state
from emerging_optimizers.orthogonalized_optimizers import adaptive_muon as upstream


__all__ = ["attributes", "deep_copy", "load"]

_BUFFERS = ("momentum_buffer", "moment2_buffer")
# The count of a state that had none, for stochastic rounding. Whoever corrects the bias later by it is right: the averages
# of then have long forgotten that they started at zero.
_LONG_AGO = 2**20


def load(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    torch_load: Callable[[dict[str, Any]], None],
    state_format: StateFormat,
    widened: Callable[[torch.Tensor], bool] | None = None,
) -> None:
    """Load a checkpoint into ``optimizer`` as torch does, the matrices' part of it checked and in its own dtypes.

    Torch casts every floating-point state to its parameter's dtype; a bfloat16 matrix would lose the float32 momentum.
    Two hooks prevent this: one after all that may change the checkpoint, one before all that may change what was loaded.

    Args:
        optimizer: The optimizer of the matrices, or one that holds its groups too.
        state_dict: The checkpoint.
        torch_load: The torch class's ``load_state_dict`` of ``optimizer``.
        state_format: The format of the matrices' state.
        widened: Returns whether another parameter, in 16 bit, has its state in float32; None if none has.

    Raises:
        ValueError: If the checkpoint does not fit. Nothing has changed then.
    """
    saved, wide = dict[torch.Tensor, dict[str, Any]](), dict[torch.Tensor, dict[str, Any]]()
    lent = set[int]()

    def before(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        lent.update(_places(state_dict["state"]) - _places(optimizer.state))
        present = {key: _present(state) for key, state in state_dict["state"].items()}
        groups, states = state_dict["param_groups"], _without_new_counts(present)
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in optimizer.param_groups]:
            return None  # torch says so
        _check_names(groups, optimizer.param_groups)
        state_format.sharding.resolve([group for group in optimizer.param_groups if group.get("use_muon", True)])
        for saved_group, group in zip(groups, optimizer.param_groups, strict=True):
            _check_route(saved_group, group)
            if group.get("use_muon", True):
                saved.update(_checked_states(saved_group, group, states, state_format))
            else:
                pairs = zip(group["params"], saved_group["params"], strict=True)
                of_adamw = {p: states.get(key, {}) for p, key in pairs}
                check_adamw_state({**saved_group, "params": group["params"]}, of_adamw)
                wide.update((p, state) for p, state in of_adamw.items() if widened is not None and widened(p))
        return {**state_dict, "state": present, "param_groups": _of_method(groups, state_format.moment2_method)}

    def after(optimizer: Optimizer) -> None:
        for p, state in saved.items():
            optimizer.state[p].update(_own_form(p, state, state_format))
            if not state_format.counts_steps:
                optimizer.state[p].pop("step", None)  # nobody counts on; a stale count would be wrong later
        for p, state in wide.items():
            averages = [key for key in ADAMW_AVERAGES if key in state]
            optimizer.state[p].update((key, state[key].to(p.device, torch.float32)) for key in averages)
        _copy(optimizer, lent)

    with (
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
        torch.inference_mode(False),  # what is made in it could not be updated outside
    ):
        torch_load(state_dict)


def _of_method(groups: list[dict[str, Any]], moment2_method: str) -> list[dict[str, Any]]:
    """Return saved groups with the optimizer's own method; those of a checkpoint without state may be of any."""
    own = {"moment2_method": moment2_method}
    return [group | own if "moment2_method" in group else group for group in groups]


def _copy(optimizer: Optimizer, lent: Set[int]) -> None:
    """Copy the tensors of a checkpoint that have become the state, in place; they are in memory where ``lent`` has it.

    Torch keeps those that it need not cast. A step would change the checkpoint, and every optimizer that it is loaded into.
    """
    for state in optimizer.state.values():
        state.update((key, value.detach().clone()) for key, value in state.items() if _place(value) in lent)


def _places(states: dict[Any, dict[str, Any]]) -> set[int]:
    """Return where the tensors of states are in memory."""
    return {_place(value) for state in states.values() for value in state.values()} - {0}


def _place(value: Any) -> int:
    """Return where a tensor is in memory; 0 for what has no memory of its own."""
    local = local_of(value) if isinstance(value, torch.Tensor) else None
    return 0 if local is None or is_traceable_wrapper_subclass(local) else local.untyped_storage().data_ptr()


def _own_form(p: torch.Tensor, state: dict[str, Any], state_format: StateFormat) -> dict[str, torch.Tensor]:
    """Return the tensors of a parameter's saved state in the optimizer's own dtypes and places, with a count if it counts.

    A float32 momentum is rounded to nearest where the optimizer has its own in bfloat16.
    """
    own = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and key != "step":
            dtype = state_format.dtype(p, key) if key.startswith(_BUFFERS) else value.dtype
            if not is_traceable_wrapper_subclass(value):
                value = value.as_subclass(torch.Tensor)  # buffers of older checkpoints may be of a subclass
            own[key] = value.to(device=p.device, dtype=dtype)
            if is_flattened(p):
                own[key] = own[key].contiguous()  # in another memory format it would have no view as a matrix
    if state_format.counts_steps:
        own["step"] = state_format.new_step(p)
        # Of whatever dtype it has become: bfloat16 would count to 256 and no further.
        own["step"].copy_(torch.as_tensor(state.get("step", _LONG_AGO)).reshape(()))
    return own


def attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what pickle and deepcopy must carry: all attributes, a subclass's too, but torch's hooks.

    Torch itself carries defaults, state and groups only. A scheduler leaves its wrapper of ``step`` on the optimizer,
    which belongs to that scheduler.
    """
    return {
        name: value for name, value in vars(optimizer).items() if name != "step" and not name.startswith("_optimizer_")
    }


def deep_copy(optimizer: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an AdaptiveMuon, and of its parameters, which keep the attributes of their sharding."""
    copied = object.__new__(type(optimizer))
    memo[id(optimizer)] = copied
    copied.__setstate__(deepcopy(optimizer.__getstate__(), memo))
    for group, group_of_copy in zip(optimizer.param_groups, copied.param_groups, strict=True):
        for p, copy in zip(group["params"], group_of_copy["params"], strict=True):
            copied.state_format.sharding.adopt(copy, p, optimizer.state_format.sharding)
    return copied


def _check_names(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Raise if a parameter stands elsewhere in the checkpoint; one that was renamed is taken by its place."""
    saved, names = ([n for group in each for n in group.get("param_names", [])] for each in (saved_groups, groups))
    both = set(saved) & set(names)
    moved = [pair for pair in zip(saved, names, strict=False) if pair[0] != pair[1] and both.intersection(pair)]
    require(
        not moved,
        "parameters must be in the checkpoint's order; the first (name there, name here) that differ",
        moved[:3],
        "Make the optimizer from the same model, with the same routes, as when it was saved.",
    )


def _check_route(saved_group: dict[str, Any], group: dict[str, Any]) -> None:
    """Raise if a group was AdamW's when it was saved and is not now, or the reverse."""
    require(
        saved_group.get("use_muon") == group.get("use_muon"),
        f"a group of the checkpoint must have use_muon={group.get('use_muon')} as the optimizer's has",
        saved_group.get("use_muon"),
        "Route the parameters as when it was saved, see HybridAdaptiveMuon.describe().",
    )


def _checked_states(
    saved_group: dict[str, Any], group: dict[str, Any], states: dict[Any, dict[str, Any]], state_format: StateFormat
) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Yield each parameter of a group with its saved state, or raise."""
    for index, (key, p) in enumerate(zip(saved_group["params"], group["params"], strict=True)):
        state, name = states.get(key, {}), parameter_name(group, index)
        if not state:
            continue  # it had no gradient yet
        require(
            "momentum_buffer" in state and any(key.startswith("moment2_buffer") for key in state),
            f"the state of {name} must hold momentum_buffer and moment2_buffer; in the checkpoint it holds",
            sorted(state),
            "Load a checkpoint of AdaptiveMuon. This one is of another optimizer.",
        )
        method = saved_group.get("moment2_method") or _upstream_method(p, state, state_format)
        require(
            method == state_format.moment2_method,
            f'the moment2_method of the checkpoint must be "{state_format.moment2_method}" for {name}',
            method,
            f'Pass moment2_method="{method}" to resume it, or start without its optimizer state.',
        )
        _check_buffers(p, name, state, state_format)
        require(
            not state_format.bias_correction or "step" in state,
            f"a state must have the number of steps for bias correction; that of {name} holds only",
            sorted(state),
            "Pass bias_correction=False to resume from this checkpoint, which lacks it.",
        )
        yield p, state


def _without_new_counts(states: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return states without the counts of new ones."""
    if not any(map(_has_new_count, states.values())):  # of all: a rank's shard may be empty, or zero
        return states
    return {
        key: {name: value for name, value in state.items() if name != "step" or value} for key, state in states.items()
    }


def _present(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state without what is missing: torch's set_optimizer_state_dict has an empty dict in its place."""
    return {key: value for key, value in state.items() if not isinstance(value, dict) or value}


def _has_new_count(state: dict[str, Any]) -> bool:
    """Return whether a state has the count of a new one, and averages that are not.

    torch.distributed.checkpoint loads into a new state. With ``allow_partial_load=True`` it leaves what a checkpoint lacks.
    """
    averages = (local_of(value) for key, value in state.items() if key.startswith(_BUFFERS))
    return "step" in state and not state["step"] and any(average.any() for average in averages)


def _check_buffers(p: torch.Tensor, name: str, state: dict[str, Any], state_format: StateFormat) -> None:
    """Raise unless a saved state has the parameter's buffers, in their shapes and placements."""
    expected = state_format.buffers(p)
    found = {key for key in state if key.startswith(_BUFFERS)}
    require(
        found <= expected.keys(),
        f"the state of {name} must hold {', '.join(expected)}; in the checkpoint it holds",
        sorted(found),
        "Use the blocks and the version with which it was saved (from_model(..., split_qkv=False) if it had none), "
        "or start without its optimizer state. Versions before 0.1.0 had one buffer for the rows of all blocks.",
    )
    for key, buffer in expected.items():
        saved = state.get(key)
        require(
            saved is not None and tuple(saved.shape) == buffer.shape,
            f"{key} of {name} must have the shape {buffer.shape}; in the checkpoint it has",
            tuple(saved.shape) if saved is not None else None,
            "Use the model, the order of its parameters and the blocks with which it was saved.",
        )
        placements = getattr(saved, "placements", None)
        require(
            placements == buffer.placements,
            f"{key} of {name} must have the placements {buffer.placements}; in the checkpoint it has",
            placements,
            "Load it with torch.distributed.checkpoint and set_optimizer_state_dict, which reshard.",
        )


def _upstream_method(p: torch.Tensor, state: dict[str, Any], state_format: StateFormat) -> str:
    """Return the method of an upstream state, which does not name it: upstream's first whose V has that shape.

    Shapes of different methods can coincide (a matrix of one column): the optimizer's own method then wins, and also
    where no shape fits, for the check of the shapes to complain.
    """
    own = state_format.moment2_method
    names: list[str] = sorted(get_args(upstream.Moment2MethodT), key=lambda name: name != own)
    shape = tuple(state["moment2_buffer"].shape) if "moment2_buffer" in state else None
    for name in names:
        of_method = replace(state_format, moment2_method=name, moment2=METHODS[name]())  # no option matters to a shape
        V = of_method.buffers(p).get("moment2_buffer")
        if V is not None and V.shape == shape:
            return name
    return own
