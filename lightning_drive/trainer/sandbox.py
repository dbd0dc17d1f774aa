"""Run the module's training step on a replica, with a Trainer that stays as it is."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_drive.core.arguments import Mode
from lightning_drive.network import forward_passes
from lightning_drive.network.undisturbed import undisturbed
from lightning_drive.trainer import lightning_internals

T = TypeVar("T")


class Sandbox(NamedTuple):
    """What is scored in place of a module and its Trainer."""

    trainer: pl.Trainer
    module: pl.LightningModule
    replica_of: Callable[[Any], Any]
    """Returns the replica of an object that refers to the module, such as of a `loss_fn` that holds it."""


@contextmanager
def sandbox(trainer: pl.Trainer, pl_module: pl.LightningModule, mode: Mode = "train") -> Generator[Sandbox]:
    """Replicate a module that is in the middle of ``fit``, so that its ``training_step`` leaves no trace.

    The replica (see :func:`lightning_drive.network.undisturbed.undisturbed`, also for ``mode``) has metrics, lists and
    counters of its own. Its ``log`` does nothing, and its Trainer is a copy as far as a module may write to it: with
    loggers that do nothing (the dummies of ``fast_dev_run``), and with copies of the settings of optimizers and
    learning-rate schedulers. New tensors have the precision in which the module is scored.
    """
    quiet = _quiet_trainer(trainer)
    dtype = torch.get_default_dtype()
    try:
        with undisturbed(pl_module, mode, {id(trainer): quiet}) as scored:
            module: Any = scored.module
            _connect(quiet, module, scored.of)
            torch.set_default_dtype(torch.promote_types(forward_passes.precision_of(pl_module), torch.float32))
            yield Sandbox(quiet, module, scored.of)
    finally:
        torch.set_default_dtype(dtype)


def _quiet_trainer(trainer: pl.Trainer) -> pl.Trainer:
    """Copy a Trainer as far as a module may write to it; its loggers do nothing."""
    quiet = _twin(trainer)
    lightning_internals.set_strategy(quiet, _twin(trainer.strategy))
    quiet.loggers = [DummyLogger() for _ in trainer.loggers]
    return quiet


def _connect(quiet: pl.Trainer, module: Any, replica_of: Callable[[Any], Any]) -> None:
    """Attach a replica to its quiet Trainer, with optimizers and schedulers of its own."""
    for submodule in module.modules():
        if isinstance(submodule, pl.LightningModule):
            submodule.trainer = quiet
            vars(submodule).update(log=_log_nothing, log_dict=_log_nothing)
    strategy: Any = quiet.strategy
    strategy.connect(module)
    optimizers = {id(optimizer): _quiet_optimizer(optimizer, replica_of) for optimizer in strategy.optimizers}
    strategy.optimizers = list(optimizers.values())
    strategy.lr_scheduler_configs = [
        replace(config, scheduler=_quiet_scheduler(config.scheduler, optimizers))
        for config in strategy.lr_scheduler_configs
    ]


def _quiet_optimizer(optimizer: Any, replica_of: Callable[[Any], Any]) -> Any:
    """Copy an optimizer with its settings, over the parameters of the replica."""
    twin = _twin(optimizer)
    if "param_groups" in vars(twin):
        twin.param_groups = [{**group, "params": [*map(replica_of, group["params"])]} for group in twin.param_groups]
    return twin


def _quiet_scheduler(scheduler: Any, optimizers: Mapping[int, Any]) -> Any:
    """Copy a scheduler, over the copy of its optimizer; ``optimizers`` has the copies by the ids of the originals."""
    twin = _twin(scheduler)
    if "optimizer" in vars(twin):
        twin.optimizer = optimizers.get(id(twin.optimizer), twin.optimizer)
    return twin


def _twin(thing: T) -> T:
    """Return an object of the same class with the same attributes, whatever the class says about copying."""
    twin: T = object.__new__(type(thing))
    vars(twin).update(vars(thing))
    return twin


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    pass
