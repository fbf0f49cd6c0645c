# SPDX-License-Identifier: Apache-2.0
"""Models that DistributedDataParallel wraps, or Lightning's ddp: their replicas share the work by themselves."""

import copy
import pickle
from importlib import import_module
from typing import Any

import pytest
import torch
from models import Model, train
from pieces import OPTIONS, collectives
from torch import distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS


# Lightning under both of its names, and the package that each is built on.
FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
several = pytest.mark.skipif("os.environ['WORLD_SIZE'] == '1'", reason="one process has no replicas")


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def optimizer_of(wrapped: nn.Module, **options: Any) -> HybridAdaptiveMuon:
    return HybridAdaptiveMuon.from_model(wrapped, **{**OPTIONS, "scalar_lr": 1e-3, **options})


def stepped(optimizer: HybridAdaptiveMuon) -> dict[str, int]:
    """The collectives of a step that is not the first."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    return dict(collectives(optimizer.step))


@pytest.mark.parametrize("method", METHODS)
def test_training_under_ddp(method: str) -> None:
    wrapped = [DistributedDataParallel(model()) for _ in range(2)]
    optimizers = [
        optimizer_of(each, moment2_method=method, share_replicas=share)
        for each, share in zip(wrapped, (True, False), strict=True)
    ]
    losses = [train(each, optimizer, range(4)) for each, optimizer in zip(wrapped, optimizers, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for p, q in zip(*(each.parameters() for each in wrapped), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4 if method == "adamuon" else 1e-6, rtol=1e-4)


@several
def test_the_work_is_shared_described_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The matrices: 8 x 12, 12 x 6, 6 x 16 and 16 x 3."""
    caplog.set_level("INFO", "absl")
    size = dist.get_world_size()
    shared, alone = (optimizer_of(DistributedDataParallel(model()), share_replicas=share) for share in (True, False))
    assert f"; 4 shared by {size} replicas" in shared.describe(each=False).splitlines()[0]
    assert "shared" not in alone.describe()
    assert stepped(shared) == {"c10d::_allgather_base_": 1} and not stepped(alone)
    lines = [record.getMessage() for record in caplog.records if "shared by" in record.getMessage()]
    assert lines == [f"adaptive_muon: 4 parameters are shared by {size} replicas"]
    work = []
    for optimizer in (shared, alone):
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        work.append(torch.tensor(counter.get_total_flops()))
    dist.all_reduce(work[0])
    assert work[0] == work[1]


@several
def test_parts_and_compiled_models() -> None:
    """DDP around a part, and around all of a model that torch.compile wraps again."""
    part = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False))
    part[0] = DistributedDataParallel(part[0])
    assert "1 shared" in optimizer_of(part).describe()
    assert "4 shared" in optimizer_of(torch.compile(DistributedDataParallel(model()))).describe()


def ignored() -> DistributedDataParallel:
    made = model()
    names = [name for name, _ in made.named_parameters() if name != "up.weight"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(made, names)
    return DistributedDataParallel(made)


@several
def test_what_ddp_ignores_is_a_ranks_own() -> None:
    assert "1 shared by" in optimizer_of(ignored()).describe()


@several
@pytest.mark.parametrize(
    ("hook", "shared"),
    [
        (default_hooks.allreduce_hook, True),
        (default_hooks.bf16_compress_hook, True),
        (debugging_hooks.noop_hook, False),
        (lambda state, bucket: default_hooks.allreduce_hook(None, bucket), False),
    ],
    ids=["allreduce", "bf16", "noop", "own"],
)
def test_hooks_that_may_leave_gradients_different(hook: Any, shared: bool) -> None:
    wrapped = DistributedDataParallel(model())
    wrapped.register_comm_hook(None, hook)
    assert ("shared by" in optimizer_of(wrapped).describe()) is shared


def test_what_the_user_passes_wins(group: ProcessGroup) -> None:
    assert "shared" not in optimizer_of(DistributedDataParallel(model()), replica_group=None).describe()
    plain = optimizer_of(model(), replica_group=group)
    assert ("shared by" in plain.describe()) is (group.size() > 1)


def test_the_function_knows_the_wrapped_parameters() -> None:
    wrapped = DistributedDataParallel(model())
    optimizer = optimizer_of(wrapped)
    group_of = optimizer._muon.options.replica_group
    if dist.get_world_size() == 1:
        assert group_of is None and pickle.loads(pickle.dumps(optimizer)).routes
        return
    assert callable(group_of) and group_of(wrapped.module.up.weight) is wrapped.process_group
    assert group_of(nn.Parameter(torch.ones(3, 4))) is None


@several
@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("name", FABRIC)
def test_lightning(name: str, exactly: bool) -> None:
    """Its module, not DDP's wrapper of it, makes the optimizer."""
    lightning = pytest.importorskip(name)
    DDPStrategy = import_module(f"{name}.strategies").DDPStrategy

    class Derived(DDPStrategy):  # type: ignore[misc, valid-type]
        """Such as one that shards the model too."""

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model()

        def training_step(self, tokens: torch.Tensor, _: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model(tokens), tokens % 3)

        def configure_optimizers(self) -> HybridAdaptiveMuon:
            self.made = optimizer_of(self)
            return self.made

    trainer = lightning.Trainer(
        strategy=DDPStrategy() if exactly else Derived(),
        accelerator="cpu",
        devices=dist.get_world_size(),
        plugins=[import_module(f"{FABRIC[name]}.plugins.environments").TorchElasticEnvironment()],
        max_steps=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    alone = copy.deepcopy(module.model)
    tokens = [torch.randint(11, (16,), generator=torch.Generator().manual_seed(step)) for step in range(2)]
    trainer.fit(module, DataLoader(torch.cat(tokens), batch_size=16))  # type: ignore[arg-type]
    assert ("4 shared by" in module.made.describe()) is exactly
    train(alone, optimizer_of(alone), range(2))
    for p, q in zip(module.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
