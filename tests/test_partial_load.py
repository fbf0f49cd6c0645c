# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that lack counts or states: what is loaded into a new state leaves no new count there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon


class Run:
    """Two matrices, of which the second has a gradient from the third step on, and their optimizer."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)).bfloat16()
        self.optimizer = AdaptiveMuon(self.model.parameters(), moment2_method="namo", **options)

    def train(self, steps: int) -> "Run":
        for step in range(steps):
            for index, p in enumerate(self.model.parameters()):
                p.grad = torch.ones_like(p) if step >= 2 * index else torch.zeros_like(p)
            self.optimizer.step()
        return self

    def load(self, place: Path) -> list[float]:
        """Loads what a checkpoint has, and returns the counts."""
        loaded = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        dcp.load(loaded, checkpoint_id=place, planner=DefaultLoadPlanner(allow_partial_load=True))
        set_optimizer_state_dict(self.model, self.optimizer, loaded["optimizer"])
        return [float(state["step"]) for state in self.optimizer.state.values()]

    def save(self, place: Path) -> None:
        dcp.save({"optimizer": get_optimizer_state_dict(self.model, self.optimizer)}, checkpoint_id=place)


def test_bias_correction_refuses_it(tmp_path: Path) -> None:
    Run(bias_correction=False).train(3).save(tmp_path)
    run = Run(bias_correction=True)
    before = [p.clone() for p in run.model.parameters()]
    with pytest.raises(
        ValueError, match=r"must have the number of steps for bias correction; that of .* Pass bias_correction=False"
    ):
        run.load(tmp_path)
    assert all(map(torch.equal, before, run.model.parameters()))


def test_rounding_counts_from_long_ago(tmp_path: Path) -> None:
    Run().train(3).save(tmp_path)
    assert Run(stochastic_rounding=True).load(tmp_path) == [2**20, 2**20]


def test_a_matrix_of_zeros_counts_as_the_others(tmp_path: Path) -> None:
    """As a rank's shard may be, of a matrix that has other elements on other ranks."""
    trained = Run().train(3)
    for value in trained.optimizer.state[trained.model[1].weight].values():
        value.zero_()
    trained.save(tmp_path)
    assert Run(stochastic_rounding=True).load(tmp_path) == [2**20, 2**20]


@pytest.mark.parametrize("options", [{"bias_correction": True}, {"stochastic_rounding": True}], ids=str)
def test_a_matrix_without_a_gradient_so_far_counts_from_zero(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its averages are zero too, as in a new state."""
    trained = Run(**options)
    trained.train(1).save(tmp_path)
    counts = [float(state["step"]) for state in trained.optimizer.state.values()]
    assert Run(**options).load(tmp_path) == counts
    with_new_state = Run(**options)
    get_optimizer_state_dict(with_new_state.model, with_new_state.optimizer)
    with_new_state.save(tmp_path / "new")
    assert Run(**options).load(tmp_path / "new") == [0, 0]


def test_a_matrix_without_state_in_a_flattened_checkpoint() -> None:
    """Torch makes an empty dict of each buffer that such a checkpoint lacks."""
    run = Run(bias_correction=True)
    saved = run.train(2).optimizer.state_dict()
    saved["state"][1] = {key: {} for key in saved["state"][0]}
    other = Run(bias_correction=True)
    other.optimizer.load_state_dict(saved)
    first, second = other.model.parameters()
    assert other.optimizer.state[first]["step"] == 2
    other.train(1)
    assert other.optimizer.state[second]["step"] == 1


def test_what_adamw_has_no_state_of_in_a_flattened_checkpoint() -> None:
    """As of a bias that was frozen. Torch's own AdamW fails at the empty dict that stands for its count."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)) for _ in range(2)]
    one, other = (HybridAdaptiveMuon.from_model(model, moment2_method="namo") for model in models)
    bias, resumed_bias = (model[0].bias for model in models)
    for p in models[0].parameters():
        p.grad = None if p is bias else torch.ones_like(p)
    one.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(
        models[1], other, get_optimizer_state_dict(models[0], one, options=options), options=options
    )
    for p in models[1].parameters():
        p.grad = torch.ones_like(p)
    other.step()
    assert {float(other.state[p]["step"]) for p in models[1][1].parameters() if "step" in other.state[p]} == {2}
    assert other.state[resumed_bias]["step"] == 1
