"""Warn if training may end before the network is pruned; return when and why it ended.

The warnings are for a Trainer in the middle of ``fit``, after ``on_train_start``. When the last cut is they are told as
the epoch at whose start it is, the step before which it is (where there is one, the epoch says nothing), and in words.
"""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_drive.trainer import lightning_internals, other_callbacks
from lightning_drive.trainer.cycle_schedules import Cycles


def warn_of_early_stopping(trainer: pl.Trainer, epoch: int | None, step: int | None, when: str) -> None:
    """Warn if EarlyStopping, where it is not held off, may run out of patience before the last cut."""
    epochs, batches = _left(trainer, epoch, step)
    if (trainer.min_epochs or 0) > trainer.current_epoch + epochs or (trainer.min_steps or 0) > (step or math.inf):
        return
    for callback in other_callbacks.callbacks_of(trainer):
        if not isinstance(callback, EarlyStopping):
            continue
        has_best = math.isfinite(callback.best_score)
        needed = max(callback.patience - callback.wait_count, 1) + (not has_best)
        checks = _checks(trainer, callback, epochs, batches)
        if needed <= checks:
            rank_zero_warn(
                f"EarlyStopping(monitor={callback.monitor!r}, patience={callback.patience}) may end training after"
                f" {needed} checks, but there are {checks} before the network is pruned {when}, and with"
                " `reset_best=False` it is not held off until then. Set `reset_best=True`, or a `patience` of"
                f" {checks + callback.wait_count} or more."
            )


def _left(trainer: pl.Trainer, epoch: int | None, step: int | None) -> tuple[float, float]:
    """Count the epochs, and the batches, that are left before the last cut."""
    per_epoch = float(trainer.num_training_batches)
    if step is None:
        epochs = max((epoch or 0) - trainer.current_epoch, 0)
        return epochs, epochs * per_epoch if epochs else 0.0
    batches = max(step - trainer.global_step, 0) * trainer.accumulate_grad_batches
    return batches / per_epoch, batches


def _checks(trainer: pl.Trainer, stopping: EarlyStopping, epochs: float, batches: float) -> int:
    """Count how often EarlyStopping looks at its metric in these epochs and batches, as far as that is known."""
    if lightning_internals.checks_on_train_epoch_end(stopping):
        return math.floor(epochs)
    every = trainer.val_check_batch
    if not trainer.enable_validation or not every:
        return 0
    per_epoch = float(trainer.num_training_batches)
    if trainer.check_val_every_n_epoch is None or math.isinf(per_epoch):
        return math.floor(batches / every) if math.isfinite(batches) else math.floor(epochs)
    return math.floor(epochs) // trainer.check_val_every_n_epoch * math.floor(per_epoch / every)


def warn_of_unknown_length(trainer: pl.Trainer, epoch: int | None, step: int | None, when: str, remedy: str) -> None:
    """Warn if the epoch of the last cut may never come, since the data may be an endless stream."""
    is_ahead = step is None and trainer.current_epoch < (epoch or 0)
    if not is_ahead or math.isfinite(trainer.num_training_batches):
        return
    callbacks = other_callbacks.callbacks_of(trainer)
    if trainer.max_steps >= 0:
        end = f"training ends after max_steps={trainer.max_steps}"
    elif trainer.max_epochs == -1:
        end = "training has no last epoch"
    elif any(isinstance(callback, Timer) for callback in callbacks):
        end = "training ends when the time of a Timer (or `max_time`) is over"
    elif trainer.val_check_batch != math.inf and any(
        isinstance(callback, EarlyStopping) and not lightning_internals.checks_on_train_epoch_end(callback)
        for callback in callbacks
    ):
        end = "EarlyStopping looks at its metric within epochs"
    else:
        return
    rank_zero_warn(
        f"The training data have no known length, and {end}: the network is pruned {when}, which never comes"
        f" if an epoch does not end before, as in an endless stream. {remedy}"
    )


def warn_of_manual_steps(trainer: pl.Trainer, epoch: int | None, step: int | None, when: str, max_epochs: int) -> None:
    """Warn if manual optimization is likely to end before the last cut: a batch may have any number of steps there.

    Training ends after ``max_epochs``, or, where they are negative, by its steps only.
    """
    per_epoch = float(trainer.num_training_batches) * max(len(trainer.optimizers), 1)
    if trainer.lightning_module.automatic_optimization or math.isinf(per_epoch):
        return
    if step is None:
        epochs = (epoch or 0) - trainer.current_epoch
        is_late = epochs > 0 and 0 <= trainer.max_steps <= trainer.global_step + epochs * per_epoch
        name, limit = "max_steps", trainer.max_steps
    else:
        epochs = max_epochs - trainer.current_epoch
        is_late = max_epochs >= 0 and trainer.global_step + epochs * per_epoch <= step
        name, limit = "max_epochs", max_epochs
    if is_late:
        of_each = f" of each of its {len(trainer.optimizers)} optimizers" if len(trainer.optimizers) > 1 else ""
        rank_zero_warn(
            f"Training is likely to end before the network is pruned {when}: manual optimization often takes"
            f" {per_epoch:g} steps in an epoch (one{of_each} for every batch), and training ends after {name}={limit}."
            f" Raise `{name}`, or prune earlier."
        )


def warn_of_dense_end(trainer: pl.Trainer, when: str, remedy: str) -> None:
    """Warn, in ``on_train_end``, that training ended before the warm-up did."""
    rank_zero_warn(
        f"Training ended in epoch {_last_epoch(trainer)}, after {trainer.global_step} steps{_reason(trainer)}, before"
        f" the warm-up was over: the network is dense. It would have been pruned {when}. {remedy}"
    )


def warn_of_open_cycles(trainer: pl.Trainer, cycles: Cycles, cycle: int, sparsity: float, goal: float) -> None:
    """Warn, in ``on_train_end``, that training ended before the last cycle of IMP did."""
    rank_zero_warn(
        f"Training ended in epoch {_last_epoch(trainer)}{_reason(trainer)}, in cycle {cycle} (counted from 0) of"
        f" {cycles.number}: the network has a sparsity of {sparsity:.4f}, not {goal}. The next cut would have been at"
        f" the start of epoch {(cycle + 1) * cycles.epochs}. Let training run for more than {cycles.last_cut} epochs,"
        " or lower `cycles` or `epochs_per_cycle`."
    )


def warn_of_open_window(trainer: pl.Trainer, sparsity: float, goal: float, when: str) -> None:
    """Warn, in ``on_train_end``, that training ended before the last cut of gradual pruning."""
    rank_zero_warn(
        f"Training ended in epoch {_last_epoch(trainer)}, after {trainer.global_step} steps{_reason(trainer)}, before"
        f" the last cut, which would have been {when}: the network has a sparsity of {sparsity:.4f}, not {goal}. Let"
        " training run longer, or lower `end_epoch`."
    )


def _last_epoch(trainer: pl.Trainer) -> int:
    """Return the epoch, counted from 0, in which training ended; the Trainer has counted on."""
    return max(trainer.current_epoch - 1, 0)


def _reason(trainer: pl.Trainer) -> str:
    """Return why training ended, to be put behind "Training ended"; empty if it is not known."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f" by max_steps={trainer.max_steps}"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f" by max_epochs={trainer.max_epochs}"
    if not trainer.should_stop:
        return ""
    for callback in other_callbacks.callbacks_of(trainer):
        if isinstance(callback, EarlyStopping) and _has_stopped(callback):
            return f" by {type(callback).__name__}(monitor={callback.monitor!r}, patience={callback.patience})"
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return f" by {type(callback).__name__} (or `max_time`)"
    return ", since `trainer.should_stop` was set"


def _has_stopped(stopping: Any) -> bool:
    """Whether EarlyStopping ended training."""
    # Lightning 2.5 does not keep the reason, and epoch 0 looks like none.
    return bool(stopping.stopped_epoch or getattr(stopping, "stopping_reason_message", None)) or (
        stopping.wait_count >= stopping.patience
    )
