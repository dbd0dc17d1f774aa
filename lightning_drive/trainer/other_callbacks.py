"""What pruning means to the other callbacks of a Trainer: those that keep averages, and those that track the best."""

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lightning_drive.trainer import facts


def averaged_models(trainer: pl.Trainer) -> list[nn.Module]:
    """Find the running averages that callbacks keep of the module (EMA, SWA): they hold pruned weights, too.

    Args:
        trainer: The Trainer.

    Returns:
        Modules with the parameter names of the LightningModule.

    """
    averages = map(facts.average_of, callbacks_of(trainer))
    return [average.module for average in averages if average is not None]


def restart_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let running averages begin again with the module as it is now.

    Args:
        trainer: The Trainer.
        pl_module: Its module.

    """
    for callback in callbacks_of(trainer):
        average = facts.average_of(callback)
        if average is None:
            continue
        with torch.no_grad():
            for mean, now in (
                *zip(average.module.parameters(), pl_module.parameters(), strict=True),
                *zip(average.module.buffers(), pl_module.buffers(), strict=True),
            ):
                mean.copy_(now)
        count = getattr(average.holder, "n_averaged", None)
        if count is not None:
            count.zero_()
        if isinstance(callback, StochasticWeightAveraging):  # it takes what it finds at the start of an epoch
            facts.count_as_averaged(callback, trainer.current_epoch)


def hold_off_early_stopping(trainer: pl.Trainer, on: bool) -> None:
    """Keep EarlyStopping from looking at the monitored value, or let it look again.

    Args:
        trainer: The Trainer.
        on: Whether it is held off.

    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            facts.hold_off(callback, on)


def forget_best(trainer: pl.Trainer) -> str:
    """Let best-model tracking begin again: a dense epoch must not win "best" over the sparse ones.

    Args:
        trainer: The Trainer, whose ModelCheckpoint and EarlyStopping callbacks with a monitor are reset.

    Returns:
        What to tell the user; empty if there is no such callback.

    """
    forgotten = []
    for callback in callbacks_of(trainer):
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or callback.monitor is None:
            continue
        worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        if isinstance(callback, EarlyStopping):
            callback.wait_count, callback.best_score = 0, worst
        else:
            callback.best_k_models, callback.kth_best_model_path, callback.kth_value = {}, "", worst
            callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None
        forgotten.append(f"{type(callback).__name__} (monitor={callback.monitor!r})")
    if not forgotten:
        return ""
    return (
        f"{', '.join(forgotten)}: tracking of the best begins again with the sparse network. Files of earlier epochs"
        " stay where they are. `reset_best=False` turns this off."
    )


def last_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """Give what was logged last under every name, finite numbers only; what is monitored comes first.

    Args:
        trainer: The Trainer.

    """
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    monitored = [getattr(callback, "monitor", None) for callback in callbacks_of(trainer)]
    names = dict.fromkeys([*(name for name in monitored if name in logged), *logged])
    return {name: logged[name] for name in names if math.isfinite(logged[name]) and not name.startswith("pruning/")}


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Give the Trainer's callbacks.

    Args:
        trainer: The Trainer.

    """
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def others(pruning: pl.Callback, trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks beside the pruning one."""
    return [callback for callback in callbacks_of(trainer) if callback is not pruning]
