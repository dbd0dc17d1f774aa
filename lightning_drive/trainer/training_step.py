"""Make a loss function out of a module's ``training_step``."""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import count
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_drive.core import containers
from lightning_drive.network import gradients
from lightning_drive.trainer.sandbox import Sandbox


def free_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let go of gradients that Lightning is about to throw away, so that scoring does not need room beside them.

    Those are the gradients of the last step, at the start of an epoch, under automatic optimization. A module with an
    ``optimizer_zero_grad`` of its own may want them.

    Args:
        trainer: A Trainer in the middle of ``fit``.
        pl_module: Its module.

    """
    if pl_module.automatic_optimization and not is_overridden("optimizer_zero_grad", pl_module, pl.LightningModule):
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None


def training_step_loss(trainer: pl.Trainer) -> gradients.LossFunction:
    """Make a loss function out of the module's own ``training_step``.

    The module's ``on_train_epoch_start`` and ``on_train_batch_start`` are called before it, as in training, where they
    come after those of callbacks: ``training_step`` may need what they prepare.

    Args:
        trainer: The Trainer of a :func:`sandbox`.

    Returns:
        ``loss_fn(pl_module, batch)``, to be called with the module of the sandbox. It returns ``None`` where
        ``training_step`` does, which skips the batch in training, too. Indices of batches begin anew with each pass.

    """
    length = trainer.num_training_batches
    numbers = count()

    def loss_fn(pl_module: pl.LightningModule, batch: Any) -> Tensor | None:
        number = next(numbers)
        if number == 0:
            pl_module.on_train_epoch_start()
        index = int(number % length)  # infinite for a stream
        pl_module.on_train_batch_start(batch, index)
        kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, index)
        output = pl_module.training_step(*kwargs.values())
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


def forward(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    """Run a batch, or its first tensor, through ``forward``, where nothing but BatchNorm's statistics is wanted.

    Args:
        pl_module: The module.
        batch: A batch with a tensor in it.

    """
    return pl_module(containers.leaves(batch)[0])  # type: ignore[no-any-return]


def loss_of(sandbox: "Sandbox") -> gradients.LossFunction:
    """Return what runs a batch as training does, or at least through ``forward`` where optimization is manual.

    Args:
        sandbox: What is scored.

    """
    return training_step_loss(sandbox.trainer) if sandbox.module.automatic_optimization else forward


def check_training_step(pl_module: pl.LightningModule) -> None:
    """Refuse a ``training_step`` that cannot be called for its loss alone.

    Args:
        pl_module: The module.

    Raises:
        MisconfigurationException: If it optimizes manually or takes a ``dataloader_iter``.

    """
    remedy = "Pass `loss_fn`, a function `loss_fn(pl_module, batch)` that returns the loss, to the callback."
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "With manual optimization (`automatic_optimization=False`), calling `training_step` to score weights would"
            f" step the optimizers. {remedy}"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"`training_step` takes `dataloader_iter`, so it cannot be given a batch to score weights on. {remedy}"
        )
