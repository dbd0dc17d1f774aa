"""Keep EarlyStopping and ModelCheckpoint consistent with pruning, and read what other callbacks monitor."""

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_drive.trainer import lightning_internals


def hold_off_early_stopping(trainer: pl.Trainer, on: bool) -> None:
    """Keep EarlyStopping from looking at the monitored value while this is on, and let it look again afterwards."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            lightning_internals.hold_off(callback, on)


def forget_best(trainer: pl.Trainer) -> str:
    """Let best-model tracking begin again: a dense epoch must not win "best" over the sparse ones.

    ModelCheckpoint and EarlyStopping callbacks with a monitor are reset. Return a message that names them; empty if
    there are none.
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
    """Return what was logged last under every name, finite numbers only; what is monitored comes first."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    monitored = [getattr(callback, "monitor", None) for callback in callbacks_of(trainer)]
    names = dict.fromkeys([*(name for name in monitored if name in logged), *logged])
    return {name: logged[name] for name in names if math.isfinite(logged[name]) and not name.startswith("pruning/")}


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks of a Trainer."""
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def others(pruning: pl.Callback, trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks of a Trainer other than the pruning one."""
    return [callback for callback in callbacks_of(trainer) if callback is not pruning]
