"""Have a run that is saved or stopped while masks are searched for resume at the epoch or batch that was to begin."""

import copy
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_drive.trainer import facts
from lightning_drive.trainer.facts import Counts


def begin_epoch_again(trainer: pl.Trainer) -> None:
    """Have a checkpoint that is saved at the start of an epoch, after an exception, resume with all of that epoch.

    Scoring takes its time there, so there is where an interrupt falls. The Trainer counts batches from the last epoch
    on until the new one gets its first, so it would find nothing left to do in it; and an epoch that it takes for one
    that was under way gets no step of ``ReduceLROnPlateau``.
    """
    counts = facts.counts(trainer)
    _begin_epoch_again(counts)
    facts.set_counts(trainer, counts)


def begin_saved_epoch_again(checkpoint: dict[str, Any]) -> None:
    """Do the same as :func:`begin_epoch_again` in a checkpoint that is being saved while training goes on."""
    _begin_epoch_again(facts.counts_in(checkpoint))


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
    counts = facts.counts(trainer)
    current = counts.batches["current"]
    if current["ready"] > current["processed"] >= current["started"]:
        for part in (counts.batches["total"], current):
            part["ready"] -= 1
        counts.batches["is_last_batch"] = False
        facts.set_counts(trainer, counts)


def copied(state: Any) -> Any:
    """Copy tensors in dictionaries and lists, with what hangs on the dictionaries, such as the versions of modules."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        twin = copy.copy(state)
        twin.update({key: copied(value) for key, value in state.items()})
        return twin
    return [copied(value) for value in state] if isinstance(state, list) else state
