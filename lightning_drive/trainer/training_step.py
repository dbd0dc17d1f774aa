"""Losses to score by: that of the module's own ``training_step``, or at least its ``forward``."""

from collections.abc import Mapping
from itertools import count
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_drive.core import containers
from lightning_drive.network.gradients import LossFunction
from lightning_drive.trainer import lightning_internals
from lightning_drive.trainer.sandbox import Sandbox


def loss_of(sandbox: Sandbox, first: int = 0) -> LossFunction:
    """Return the loss of ``training_step``, or a pass through ``forward`` where optimization is manual.

    With manual optimization nothing but the statistics of BatchNorm is wanted. ``first`` is the index in its epoch of
    the first batch that the loss is of.
    """
    return _training_step_loss(sandbox.trainer, first) if sandbox.module.automatic_optimization else _forward


def _training_step_loss(trainer: pl.Trainer, first: int) -> LossFunction:
    """Return a loss function that calls ``training_step`` of a sandbox; ``None`` skips a batch, as in training.

    The module's ``on_train_epoch_start`` and ``on_train_batch_start`` are called before it, as in training, where they
    come after those of callbacks: ``training_step`` may need what they prepare. Indices of batches begin anew with each
    pass over the data.
    """
    length = trainer.num_training_batches
    numbers = count(first)

    def loss_fn(pl_module: pl.LightningModule, batch: Any) -> Tensor | None:
        number = next(numbers)
        if number == first:
            pl_module.on_train_epoch_start()
        batch_idx = int(number % length)  # infinite for a stream
        pl_module.on_train_batch_start(batch, batch_idx)
        output = pl_module.training_step(*lightning_internals.step_arguments(trainer, batch, batch_idx))
        if output is None:
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                "To score weights, `training_step` must return the loss as a tensor or under the key 'loss' of a dict,"
                f" got {output!r}. Return it, or pass `loss_fn` to the callback."
            )
        return loss

    return loss_fn


def _forward(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    return pl_module(containers.leaves(batch)[0])  # type: ignore[no-any-return]


def free_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Drop the gradients that Lightning is about to drop, so that scoring needs no room beside them.

    Those are the gradients of the last step, at the start of an epoch, under automatic optimization. A module with an
    ``optimizer_zero_grad`` of its own may want them.
    """
    if pl_module.automatic_optimization and not is_overridden("optimizer_zero_grad", pl_module, pl.LightningModule):
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
