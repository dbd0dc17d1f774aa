"""Losses taken from a running Trainer, without leaving a trace in it."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from lightning_drive.core.arguments import Mode
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.network import forward_passes
from lightning_drive.network.undisturbed import undisturbed

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


class Sandbox(NamedTuple):
    """What to score in place of a Trainer and its module."""

    trainer: pl.Trainer
    module: pl.LightningModule
    of: Callable[[Any], Any]
    """Returns what stands for an object that refers to the module, such as a `loss_fn` that holds it."""


@contextmanager
def sandbox(trainer: pl.Trainer, pl_module: pl.LightningModule, mode: Mode = "train") -> Generator[Sandbox]:
    """Call ``training_step`` inside, and neither the Trainer nor the module nor a logger ever knows of it.

    What is scored is a replica of the module, see :func:`lightning_drive.network.undisturbed.undisturbed`: its
    metrics, lists
    and counters are its own. Its ``log`` does nothing, and its Trainer is a copy as far as a module may write to it:
    with loggers that do nothing (the dummies of ``fast_dev_run``), and with copies of the settings of optimizers and
    learning-rate schedulers. New tensors have the precision in which the module is scored.

    Args:
        trainer: A Trainer in the middle of ``fit``.
        pl_module: Its module.
        mode: See :func:`lightning_drive.network.undisturbed.undisturbed`.

    """
    quiet = _quiet(trainer)
    dtype = torch.get_default_dtype()
    try:
        with undisturbed(pl_module, mode, {id(trainer): quiet}) as scored:
            module: Any = scored.module
            _connect(quiet, module, scored.of)
            torch.set_default_dtype(torch.promote_types(forward_passes.precision_of(pl_module), torch.float32))
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
