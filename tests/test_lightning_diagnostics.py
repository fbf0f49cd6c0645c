# SPDX-License-Identifier: Apache-2.0
"""Lightning's loggers get what the optimizer has measured: files of real ones, read back."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


pytest.importorskip("lightning.pytorch", reason="needs pip install lightning")

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from emerging_optimizers.adaptive_muon import AdaptiveMuon, HybridAdaptiveMuon
from emerging_optimizers.adaptive_muon.integrations.lightning import AdaptiveMuonDiagnostics


class Wandb(Logger):
    """What a logger such as Weights & Biases' gets."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name, version = "wandb", 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Takes nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keeps the metrics."""
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def of_muon(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, row) for step, row in self.rows if any(key.startswith("adaptive_muon") for key in row)]


class Model(pl.LightningModule):
    """Three layers."""

    def __init__(self, make: Any = None, **options: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
        self.make, self.options = make, options

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Returns the loss."""
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer, made with names."""
        if self.make is None:
            return HybridAdaptiveMuon.from_model(self, params=self.named_parameters(), **self.options)
        return self.make([p for p in self.parameters() if p.ndim == 2], **self.options)


def fit(model: Model, *callbacks: pl.Callback, steps: int = 12, loggers: Any = (), **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=[*loggers], callbacks=[*callbacks], **quiet, **options
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(64, 5), batch_size=4))
    return trainer


def test_files_of_real_loggers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    model = Model(diagnostics_every=4, moment2_method="namo_d")
    trainer = fit(model, AdaptiveMuonDiagnostics("all"), loggers=loggers, log_every_n_steps=4)
    shown = trainer.optimizers[0].diagnostics()
    assert shown["net.0.weight"]["step"] == 12
    summary = trainer.optimizers[0].diagnostics_summary()
    with (Path(loggers[0].log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("adaptive_muon/matrices")]
    assert [int(row["step"]) for row in rows] == [3, 7, 11]
    for name, value in summary.items():
        assert float(rows[-1][name]) == pytest.approx(value)
    assert float(rows[-1]["adaptive_muon/update_ratio/net.2.weight"]) == pytest.approx(
        shown["net.2.weight"]["update_ratio"]
    )
    events = EventAccumulator(loggers[1].log_dir).Reload()
    scalars = events.Scalars("adaptive_muon/clamped/median")
    assert [each.step for each in scalars] == [3, 7, 11]
    assert scalars[-1].value == pytest.approx(summary["adaptive_muon/clamped/median"])
    assert [each.step for each in events.Scalars("loss")] == [3, 7, 11]  # side by side with Lightning's own


@pytest.mark.parametrize(
    ("matrices", "single"),
    [("summary", set()), ("all", {f"net.{i}.weight" for i in (0, 2, 4)}), (["net.2*"], {"net.2.weight"}), ([], set())],
)
def test_which_matrices(matrices: Any, single: set[str]) -> None:
    wandb = Wandb()
    fit(Model(diagnostics_every=2), AdaptiveMuonDiagnostics(matrices), loggers=[wandb], log_every_n_steps=2, steps=2)
    [(step, row)] = wandb.of_muon()
    assert step == 1
    assert {key.split("/")[-1] for key in row if key.startswith("adaptive_muon/cosine/")} == single | {
        "min",
        "10%",
        "median",
        "90%",
        "max",
    }


@pytest.mark.parametrize("make", [AdaptiveMuon, HybridAdaptiveMuon])
@pytest.mark.parametrize("batches", [1, 2])
def test_only_what_is_new_and_only_when_the_trainer_logs(make: Any, batches: int) -> None:
    """A reading of every third step, a trainer that logs every second one; with accumulated gradients also."""
    wandb = Wandb()
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": batches, "max_epochs": 10}
    trainer = fit(Model(make, diagnostics_every=3), AdaptiveMuonDiagnostics(), loggers=[wandb], steps=12, **options)
    assert trainer.global_step == 12
    assert [step for step, _ in wandb.of_muon()] == [3, 5, 9, 11]  # of steps 3, 6, 9 and 12


class TwoOptimizers(Model):
    """Two optimizers that step in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        """Returns one for the first layer, and one for the others."""
        first, *others = [p for p in self.parameters() if p.ndim == 2]
        options = {"moment2_method": "namo", "diagnostics_every": 1}
        return AdaptiveMuon([first], **options), AdaptiveMuon(others, **options)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Steps both."""
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss


@pytest.mark.parametrize("every", [2, 3])
def test_several_optimizers_are_written_beside_the_trainers_own_metrics(every: int) -> None:
    logger = Wandb()
    fit(TwoOptimizers(), AdaptiveMuonDiagnostics(), steps=24, loggers=[logger], log_every_n_steps=every)
    own = [step for step, row in logger.rows if "loss" in row]
    assert own == [*range(every - 1, 12, every)]
    for number in range(2):
        rows = [step for step, row in logger.rows if any(key.startswith(f"adaptive_muon_{number}/") for key in row)]
        assert rows == own


def test_the_one_that_is_always_there_stands_back() -> None:
    wandb = Wandb()
    own, always = AdaptiveMuonDiagnostics("all"), AdaptiveMuonDiagnostics(required=False)
    fit(Model(diagnostics_every=2), own, always, loggers=[wandb], log_every_n_steps=2, steps=4)
    assert [step for step, _ in wandb.of_muon()] == [1, 3]
    fit(Model(), always, loggers=[wandb], log_every_n_steps=2, steps=4)
    assert len(wandb.of_muon()) == 2


def test_errors() -> None:
    with pytest.raises(
        ValueError, match="must have an optimizer made with diagnostics_every, got .*Pass diagnostics_every"
    ):
        fit(Model(), AdaptiveMuonDiagnostics(), steps=1)
    for bad in ("some", 3, [4]):
        with pytest.raises(ValueError, match='matrices must be "summary", "all" or a list of name patterns'):
            AdaptiveMuonDiagnostics(bad)  # type: ignore[arg-type]


def test_from_yaml_and_in_the_package_that_the_program_uses() -> None:
    """Hydra and LightningCLI name the class; a program may use either package of Lightning's classes."""
    hydra = pytest.importorskip("hydra.utils")
    target = "emerging_optimizers.adaptive_muon.integrations.lightning.AdaptiveMuonDiagnostics"
    made = hydra.instantiate({"_target_": target, "matrices": "all"})
    assert isinstance(made, AdaptiveMuonDiagnostics) and isinstance(made, pl.Callback)
    pytest.importorskip("pytorch_lightning")
    code = (
        "import pytorch_lightning as pl\n"
        "from emerging_optimizers.adaptive_muon.integrations.lightning import AdaptiveMuonDiagnostics\n"
        "print(issubclass(AdaptiveMuonDiagnostics, pl.Callback))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split()[-1] == "True"
