# SPDX-License-Identifier: Apache-2.0
"""Training goes on from Megatron's checkpoints as if it had not stopped, also at another tensor-parallel size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from models import gpt, optimizer_of, parallel, train
from side_by_side import each_method
from torch import distributed as dist

from emerging_optimizers.adaptive_muon.integrations.megatron import register


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that all processes share."""
    paths = [tmp_path]
    dist.broadcast_object_list(paths)
    return paths[0]


def sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    of_model = model.module.sharded_state_dict(metadata=metadata)
    return {
        "model": of_model,
        "optimizer": optimizer.sharded_state_dict(of_model, is_loading=is_loading, metadata=metadata),
    }


@each_method
def test_torch_dist(method: str, folder: Path) -> None:
    with parallel(2):
        model = gpt()
        optimizer = optimizer_of(model, method)
        train(model, optimizer, range(3))
        dist_checkpointing.save(sharded_state(model, optimizer, is_loading=False), str(folder))
        expected = train(model, optimizer, range(3, 8))
    for tp in 1, 2, 4:
        with parallel(tp):
            model = gpt()
            optimizer = optimizer_of(model, method)
            loaded = dist_checkpointing.load(sharded_state(model, optimizer, is_loading=True), str(folder))
            model.module.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])
            assert train(model, optimizer, range(3, 8)) == pytest.approx(expected, rel=1e-5)
