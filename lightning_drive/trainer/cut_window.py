"""The window of gradual pruning: the epochs in which cuts are due, and checks that a run reaches its end."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_drive.core import saved_values
from lightning_drive.trainer import restored_masks, step_counts
from lightning_drive.trainer.checks import SettingsError

_DENSE_EPOCHS = 2
"""Epochs of dense training before the window, where the window is long enough."""


class CutWindow(NamedTuple):
    """The epochs in which a network is pruned little by little, at equal distances.

    Examples:
        >>> window = CutWindow(2, 10, cuts_per_epoch=4)
        >>> window.num_cuts, window.num_due(3, batch=50, num_batches=100), window.num_due(12, batch=0, num_batches=100)
        (32, 6, 32)

    """

    start: int
    """The epoch at whose start the window begins; the first cut is at the end of the first part."""
    end: int
    """The epoch at whose start the last cut is due."""
    cuts_per_epoch: int

    @classmethod
    def of(cls, start: int | None, end: int | None, cuts_per_epoch: int, max_epochs: int) -> "CutWindow":
        """Return the window for a run of ``max_epochs``, -1 without end; raise a ``ValueError`` if it has no place."""
        if end is None and max_epochs < 0:
            raise ValueError(
                "`end_epoch=None` is two thirds of `max_epochs`, but the number of epochs of the run is not known. Set"
                " `end_epoch`, or `max_epochs`."
            )
        known_end = max(1, round(2 * max_epochs / 3)) if end is None else end
        known_start = min(_DENSE_EPOCHS, known_end // 2) if start is None else start
        if known_start >= known_end:
            of_run = f" (two thirds of max_epochs={max_epochs})" if end is None else ""
            raise ValueError(
                f"Pruning begins with `start_epoch` and is over at `end_epoch`, so `start_epoch` must be less than"
                f" {known_end}{of_run}, got start_epoch={known_start}. Lower `start_epoch`, or set a later `end_epoch`."
            )
        return cls(known_start, known_end, cuts_per_epoch)

    @classmethod
    def saved(cls, settings: Mapping[str, Any]) -> "CutWindow":
        """Return the window in the settings of a checkpoint; raise a ``ValueError`` if they are damaged."""
        what = "in the settings of the checkpoint's callback state"
        names = ("start_epoch", "end_epoch", "cuts_per_epoch")
        return cls(*(saved_values.check(int, settings.get(name), f"`{name}` {what}") for name in names))

    @property
    def num_cuts(self) -> int:
        """The number of cuts."""
        return (self.end - self.start) * self.cuts_per_epoch

    def num_due(self, epoch: int, batch: int, num_batches: float) -> int:
        """Return how many cuts are due before a batch, counted from 0, of an epoch of ``num_batches``."""
        within = batch * self.cuts_per_epoch // num_batches if batch else 0
        return min(max(0, (epoch - self.start) * self.cuts_per_epoch + int(within)), self.num_cuts)

    def __str__(self) -> str:
        return f"start_epoch={self.start}, end_epoch={self.end}, cuts_per_epoch={self.cuts_per_epoch}"


def of_run(pruning: Any, trainer: pl.Trainer, max_epochs: int) -> CutWindow:
    """Return the window of a callback in a run; raise if it does not fit into ``max_epochs``, -1 for no end."""
    if step_counts.is_quick_check(trainer):
        return CutWindow(0, 1, 1)
    try:
        window = CutWindow.of(pruning.start_epoch, pruning.end_epoch, pruning.cuts_per_epoch, max_epochs)
    except ValueError as error:
        raise MisconfigurationException(f"{type(pruning).__name__}: {error}") from error
    check_epochs(pruning, window, max_epochs)
    return window


def num_due(trainer: pl.Trainer, window: CutWindow) -> int:
    """Return how many cuts are due now; where gradients are accumulated, as many as were due when that began."""
    epoch = trainer.current_epoch
    batch = step_counts.batch_index(trainer) if window.start <= epoch < window.end else 0
    batch -= batch % trainer.accumulate_grad_batches
    return window.num_due(epoch, batch, trainer.num_training_batches)


def check_epochs(pruning: pl.Callback, window: CutWindow, max_epochs: int) -> None:
    """Raise if training ends before the last cut, or with it."""
    if 0 <= max_epochs <= window.end:
        raise SettingsError(
            f"{type(pruning).__name__}({window}) prunes for the last time at the start of epoch {window.end} (counted"
            f" from 0), but training ends after max_epochs={max_epochs} epochs, so it would never reach its sparsity."
            " Raise `max_epochs` or lower `end_epoch`."
        )


def check_training(pruning: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule, window: CutWindow) -> None:
    """Raise, once data are loaded, if steps end before the last cut, or the cuts within an epoch have no place."""
    steps = sum(step_counts.steps_per_epoch(trainer, epoch) for epoch in range(window.end))
    if math.isinf(steps):
        if window.cuts_per_epoch > 1:
            raise MisconfigurationException(
                f"{type(pruning).__name__}(cuts_per_epoch={window.cuts_per_epoch}) cuts at equal distances within an"
                " epoch, but the training data have no known length. Set `limit_train_batches` to the number of"
                " batches of an epoch, or `cuts_per_epoch=1`."
            )
        return
    is_known = pl_module.automatic_optimization  # else a batch may have any number of steps
    if is_known and 0 <= trainer.max_steps <= steps:
        raise MisconfigurationException(
            f"{type(pruning).__name__}({window}) prunes for the last time after {steps:g} steps, but training ends"
            f" after max_steps={trainer.max_steps}, so it would never reach its sparsity. Raise `max_steps` or lower"
            " `end_epoch`."
        )


def check_settings(cut: int, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise if cuts are left and settings differ, but for the ends of the window that are ``None`` now."""
    if cut >= CutWindow.saved(then).num_cuts:
        return
    before, after = restored_masks.other_settings(then, now)
    if before:
        raise ValueError(
            f"The checkpoint is from cut {cut} of gradual pruning with {before}, but this callback has {after}: its"
            " cuts would not continue that run. Resume with the settings of the checkpoint."
        )
