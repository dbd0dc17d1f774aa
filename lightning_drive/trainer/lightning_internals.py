"""All that this package reads and writes of Lightning beyond what Lightning promises: private names and stored forms.

Nothing else in the package names them, and every function here has a test of its own against the Lightning that is
installed (``tests/trainer/test_lightning_internals.py``): a new one that drops or changes a name is noticed by that
name.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

# The Trainer and its module.


HOLDERS = frozenset({"_average_model", "_fabric", "_fabric_optimizers", "_trainer"})
"""The attributes in which Lightning's modules and callbacks hold what has, or averages, the parameters of a module."""


def trainer_of(module: object) -> pl.Trainer | None:
    """Return the Trainer that a module is attached to, if any; the public property raises without one."""
    trainer = getattr(module, "_trainer", None)
    return trainer if isinstance(trainer, pl.Trainer) else None


def set_strategy(trainer: pl.Trainer, strategy: Strategy) -> None:
    """Set the strategy of a copy of a Trainer, without changing the connector that it shares with the original."""
    connector = copy.copy(trainer._accelerator_connector)
    connector.strategy = strategy
    trainer._accelerator_connector = connector


def new_optimizers(pl_module: pl.LightningModule) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Call ``configure_optimizers``, and return its result in the form in which the Trainer keeps it."""
    return _init_optimizers_and_lr_schedulers(pl_module)


# Batches and steps.


def combined_loader(trainer: pl.Trainer) -> CombinedLoader:
    """Return the loader that training itself reads, which is there from ``on_train_start`` on."""
    loader = trainer.fit_loop._combined_loader
    assert loader is not None
    return loader


def like(loader: CombinedLoader, flattened: list[Any]) -> CombinedLoader:
    """Return a combined loader of the same structure, mode and limits as another, over other loaders."""
    twin = CombinedLoader(loader.iterables, loader._mode)
    twin.flattened = flattened
    twin.limits = loader.limits
    return twin


def before_batch_transfer(pl_module: pl.LightningModule, batch: Any) -> Any:
    """Return what ``on_before_batch_transfer`` makes of a training batch, be it the module's or the data module's."""
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=0)


def step_arguments(trainer: pl.Trainer, batch: Any, batch_idx: int) -> list[Any]:
    """Return the arguments that the Trainer calls ``training_step`` with."""
    return [*trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx).values()]


def logged_step(trainer: pl.Trainer) -> int:
    """Return the step that Lightning passes to loggers: the number of batches after which any optimizer stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


# Counts of epochs and batches.


class Counts(NamedTuple):
    """Counts of the training loop as a checkpoint stores them; each has a ``"total"`` and a ``"current"`` part.

    A part counts what is ``"ready"`` (fetched), ``"started"``, ``"processed"`` and ``"completed"``. Batches are counted
    from the beginning of their epoch in ``"current"``, and only from the first batch of a new epoch on.
    """

    epochs: dict[str, Any]
    batches: dict[str, Any]
    """It also holds, as ``"is_last_batch"``, whether the batch is the last one."""


def counts(trainer: pl.Trainer) -> Counts:
    """Return the counts of a Trainer, as copies."""
    loop = trainer.fit_loop
    return Counts(loop.epoch_progress.state_dict(), loop.epoch_loop.batch_progress.state_dict())


def set_counts(trainer: pl.Trainer, counts: Counts) -> None:
    """Write counts into a Trainer."""
    trainer.fit_loop.epoch_progress.load_state_dict(counts.epochs)
    trainer.fit_loop.epoch_loop.batch_progress.load_state_dict(counts.batches)


def counts_in(checkpoint: Mapping[str, Any]) -> Counts:
    """Return the counts of a checkpoint itself, so that writing into them changes it."""
    loop = checkpoint["loops"]["fit_loop"]
    return Counts(loop["epoch_progress"], loop["epoch_loop.batch_progress"])


# Gradients of mixed precision.


def scaler(trainer: pl.Trainer) -> Any:
    """Return the ``GradScaler`` of mixed precision; ``None`` without one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def unscales_in_step(trainer: pl.Trainer, optimizer: Optimizer) -> bool:
    """Whether gradients are still scaled before the step, as with ``fused=True``, and overflow is yet to be seen."""
    return scaler(trainer) is not None and _optimizer_handles_unscaling(optimizer)


# Lightning's callbacks.


def legacy_state_key(callback: pl.Callback) -> object:
    """Return the key under which Lightning before 1.5 saved the state of a callback, and still looks for it."""
    return callback._legacy_state_key


class Average(NamedTuple):
    """The running average that a callback keeps of the module."""

    module: nn.Module
    """It has the parameter names of the LightningModule."""
    holder: Any
    """Has the number of updates as ``n_averaged``: a tensor, or ``None`` before the first."""


def average_of(callback: pl.Callback) -> Average | None:
    """Return the average that WeightAveraging, EMAWeightAveraging or StochasticWeightAveraging keeps, if there is one.

    One without a count of updates, as of an own callback of the same form, has no ``n_averaged``.
    """
    average = getattr(callback, "_average_model", None)
    if average is None:
        return None
    return Average(average.module, average) if isinstance(average, AveragedModel) else Average(average, callback)


def count_as_averaged(swa: StochasticWeightAveraging, epoch: int) -> None:
    """Have SWA take an epoch for one that is in the average already."""
    swa._latest_update_epoch = epoch


def checks_on_train_epoch_end(stopping: EarlyStopping) -> bool | None:
    """Whether EarlyStopping looks at its metric when an epoch ends, not after validation; ``None`` before ``setup``."""
    return stopping._check_on_train_epoch_end


def hold_off(stopping: EarlyStopping, on: bool) -> None:
    """Keep EarlyStopping from looking at its metric, or let it look again; subclasses have hooks of their own."""
    for name in ("_should_skip_check", "_run_early_stopping_check"):
        vars(stopping).pop(name, None)
        if on:
            vars(stopping)[name] = _skip_check


def _skip_check(trainer: pl.Trainer) -> bool:
    return True


# Processes.


def add_result(launcher: Any, name: str, value: Callable[[], object]) -> None:
    """Have a launcher that returns results from its processes return one more; ``value`` is called as it collects them.

    Other launchers, and ``None``, are left alone.
    """
    collect = getattr(launcher, "get_extra_results", None)
    if collect is not None:
        launcher.get_extra_results = lambda trainer: {**collect(trainer), name: value()}
