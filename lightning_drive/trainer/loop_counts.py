"""Correct Lightning's counts of epochs and batches for runs that are saved or stopped while masks are searched for."""

from typing import Any

import lightning.pytorch as pl

from lightning_drive.trainer import lightning_internals
from lightning_drive.trainer.lightning_internals import Counts


def begin_epoch_again(trainer: pl.Trainer) -> None:
    """Have a checkpoint that is saved at the start of an epoch, after an exception, resume with all of that epoch.

    Scoring takes its time there, so there is where an interrupt falls. The Trainer counts batches from the last epoch
    on until the new one gets its first, so it would find next to nothing left to do in it; and an epoch that it takes
    for one that was under way gets no step of ``ReduceLROnPlateau``.
    """
    counts = lightning_internals.counts(trainer)
    _begin_epoch_again(counts)
    lightning_internals.set_counts(trainer, counts)


def begin_saved_epoch_again(checkpoint: dict[str, Any]) -> None:
    """Do the same as :func:`begin_epoch_again` in a checkpoint that is being saved while training goes on."""
    _begin_epoch_again(lightning_internals.counts_in(checkpoint))


def _begin_epoch_again(counts: Counts) -> None:
    """Count as before an epoch, if it has not reached its first batch."""
    epochs, batches = counts
    if epochs["total"]["started"] < epochs["total"]["ready"]:
        for part in epochs.values():
            part["ready"] = part["started"]
        batches["current"], batches["is_last_batch"] = dict.fromkeys(batches["current"], 0), False


def begin_batch_again(trainer: pl.Trainer) -> None:
    """Have a run that was saved or stopped before a batch of an epoch go on with that batch; for ``on_train_start``.

    Scoring takes its time there, too. The Trainer takes back, in the counts of the epoch, what it fetched and did not
    train on, but neither in its total nor in whether it was the last batch: it would leave that one out.
    """
    counts = lightning_internals.counts(trainer)
    current = counts.batches["current"]
    if current["ready"] > current["processed"] >= current["started"]:
        for part in (counts.batches["total"], current):
            part["ready"] -= 1
        counts.batches["is_last_batch"] = False
        lightning_internals.set_counts(trainer, counts)
