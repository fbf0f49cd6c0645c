# SPDX-License-Identifier: Apache-2.0
"""Trains the model once with one method, and measures what the table and the plot show."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gpt import GPT, Shape
from methods import METHODS
from text import random_windows, spaced_windows
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        steps: Training steps.
        batch: Windows a step.
        warmup: Share of the steps in which the rate rises from zero; it then falls to zero in a straight line.
        clip: Largest norm of the whole gradient.
        evaluations: Times the held-out text is evaluated, the last after the last step.
        evaluation_windows: Windows of held-out text an evaluation reads.
        shape: The model's sizes.
    """

    steps: int = 300
    batch: int = 8
    warmup: float = 0.1
    clip: float = 1.0
    evaluations: int = 20
    evaluation_windows: int = 64
    shape: Shape = field(default_factory=Shape)

    def rate_factor(self, step: int) -> float:
        """Returns what the learning rate is multiplied by at a step counted from zero."""
        rising = max(1, round(self.warmup * self.steps))
        return min((step + 1) / rising, (self.steps - step) / max(1, self.steps - rising))

    @staticmethod
    def tail(steps: int) -> int:
        """Returns over how many of the last steps the train loss is averaged: one batch alone is noisy."""
        return max(1, steps // 20)

    def evaluated_steps(self) -> set[int]:
        """Returns after which numbers of steps the held-out text is evaluated."""
        return {max(1, round(self.steps * k / self.evaluations)) for k in range(1, self.evaluations + 1)}


# What the second figure shows of the optimizer's diagnostics.
SHOWN = ("cosine", "update_ratio")


@dataclass
class Record:
    """What one training run measured.

    Attributes:
        method: Its name.
        lr: Peak learning rate of the hidden matrices.
        scalar_lr: Peak learning rate of all else.
        parameters: How many numbers are trained.
        train_losses: Loss of each step's batch before the step, in nats per byte.
        steps: After how many steps the held-out text was evaluated.
        losses: Its loss then, in nats per byte.
        seconds: Training time until then, evaluation left out.
        step_ms: Median time of a training step.
        optimizer_ms: Median of the part of it that the optimizer takes.
        state_bytes_per_parameter: Size of the optimizer's state tensors.
        measured_steps: The steps of which AdaptiveMuon measured its matrices.
        measured: For each of SHOWN, and each matrix, its value in these steps.
    """

    method: str
    lr: float
    scalar_lr: float
    parameters: int = 0
    train_losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_ms: float = 0.0
    optimizer_ms: float = 0.0
    state_bytes_per_parameter: float = 0.0
    measured_steps: list[int] = field(default_factory=list)
    measured: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def final_train_loss(self) -> float:
        """The mean over the last twentieth of the steps."""
        return statistics.fmean(self.train_losses[-Protocol.tail(len(self.train_losses)) :])

    @property
    def final_loss(self) -> float:
        """The loss of the held-out text after the last step."""
        return self.losses[-1]

    def first_step_at(self, loss: float) -> int | None:
        """Returns the first evaluated step at which the held-out loss was as low as this, or None."""
        return next((step for step, value in zip(self.steps, self.losses, strict=True) if value <= loss), None)


def train(
    method: str,
    train_text: Tensor,
    held_out_text: Tensor,
    *,
    lr: float,
    scalar_lr: float,
    protocol: Protocol,
    seed: int,
    device: str = "cpu",
    show: bool = True,
    changes: Mapping[str, Any] | None = None,
    make_model: Callable[[Shape, int], GPT] = GPT,
) -> Record:
    """Trains from the initial weights of this seed, on the batches of this seed: both the same for every method.

    Args:
        method: A key of METHODS.
        train_text: Bytes to learn from.
        held_out_text: Bytes to evaluate on.
        lr: Peak learning rate of the hidden matrices.
        scalar_lr: Peak learning rate of all else.
        protocol: What all methods have in common.
        seed: Chooses the initial weights and the batches.
        device: "cpu" or "cuda".
        show: Whether to draw a progress bar.
        changes: Settings in which the run differs from the method's.
        make_model: Makes the model from its shape and the seed.
    """
    model = make_model(protocol.shape, seed).to(device)
    chosen = METHODS[method]
    every = max(1, protocol.steps // protocol.evaluations)
    measuring = {"diagnostics_every": every} if "moment2_method" in chosen.settings else {}
    settings = chosen.settings | measuring | (changes or {})
    optimizers = replace(chosen, settings=settings).optimizers(model, lr, scalar_lr)
    schedules = [LambdaLR(optimizer, protocol.rate_factor) for optimizer in optimizers]
    batches = _batches(train_text, protocol, torch.Generator().manual_seed(seed), device)
    held_out = spaced_windows(held_out_text, protocol.evaluation_windows, protocol.shape.context + 1).to(device)
    clock = _clock(device)
    record = Record(method, lr, scalar_lr, parameters=sum(p.numel() for p in model.parameters()))
    step_times, optimizer_times = [], []

    bar = tqdm(batches, desc=f"{method:8}", total=protocol.steps, disable=not show, unit="step")
    for step, windows in enumerate(bar, start=1):
        begin = clock()
        model.zero_grad()
        with _precision(device):
            loss = model.loss(windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), protocol.clip)
        before_optimizer = clock()
        for optimizer in optimizers:
            optimizer.step()
        end = clock()
        for schedule in schedules:
            schedule.step()

        step_times.append(end - begin)
        optimizer_times.append(end - before_optimizer)
        record.train_losses.append(loss.item())
        if measuring and step % every == 0:
            _read(record, step, optimizers)
        if step in protocol.evaluated_steps():
            record.steps.append(step)
            with _precision(device):
                record.losses.append(_evaluate(model, held_out, protocol.batch))
            record.seconds.append(sum(step_times))
            bar.set_postfix(train=f"{record.final_train_loss:.3f}", held_out=f"{record.final_loss:.3f}")

    record.step_ms = 1e3 * statistics.median(step_times)
    record.optimizer_ms = 1e3 * statistics.median(optimizer_times)
    record.state_bytes_per_parameter = sum(map(_state_bytes, optimizers)) / record.parameters
    return record


def _read(record: Record, step: int, optimizers: list[Optimizer]) -> None:
    """Adds to a record what AdaptiveMuon has measured in a step."""
    record.measured_steps.append(step)
    for optimizer in optimizers:
        for matrix, row in optimizer.diagnostics().items():
            for value in SHOWN:
                record.measured.setdefault(value, {}).setdefault(matrix, []).append(row[value])


def _precision(device: str) -> torch.autocast:
    """On a GPU the model's products are in bfloat16, as usual; on a CPU in float32."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda"))


def _batches(text: Tensor, protocol: Protocol, generator: torch.Generator, device: str) -> Iterator[Tensor]:
    for _ in range(protocol.steps):
        yield random_windows(text, protocol.batch, protocol.shape.context + 1, generator).to(device)


@torch.no_grad()
def _evaluate(model: GPT, windows: Tensor, batch: int) -> float:
    total = sum(len(part) * model.loss(part).item() for part in windows.split(batch))
    return total / len(windows)


def _state_bytes(optimizer: Optimizer) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _clock(device: str) -> Callable[[], float]:
    """Returns a function that tells the time once the device has done all it was given."""

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    return now
