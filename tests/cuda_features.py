# SPDX-License-Identifier: Apache-2.0
"""Every option of a step, for tests on a GPU and on what stands in for one."""

from importlib.util import find_spec
from typing import get_args

import pytest
import torch
from on_cuda import OPTIONS, on

from emerging_optimizers.adaptive_muon import AdaptiveMuon, ColumnBlocks, WeightDecayMethodT
from emerging_optimizers.adaptive_muon.moment2 import METHODS


BF16 = torch.bfloat16
SHAPES = [(96, 64)] * 3 + [(64, 96)] * 2 + [(300, 500)]
STACKS = [(4, 48, 64)] * 2 + [(3, 64, 48)]
REPEATING = [(96, 64)] * 3 + [(64, 96)] * 2


class Hook:
    """Halves what is to be subtracted, and keeps the norm of the weight."""

    def pre_weight_update_inplace(self, p, update):
        update.mul_(0.5)
        return p.float().norm()

    def post_weight_update_inplace(self, p, norm):
        p.mul_((norm / p.float().norm()).to(p.dtype))


# What a subclass may have in the place of methods.
FUNCTIONS = {
    "orthogonalize": lambda p, M, **_: M / M.norm(dim=(-2, -1), keepdim=True),
    "pre_weight_update_fn_inplace": lambda p, update: update.mul_(0.5),
    "post_weight_update_fn_inplace": lambda p: p.clamp_(-2, 2),
}
# Options, shapes, the dtype, and attributes of the parameters.
FEATURES = {
    "blocks of rows": ({"blocks_fn": lambda p: (p.size(0) // 4, 3 * p.size(0) // 4)}, SHAPES, torch.float32, {}),
    "blocks of columns": ({"blocks_fn": lambda p: ColumnBlocks([p.size(1) // 2])}, SHAPES, torch.float32, {}),
    "repeating rows": ({"blocks_fn": lambda p: (8, 4, 4), "diagnostics_every": 1}, REPEATING, torch.float32, {}),
    "repeating columns": ({"blocks_fn": lambda p: ColumnBlocks([8, 4, 4])}, REPEATING, torch.float32, {}),
    "repeating rows, rounded": (
        {"blocks_fn": lambda p: (8, 8), "stochastic_rounding": True, "momentum_dtype": "bfloat16"},
        REPEATING,
        BF16,
        {},
    ),
    "stacks": ({}, STACKS, torch.float32, {"muon_stacked": True}),
    "transposed": ({}, SHAPES, torch.float32, {"muon_transposed": True}),
    "flattened": ({}, [(64, 12, 3, 3)] * 2 + [(48, 16, 5)], torch.float32, {"muon_form": "flattened"}),
    "bfloat16 weights": ({}, SHAPES, BF16, {}),
    "float16 weights": ({}, SHAPES, torch.float16, {}),
    "stochastic rounding": ({"stochastic_rounding": True}, SHAPES, BF16, {}),
    "stochastic rounding of stacks": ({"stochastic_rounding": True}, STACKS, BF16, {"muon_stacked": True}),
    "bfloat16 momentum": ({"momentum_dtype": "bfloat16"}, SHAPES, torch.float32, {}),
    "measured": ({"diagnostics_every": 1}, SHAPES, torch.float32, {}),
    "measured blocks": ({"diagnostics_every": 1, "blocks_fn": lambda p: (p.size(0) // 2,)}, SHAPES, torch.float32, {}),
    "measured and rounded": (
        {"diagnostics_every": 1, "stochastic_rounding": True, "momentum_dtype": "bfloat16"},
        SHAPES,
        BF16,
        {},
    ),
    "without nesterov and correction": ({"nesterov": False, "bias_correction": False}, SHAPES, torch.float32, {}),
    "no weight decay": ({"weight_decay": 0.0}, SHAPES, torch.float32, {}),
    "a hook": ({"weight_update_hook": Hook()}, SHAPES, torch.float32, {}),
    "a hook, rounded": ({"weight_update_hook": Hook(), "stochastic_rounding": True}, SHAPES, BF16, {}),
    "functions": ({"functions": FUNCTIONS, "weight_decay_method": "cautious"}, SHAPES, torch.float32, {}),
} | {
    f"{decay} decay": ({"weight_decay_method": decay}, SHAPES, torch.float32, {})
    for decay in get_args(WeightDecayMethodT)
}
of_features = pytest.mark.parametrize("feature", FEATURES)
of_methods = pytest.mark.parametrize("method", METHODS)


def made(device, method, feature, **more):
    """Parameters on a device, and their optimizer in full precision."""
    options, shapes, dtype, attributes = FEATURES[feature]
    if {"adaptive": False, "l2": True}.get(options.get("weight_decay_method"), None) is method.startswith("namo"):
        pytest.skip("refused")
    if "weight_update_hook" in options and find_spec("emerging_optimizers.weight_update_hooks") is None:
        pytest.skip("upstream has no hooks")
    params = on(device, dtype, shapes)
    for p in params:
        for name, value in attributes.items():
            setattr(p, name, value)
    options = OPTIONS | {"moment2_method": method, "fp32_matmul_prec": "highest"} | options | more
    functions = options.pop("functions", {})
    optimizer = AdaptiveMuon(params, **options)
    for name, function in functions.items():
        setattr(optimizer, name, function)
    return params, optimizer


def is_low(feature):
    """Whether something is rounded to 16 bits."""
    options, _, dtype, _ = FEATURES[feature]
    return dtype != torch.float32 or "momentum_dtype" in options
