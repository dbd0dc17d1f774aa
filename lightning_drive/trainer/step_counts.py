"""Optimizer steps of a run: how many an epoch has, whether gradients wait for one, whether it is a ``fast_dev_run``."""

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_drive.trainer import lightning_internals, other_callbacks


def is_quick_check(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``: one short epoch, in which pruning should be seen to work."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def steps_per_epoch(trainer: pl.Trainer, epoch: int = 0) -> float:
    """Count the optimizer steps of an epoch, from ``on_train_start`` on; infinite for data of unknown length.

    GradientAccumulationScheduler makes epochs different.
    """
    accumulated = trainer.accumulate_grad_batches
    for callback in other_callbacks.callbacks_of(trainer):
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = callback.get_accumulate_grad_batches(epoch)
    batches = trainer.num_training_batches
    return math.ceil(batches / accumulated) if math.isfinite(batches) else math.inf


def is_accumulating(trainer: pl.Trainer) -> bool:
    """Whether gradients of earlier batches wait for an optimizer step, in ``on_train_batch_start``.

    At the start of an epoch none do: the Trainer steps after its last batch.
    """
    return batch_index(trainer) % trainer.accumulate_grad_batches > 0


def batch_index(trainer: pl.Trainer) -> int:
    """Return the index in its epoch of the batch that is about to be trained on; 0 at the start of an epoch."""
    batches = lightning_internals.counts(trainer).batches["current"]
    is_between_batches = batches["ready"] == batches["processed"]
    return 0 if is_between_batches else batches["ready"] - 1
