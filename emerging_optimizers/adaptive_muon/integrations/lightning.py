# SPDX-License-Identifier: Apache-2.0
"""Lightning: a callback that writes the optimizer's diagnostics to the trainer's loggers."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from emerging_optimizers.adaptive_muon.checks import require
from emerging_optimizers.adaptive_muon.diagnostics.face import Diagnosed
from emerging_optimizers.adaptive_muon.diagnostics.summary import PREFIX, Matrices, check_matrices, flat


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    # There are two packages of the same classes. The one that the program has imported is the one it uses.
    _names = ("lightning.pytorch", "pytorch_lightning")
    Callback = importlib.import_module(next((name for name in _names if name in sys.modules), _names[0])).Callback

__all__ = ["AdaptiveMuonDiagnostics"]


class AdaptiveMuonDiagnostics(Callback):
    """Writes what AdaptiveMuon has measured to all loggers of a Trainer, of the matrices that its first rank holds.

    It writes at the steps at which the Trainer logs (``log_every_n_steps``), if something was measured since it wrote
    last. The optimizer must be made with ``diagnostics_every``; the same number is best. Nothing waits for the device
    in other steps.

    Args:
        matrices: "summary" for quantiles over the matrices; "all" for the values of each one beside; or a list of
            patterns of names (as in ``fnmatch``) for those of some.
        required: Whether an optimizer that measures is required. If not, the callback does nothing without one, or beside
            another callback of this class.

    Raises:
        ValueError: If ``matrices`` is none of these; and when training starts, if no optimizer measures.
    """

    def __init__(self, matrices: Matrices = "summary", *, required: bool = True) -> None:
        check_matrices(matrices)
        self._matrices, self._required = matrices, required
        self._written: dict[int, int] = {}  # the last step that was written of each optimizer
        self._seen = 0  # the Trainer's global_step after the last batch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that an optimizer measures."""
        self._written, self._seen = {}, trainer.global_step
        others = [each for each in trainer.callbacks if isinstance(each, AdaptiveMuonDiagnostics) and each is not self]
        self._stands_back = not self._required and bool(others)
        require(
            not self._required or self._optimizers(trainer),
            "AdaptiveMuonDiagnostics must have an optimizer made with diagnostics_every",
            [type(each).__name__ for each in trainer.optimizers],
            "Pass diagnostics_every=50 to AdaptiveMuon or HybridAdaptiveMuon, or remove the callback.",
        )

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Write what is new, at the steps at which the Trainer logs."""
        every, seen = trainer.log_every_n_steps, self._seen
        self._seen = trainer.global_step
        # What Lightning's own metrics are counted by: global_step counts the steps of every optimizer.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if self._stands_back or not trainer.is_global_zero or not every or (step + 1) % every:
            return
        if self._seen == seen:  # a batch whose gradients are accumulated
            return
        optimizers = self._optimizers(trainer)
        for number, optimizer in enumerate(optimizers):
            newest = optimizer.diagnostics_store.newest
            if not newest or (newest == self._written.get(number) and not optimizer.diagnostics_store.on_device):
                continue
            self._written[number] = newest
            prefix = PREFIX if len(optimizers) == 1 else f"{PREFIX}_{number}"
            metrics = flat(optimizer.diagnostics(), self._matrices, prefix)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    @staticmethod
    def _optimizers(trainer: Any) -> list[Any]:
        """Return the optimizers that measure."""
        # A LightningOptimizer's, or a wrapper's.
        inner = [getattr(each, "optimizer", each) for each in trainer.optimizers]
        return [each for each in inner if isinstance(each, Diagnosed) and each.diagnostics_store is not None]
