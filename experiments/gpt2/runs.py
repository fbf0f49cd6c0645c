# SPDX-License-Identifier: Apache-2.0
"""Which runs there are, and which of them can be made now, given what came of those that are done.

First AdamW's learning rates, since its best also trains the embeddings and norms of all other methods; then the
others' rates; then each method at its best rate with other seeds; and of NAMO and NAMO-D variants at the same rate.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protocol import METHODS
from results import Results


__all__ = ["SEEDS", "VARIANTS", "Run", "due"]

TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5, 6)

# What may make NAMO better, taken from it one at a time. Its own: adaptive decay, corrected bias.
VARIANTS: dict[str, dict[str, Any]] = {
    "decoupled decay": {"weight_decay_method": "decoupled"},
    "cautious decay": {"weight_decay_method": "cautious"},
    "no decay": {"weight_decay": 0.0},
    "bias not corrected": {"bias_correction": False},
}
VARIED = ("namo", "namo_d")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        stage: "sweep", whose losses are the tuning text's, or "report", whose losses are the validation text's.
        method: A key of METHODS.
        variant: A key of VARIANTS, or "" for the method as it is.
        lr: Peak learning rate of the hidden matrices.
        scalar_lr: Peak learning rate of all else.
        seed: Chooses the initial weights and the batches.
    """

    stage: str
    method: str
    variant: str
    lr: float
    scalar_lr: float
    seed: int

    @property
    def changes(self) -> Mapping[str, Any]:
        """The settings in which the run differs from the method's."""
        return VARIANTS[self.variant] if self.variant else {}

    @property
    def key(self) -> str:
        """What tells it from all others."""
        name = f"{self.method}, {self.variant}" if self.variant else self.method
        return f"{self.stage}: {name}, lr {self.lr:g}, scalar_lr {self.scalar_lr:g}, seed {self.seed}"


def due(results: Results, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Returns the runs that are not done and need no result that is not there.

    Args:
        results: What came of the runs so far.
        seeds: The seeds of the runs that are reported.
    """
    wanted = list(_untried(results, "adamw"))
    if not wanted:
        scalar_lr = results.best("adamw")
        for method in METHODS:
            untried = list(_untried(results, method, scalar_lr))
            wanted += untried or _reported(method, results.best(method), scalar_lr, seeds)
    return [run for run in wanted if run.key not in results]


def _untried(results: Results, method: str, scalar_lr: float | None = None) -> Iterator[Run]:
    """The rates still to be tried: the first five, then those beyond the end where the best is."""
    tried = {f"{lr:g}" for lr in results.tuning_losses(method)}
    rates = [lr for lr in METHODS[method].rates if f"{lr:g}" not in tried] or _beyond(results.tuning_losses(method))
    for lr in rates:
        yield Run("sweep", method, "", lr, scalar_lr or lr, TUNING_SEED)


def _beyond(losses: Mapping[float, float]) -> list[float]:
    """The next rate where the best of those tried is the lowest or the highest of them."""
    best = min(losses, key=losses.__getitem__)
    return [best / 2] if best == min(losses) else [best * 2] if best == max(losses) else []


def _reported(method: str, lr: float, scalar_lr: float, seeds: Sequence[int]) -> list[Run]:
    """A method at its best rate, and its variants there."""
    variants = ["", *(VARIANTS if method in VARIED else ())]
    return [Run("report", method, variant, lr, scalar_lr, seed) for variant in variants for seed in seeds]
