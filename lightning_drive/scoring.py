"""Losses taken from a running Trainer, without leaving a trace in it."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_drive import gradients, passage, trees
from lightning_drive.ranks import ALONE, Ranks
from lightning_drive.undisturbed import Mode, undisturbed

T = TypeVar("T")


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
    return pl_module(trees.leaves(batch)[0])  # type: ignore[no-any-return]


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


class Sandbox(NamedTuple):
    """What to score in place of a Trainer and its module."""

    trainer: pl.Trainer
    module: pl.LightningModule
    of: Callable[[Any], Any]
    """Returns what stands for an object that refers to the module, such as a `loss_fn` that holds it."""


@contextmanager
def sandbox(trainer: pl.Trainer, pl_module: pl.LightningModule, mode: Mode = "train") -> Generator[Sandbox]:
    """Call ``training_step`` inside, and neither the Trainer nor the module nor a logger ever knows of it.

    What is scored is a replica of the module, see :func:`lightning_drive.undisturbed.undisturbed`: its metrics, lists
    and counters are its own. Its ``log`` does nothing, and its Trainer is a copy as far as a module may write to it:
    with loggers that do nothing (the dummies of ``fast_dev_run``), and with copies of the settings of optimizers and
    learning-rate schedulers. New tensors have the precision in which the module is scored.

    Args:
        trainer: A Trainer in the middle of ``fit``.
        pl_module: Its module.
        mode: See :func:`lightning_drive.undisturbed.undisturbed`.

    """
    quiet = _quiet(trainer)
    dtype = torch.get_default_dtype()
    try:
        with undisturbed(pl_module, mode, {id(trainer): quiet}) as scored:
            module: Any = scored.module
            _connect(quiet, module, scored.of)
            torch.set_default_dtype(torch.promote_types(passage.precision_of(pl_module), torch.float32))
            yield Sandbox(quiet, module, scored.of)
    finally:
        torch.set_default_dtype(dtype)


def _quiet(trainer: pl.Trainer) -> pl.Trainer:
    """Copy a Trainer as far as a module that is scored may write to it."""
    quiet: Any = _twin(trainer)
    quiet._accelerator_connector = _twin(quiet._accelerator_connector)
    quiet._accelerator_connector.strategy = _twin(trainer.strategy)
    quiet.loggers = [DummyLogger() for _ in trainer.loggers]
    return quiet  # type: ignore[no-any-return]


def _connect(quiet: Any, module: nn.Module, of: Callable[[Any], Any]) -> None:
    """Let a quiet Trainer and the module that is scored know each other."""
    for each in module.modules():
        if isinstance(each, pl.LightningModule):
            vars(each).update(_trainer=quiet, log=_log_nothing, log_dict=_log_nothing)
    strategy = quiet.strategy
    strategy._lightning_module = strategy._model = module
    optimizers = {id(optimizer): _quiet_optimizer(optimizer, of) for optimizer in strategy.optimizers}
    strategy.optimizers = list(optimizers.values())
    strategy.lr_scheduler_configs = [
        replace(config, scheduler=_quiet_scheduler(config.scheduler, optimizers))
        for config in strategy.lr_scheduler_configs
    ]


def _quiet_optimizer(optimizer: Any, of: Callable[[Any], Any]) -> Any:
    twin = _twin(optimizer)
    if "param_groups" in vars(twin):
        twin.param_groups = [{**group, "params": [of(each) for each in group["params"]]} for group in twin.param_groups]
    return twin


def _quiet_scheduler(scheduler: Any, optimizers: Mapping[int, Any]) -> Any:
    twin = _twin(scheduler)
    if "optimizer" in vars(twin):
        twin.optimizer = optimizers.get(id(twin.optimizer), twin.optimizer)
    return twin


def _twin(thing: T) -> T:
    """Make an object of the same class with the same attributes."""
    twin: T = object.__new__(type(thing))
    vars(twin).update(vars(thing))
    return twin


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass
