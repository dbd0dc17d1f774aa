"""Read what a running Trainer does."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer


def is_quick_check(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``: one short epoch, in which pruning should be seen to work.

    Args:
        trainer: The Trainer.

    """
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def reads_gradients_early(pruning: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether gradients may be used, or clipped, before ``on_before_optimizer_step`` of a callback masks them.

    Args:
        pruning: The pruning callback.
        trainer: The Trainer.
        pl_module: Its module.

    """
    in_module = ("backward", "on_after_backward", "optimizer_step")
    in_callbacks = ("on_after_backward", "on_before_optimizer_step")
    return (
        not pl_module.automatic_optimization
        or any(is_overridden(hook, pl_module, pl.LightningModule) for hook in in_module)
        or any(is_overridden(hook, other, pl.Callback) for other in others(pruning, trainer) for hook in in_callbacks)
    )


def scaler(trainer: pl.Trainer) -> Any:
    """Give the ``GradScaler`` of mixed precision, or ``None``.

    Args:
        trainer: The Trainer.

    """
    return getattr(trainer.precision_plugin, "scaler", None)


def unscales_in_step(trainer: pl.Trainer, optimizer: Optimizer) -> bool:
    """Whether gradients are still scaled before the step, as with ``fused=True``, and overflow is yet to be seen.

    Args:
        trainer: The Trainer.
        optimizer: One of its optimizers.

    """
    return scaler(trainer) is not None and _optimizer_handles_unscaling(optimizer)


def others(pruning: pl.Callback, trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks beside the pruning one."""
    return [callback for callback in trainer.callbacks if callback is not pruning]  # type: ignore[attr-defined]
