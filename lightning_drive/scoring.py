"""Losses taken from a running Trainer, without leaving a trace in it."""

import math
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import count
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_drive import flow, gradients
from lightning_drive.ranks import ALONE, Ranks


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """Find the processes of a run.

    Args:
        trainer: The Trainer, with its processes connected.

    """
    return Ranks.of(None, trainer.strategy.root_device) if trainer.world_size > 1 else ALONE


def random_numbers(trainer: pl.Trainer) -> torch.Generator:
    """Give random numbers that depend on the first rank's seed, and neither repeat nor use up those of training.

    Args:
        trainer: The Trainer, with its processes connected.

    """
    return torch.Generator().manual_seed(ranks_of(trainer).broadcast(torch.initial_seed()) ^ 0x5EED)


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


def begin_epoch_again(trainer: pl.Trainer) -> None:
    """Let a checkpoint that is saved at the start of an epoch begin with its first batch when it is resumed.

    Scoring takes its time there, so there is where an interrupt falls. The Trainer counts batches from the last epoch
    on until the new one gets its first, so it would find nothing left to do in it.

    Args:
        trainer: A Trainer that was stopped by an exception.

    """
    epochs = trainer.fit_loop.epoch_progress.total
    if epochs.started < epochs.ready:  # type: ignore[attr-defined]
        trainer.fit_loop.epoch_loop.batch_progress.reset_on_run()


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

    Args:
        trainer: A Trainer in the middle of ``fit``.

    Returns:
        ``loss_fn(pl_module, batch)``, to be called within :func:`sandbox`.

    """
    indices = count()

    def loss_fn(pl_module: pl.LightningModule, batch: Any) -> Tensor:
        kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, next(indices))
        output = pl_module.training_step(*kwargs.values())
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                "To score weights, `training_step` must return the loss as a tensor or under the key 'loss' of a dict,"
                f" got {output!r}. Return it, or pass `loss_fn` to the callback."
            )
        return loss

    return loss_fn


def forward(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    """Run a batch's first tensor through ``forward``, in place of a loss where nothing but statistics is wanted.

    Args:
        pl_module: The module.
        batch: A batch with a tensor in it.

    """
    return pl_module(flow.first_tensor(batch))  # type: ignore[no-any-return]


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


@contextmanager
def sandbox(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Generator[None]:
    """Call ``training_step`` inside, and no log, metric or logger knows of it afterwards.

    ``self.log`` does nothing, ``self.logger`` is the dummy that ``fast_dev_run`` uses, torchmetrics keep their states,
    and new tensors have the precision in which the module is scored. Weights, gradients, buffers, modes and random
    states are the business of :func:`lightning_drive.gradients.undisturbed`. What ``training_step`` does to plain
    Python attributes cannot be undone.

    Args:
        trainer: A Trainer in the middle of ``fit``.
        pl_module: Its module.

    """
    modules = [module for module in pl_module.modules() if isinstance(module, pl.LightningModule)]
    logs = [(module, name, vars(module).get(name)) for module in modules for name in ("log", "log_dict")]
    loggers, dtype = trainer.loggers, torch.get_default_dtype()
    parameter = next(pl_module.parameters())
    with _preserved_metrics(pl_module):
        try:
            trainer.loggers = [DummyLogger() for _ in loggers]
            torch.set_default_dtype(torch.promote_types(parameter.dtype, torch.float32))
            for module, name, _ in logs:
                vars(module)[name] = _log_nothing
            yield
        finally:
            for module, name, own in logs:
                vars(module).pop(name)
                if own is not None:
                    vars(module)[name] = own
            torch.set_default_dtype(dtype)
            trainer.loggers = loggers


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def _preserved_metrics(pl_module: pl.LightningModule) -> Generator[None]:
    """Put the states of all torchmetrics back, in place, so that metrics that share states go on sharing them."""
    metrics = [module for module in pl_module.modules() if isinstance(module, (Metric, MetricCollection))]
    restores = [_restore_later(vars(metric)) for metric in metrics]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _restore_later(attributes: dict[str, Any]) -> Callable[[], None]:
    tensors = [(value, value.detach().clone()) for value in attributes.values() if isinstance(value, Tensor)]
    lists = [(value, list(value)) for value in attributes.values() if isinstance(value, list)]
    # `MetricCollection` keeps its compute groups as a dict of lists
    dicts = [
        (value, {key: list(entry) if isinstance(entry, list) else entry for key, entry in value.items()})
        for value in attributes.values()
        if type(value) is dict
    ]
    before = dict(attributes)

    def restore() -> None:
        attributes.clear()
        attributes.update(before)
        with torch.no_grad():
            for tensor, saved in tensors:
                tensor.copy_(saved)
        for sequence, items in lists:
            sequence[:] = items
        for mapping, entries in dicts:
            mapping.clear()
            mapping.update(entries)

    return restore
