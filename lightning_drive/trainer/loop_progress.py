"""Read the Trainer's counts of epochs and batches, and correct them for runs that stop while masks are found."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor


def steps_per_epoch(trainer: pl.Trainer, epoch: int = 0) -> float:
    """Count the optimizer steps of an epoch; infinite where the length of the data is not known.

    Args:
        trainer: A Trainer in the middle of ``fit``, after ``on_train_start``.
        epoch: Which one, where GradientAccumulationScheduler makes them different.

    """
    accumulated = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = callback.get_accumulate_grad_batches(epoch)
    batches = trainer.num_training_batches
    return math.ceil(batches / accumulated) if math.isfinite(batches) else math.inf


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients of earlier batches wait for an optimizer step, in ``on_train_batch_start``.

    At the start of an epoch none do: the Trainer steps after its last batch.

    Args:
        trainer: A Trainer in the middle of ``fit``.

    """
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    is_between_batches = batches.ready == batches.processed
    return not is_between_batches and (batches.ready - 1) % trainer.accumulate_grad_batches > 0


def begin_epoch_again(trainer: pl.Trainer) -> None:
    """Let a checkpoint that is saved at the start of an epoch begin with all of that epoch when it is resumed.

    Scoring takes its time there, so there is where an interrupt falls. The Trainer counts batches from the last epoch
    on until the new one gets its first, so it would find nothing left to do in it; and an epoch that it takes for one
    that was under way gets no step of ``ReduceLROnPlateau``.

    Args:
        trainer: A Trainer that was stopped by an exception.

    """
    epochs, batches = trainer.fit_loop.epoch_progress, trainer.fit_loop.epoch_loop.batch_progress
    counted = epochs.state_dict(), batches.state_dict()
    _begin_again(*counted)
    epochs.load_state_dict(counted[0])
    batches.load_state_dict(counted[1])


def let_epoch_begin_again(checkpoint: dict[str, Any]) -> None:
    """Do the same as :func:`begin_epoch_again` in a checkpoint that is being saved, while training goes on.

    Args:
        checkpoint: The checkpoint.

    """
    counted = checkpoint["loops"]["fit_loop"]
    _begin_again(counted["epoch_progress"], counted["epoch_loop.batch_progress"])


def _begin_again(epochs: dict[str, Any], batches: dict[str, Any]) -> None:
    """Count as before an epoch, if it has not reached its first batch."""
    if epochs["total"]["started"] < epochs["total"]["ready"]:
        for each in epochs.values():
            each["ready"] = each["started"]
        batches["current"], batches["is_last_batch"] = dict.fromkeys(batches["current"], 0), False


def begin_batch_again(trainer: pl.Trainer) -> None:
    """Let a run that was saved or stopped before a batch of an epoch go on with that batch, as one that was not.

    Scoring takes its time there, too. The Trainer takes back, in the counts of the epoch, what it fetched and did not
    train on, but neither in its total nor in whether it was the last batch: it would leave that one out.

    Args:
        trainer: The Trainer, in ``on_train_start``.

    """
    batches = trainer.fit_loop.epoch_loop.batch_progress
    current: Any = batches.current
    if current.ready > current.processed >= current.started:
        batches.total.ready -= 1
        current.ready -= 1
        batches.is_last_batch = False


def copied(state: Any) -> Any:
    """Copy a part of a checkpoint, with what hangs on its dictionaries, such as the versions of modules.

    Args:
        state: Tensors in dictionaries and lists.

    """
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        twin = copy.copy(state)
        twin.update({key: copied(value) for key, value in state.items()})
        return twin
    return [copied(each) for each in state] if isinstance(state, list) else state
