# SPDX-License-Identifier: Apache-2.0
"""NAMO and NAMO-D walk the path of their authors' own code, recorded in data/namo_reference.json.

The oracle has to as well: this is what shows the oracle right by something that we did not write.
"""

import json
from pathlib import Path

import pytest
import torch

import oracle
from emerging_optimizers.adaptive_muon import AdaptiveMuon


REFERENCE = json.loads((Path(__file__).parent / "data" / "namo_reference.json").read_text())
ATOL = 2e-6  # the authors' code ran in float32: weights of size 1 are rounded by 1e-7 in each of six steps


def case_id(case: dict) -> str:
    clamp = "" if case["clamp"] is None else f"-clamp{case['clamp']}"
    rows, columns = case["shape"]
    return f"{case['moment2_method']}-{rows}x{columns}{clamp}{'-nesterov' * case['nesterov']}"


def options(case: dict) -> dict:
    """The file's words for the paper's options, in ours."""
    settings = dict(REFERENCE["settings"])
    assert settings.pop("weight_decay_scaled_by_adaptive_step")
    clamp = {} if case["clamp"] is None else {"namo_d_clamp": case["clamp"]}
    return settings | clamp | {"nesterov": case["nesterov"], "weight_decay_method": "adaptive"}


def check(path: list[torch.Tensor], case: dict) -> None:
    torch.testing.assert_close(torch.stack(path).double(), torch.tensor(case["after"]).double(), atol=ATOL, rtol=0)


each_case = pytest.mark.parametrize("case", REFERENCE["cases"], ids=case_id)


@each_case
def test_oracle(case: dict) -> None:
    initial, *gradients = torch.tensor([case["initial"], *case["grads"]])
    check(oracle.trajectory(case["moment2_method"], initial, gradients, **options(case)), case)


@each_case
def test_optimizer(case: dict) -> None:
    initial, *gradients = torch.tensor([case["initial"], *case["grads"]])
    optimizer = AdaptiveMuon(
        [torch.nn.Parameter(initial)],
        moment2_method=case["moment2_method"],
        fp32_matmul_prec="highest",
        **options(case),
    )
    check(oracle.walk(optimizer, gradients), case)


def test_the_cases_are_all_there() -> None:
    assert [case["moment2_method"] for case in REFERENCE["cases"]].count("namo_d") == 24
    assert len({case_id(case) for case in REFERENCE["cases"]}) == len(REFERENCE["cases"]) == 32
    assert all(len(case["grads"]) == len(case["after"]) == 6 for case in REFERENCE["cases"])
