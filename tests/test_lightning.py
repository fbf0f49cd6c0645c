# SPDX-License-Identifier: Apache-2.0
"""Lightning without NeMo, under both of its names: discovery, a resumed run, callbacks. tests/sharded has its ddp."""

import inspect
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_model import MATRICES, Model, names_of
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from emerging_optimizers.adaptive_muon import HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.moment2 import METHODS
from emerging_optimizers.adaptive_muon_discovery import lightning_callbacks


QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> ModuleType:
    return pytest.importorskip(request.param)


def callbacks_of(pl: ModuleType) -> ModuleType:
    return import_module(f"{pl.__name__}.callbacks")


# ---- discovery ----


def test_discovery_is_lightnings_entry_point() -> None:
    (found,) = entry_points(group="lightning.pytorch.callbacks_factory", name="adaptive_muon")
    assert found.load() is lightning_callbacks


def test_discovery_imports_nothing_where_nemo_is_not_in_use(pl: ModuleType) -> None:
    code = (
        f"import sys, {pl.__name__} as pl\n"
        "trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator='cpu')\n"
        "print([n for n in ('nemo', 'emerging_optimizers.adaptive_muon', 'absl') if n in sys.modules])\n"
        "print('emerging_optimizers.adaptive_muon_discovery' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    imported, looked = done.stdout.splitlines()[-2:]
    # pytorch_lightning looks into an entry point of its own. NeMo does not import it.
    assert (imported, looked) == ("[]", str(pl.__name__ == "lightning.pytorch"))
    assert "adaptive_muon" not in done.stderr


# ---- training ----


def module_of(pl: ModuleType, **options: Any) -> Any:
    """A module whose two groups have names, and whose optimizer has a scheduler."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = Model()

        def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten())

        validation_step = training_step

        def configure_optimizers(self) -> Any:
            body = {*self.model.blocks.parameters()}
            rest = [p for p in self.parameters() if p not in body]
            groups = [{"params": [*self.model.blocks.parameters()], "name": "body"}, {"params": rest, "name": "rest"}]
            optimizer = HybridAdaptiveMuon.from_model(self, lr=1e-2, params=groups, **options)
            return [optimizer], [{"scheduler": LinearLR(optimizer, total_iters=8), "interval": "step"}]

    return Module()


def loader() -> DataLoader[torch.Tensor]:
    """Four batches."""
    return DataLoader(torch.randint(13, (8, 6), generator=torch.Generator().manual_seed(0)), batch_size=2)  # type: ignore[arg-type]


def fit(pl: ModuleType, method: str, epochs: int, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    module = module_of(pl, moment2_method=method)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks],
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=bool(callbacks),
        **QUIET,
    )
    # Where there is no validation, Lightning 2.4 trains on a batch once more after it has loaded an epoch's checkpoint.
    trainer.fit(module, loader(), loader(), **options)
    (optimizer,) = trainer.optimizers
    return module, optimizer


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one(pl: ModuleType, method: str, tmp_path: Path) -> None:
    saver = callbacks_of(pl).ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    start = module_of(pl)
    whole, expected = fit(pl, method, 2, saver)
    # Lightning 2.6 passes it to torch.load. Earlier ones load all kinds of objects.
    safe = {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
    torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    resumed, optimizer = fit(pl, method, 2, ckpt_path=tmp_path / "epoch=0.ckpt", **safe)
    assert {int(state["step"]) for state in optimizer.state.values() if "step" in state} == {8}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)  # the schedule went on, to its end
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], expected.state_dict()["state"], rtol=0, atol=0)
    assert all(not torch.equal(p, q) for p, q in zip(start.parameters(), whole.parameters(), strict=True))
    assert names_of(optimizer, True) == {f"model.{name}" for name in MATRICES}


# ---- callbacks ----


def test_the_monitor_of_learning_rates_takes_both_halves(pl: ModuleType, tmp_path: Path) -> None:
    monitor = callbacks_of(pl).LearningRateMonitor("step")
    logger = import_module(f"{pl.__name__}.loggers").CSVLogger(tmp_path)
    options = {"enable_checkpointing": False, "log_every_n_steps": 1, **QUIET}
    pl.Trainer(max_epochs=1, logger=logger, callbacks=[monitor], **options).fit(module_of(pl), loader())
    halves = {f"lr-HybridAdaptiveMuon/{name}" for name in ("body/adaptive_muon", "body/adamw", "rest")}
    assert halves <= monitor.lrs.keys()


def test_what_is_unfrozen_is_added(pl: ModuleType) -> None:
    model = Model()
    model.blocks[1].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = HybridAdaptiveMuon.from_model(model, params=trained)
    extra = nn.Linear(8, 8)  # not of the model that the optimizer knows
    for part in (model.blocks[1], extra):
        callbacks_of(pl).BaseFinetuning.unfreeze_and_add_param_group(part, optimizer, lr=0.5)
    assert {f"blocks.1.{n}.weight" for n in ("query", "out_proj")} | {"added.4.0"} <= names_of(optimizer, True)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    optimizer.step()
