# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint with momenta in bfloat16 and stochastic rounding: of four ranks, on four, two and one."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DIRECTORY, needs_directory, set_states, states
from models import fsdp, full, hsdp, models, set_gradients_of_both
from pieces import options_of
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon


LESS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum_dtype": "bfloat16"},
    "both": {"stochastic_rounding": True, "momentum_dtype": "bfloat16"},
}


class Run:
    """A model with weights in bfloat16, sharded in a way or whole, its optimizer, and gradients that no way changes."""

    def __init__(self, way: Callable[[nn.Module], None] | None, method: str, **options: Any) -> None:
        self.whole, sharded, self.places = models(way or fsdp, dtype=torch.bfloat16)
        self.model = sharded if way else self.whole
        options = {**options_of(method), "weight_decay": 0.1, "scalar_lr": 1e-2, **options}
        self.optimizer = HybridAdaptiveMuon.from_model(self.model, **options)

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            if self.model is self.whole:
                for p in self.whole.parameters():
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            else:
                pairs = zip(self.whole.parameters(), self.model.parameters(), strict=True)
                set_gradients_of_both(pairs, self.places, generator)
            self.optimizer.step()

    def saved(self, flat: bool) -> dict[str, Any]:
        return states(self.model, self.optimizer, flat)

    def take(self, loaded: dict[str, Any], flat: bool) -> None:
        set_states(self.model, self.optimizer, loaded, flat)

    def load(self, place: Path, flat: bool) -> None:
        loaded = self.saved(flat)
        dcp.load(loaded, checkpoint_id=place)
        self.take(loaded, flat)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and state by name, whole."""
        found = {}
        for name, p in self.model.named_parameters():
            for key, value in {"weight": p, **self.optimizer.state[p]}.items():
                found[f"{name}.{key}"] = full(value).clone()
        return found


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """The share of the elements that differ, of each tensor of which any does; a dtype that differs is all of it."""
    assert one.keys() == other.keys()
    shares = {
        key: float((one[key] != other[key]).double().mean()) if one[key].dtype == other[key].dtype else 1.0
        for key in one
    }
    return {key: share for key, share in shares.items() if share}


@needs_directory
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize(("way", "less"), [(fsdp, "momentum"), (fsdp, "both"), (hsdp, "both")])
@pytest.mark.parametrize("method", ["namo", "adamuon"])
def test_training_goes_on(method: str, way: Callable[[nn.Module], None], less: str, flat: bool) -> None:
    """What was loaded is what was saved, to the bit. On as many ranks so is all that follows.

    On fewer ranks the momentum's bits are the same after steps more, and so is AdamW's part: both are elementwise, and
    only noise of the right step and place gives them. A weight differs where O did by a last bit.
    """
    place = Path(DIRECTORY or "") / f"less-{method}-{less}-{way.__name__}-{flat}"
    if dist.get_world_size() == 4:
        run = Run(way, method, **LESS[less])
        run.train(range(3))
        dcp.save(run.saved(flat), checkpoint_id=place)
        before = run.tensors()
        run.train(range(3, 5))
        if dist.get_rank() == 0:
            torch.save((before, run.tensors()), place / "uninterrupted.pt")
        else:
            run.tensors()
        dist.barrier()
    before, after = torch.load(place / "uninterrupted.pt")
    assert before["up.weight.momentum_buffer"].dtype == torch.bfloat16 and before["up.weight.step"] == 3
    for of_loaded in [way, None] if dist.get_world_size() == 1 else [way]:
        run = Run(of_loaded, method, **LESS[less])
        run.load(place, flat)
        assert not differing(run.tensors(), before)
        run.train(range(3, 5))
        apart = differing(run.tensors(), after)
        if dist.get_world_size() == 4:
            assert not apart
        may = {key for key in after if key.endswith((".weight", "moment2_buffer")) or "moment2_buffer_" in key}
        may = {key for key in may if key.removesuffix(".weight") + ".momentum_buffer" in after or "moment2" in key}
        assert apart.keys() <= may
        assert all(share < 0.1 for key, share in apart.items() if key.endswith(".weight"))


@needs_directory
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_a_checkpoint_without_a_count(flat: bool) -> None:
    """Torch names the key that the checkpoint lacks; what is loaded without the key starts at 2^20."""
    place = Path(DIRECTORY or "") / f"no-count-{flat}"
    if dist.get_world_size() == 4:
        run = Run(fsdp, "namo")
        run.train(range(2))
        dcp.save(run.saved(flat), checkpoint_id=place)
    run = Run(fsdp, "namo", **LESS["both"])
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\S*\.step"):
        run.load(place, flat)
    loaded = run.saved(flat)
    without_counts(loaded["optimizer"], run)
    dcp.load(loaded, checkpoint_id=place)
    try:
        run.take(loaded, flat)
    except KeyError:
        assert flat
        pytest.skip("torch 2.9 and older need every key of a flattened state")
    before = run.tensors()
    assert before["up.weight.step"] == 2**20 and before["up.weight.momentum_buffer"].any()
    run.train(range(2, 4))
    assert run.tensors()["up.weight.step"] == 2**20 + 2


def without_counts(of_optimizer: dict[str, Any], run: Run) -> None:
    """Leave out the counts of the matrices. AdamW's stay, as every checkpoint has them."""
    matrices = {name for name, p in run.model.named_parameters() if "momentum_buffer" in run.optimizer.state[p]}
    for name in matrices:
        of_optimizer.pop(f"state.{name}.step", None)
        of_optimizer.get("state", {}).get(name, {}).pop("step", None)
