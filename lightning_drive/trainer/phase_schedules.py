"""Learning-rate schedules of a training run in phases: each phase has a schedule of its own length."""

import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_drive.trainer import lightning_internals


@contextmanager
def seen_as_whole(trainer: pl.Trainer, epochs: int, steps_before: int = 0) -> Generator[None]:
    """Make ``max_epochs`` and ``estimated_stepping_batches`` of a Trainer those of one phase of ``epochs`` epochs.

    ``epochs`` is -1 for a phase without end; ``steps_before``, the steps before the phase, do not count for its
    ``max_steps``.
    """
    loop = trainer.fit_loop
    max_epochs, max_steps = loop.max_epochs, loop.epoch_loop.max_steps
    try:
        loop.max_epochs = epochs
        if max_steps >= 0:
            loop.epoch_loop.max_steps = max(0, max_steps - steps_before)
        yield
    finally:
        loop.max_epochs, loop.epoch_loop.max_steps = max_epochs, max_steps


def plan(trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int) -> Callable[[], None]:
    """Let ``configure_optimizers`` see a phase of ``epochs`` epochs as the whole training; return how to undo it."""
    own = vars(pl_module).get("configure_optimizers")  # LightningCLI sets one on the instance
    configure = pl_module.configure_optimizers

    @functools.wraps(configure)
    def configure_for_phase() -> Any:
        with seen_as_whole(trainer, epochs):
            return configure()

    def undo() -> None:
        vars(pl_module).pop("configure_optimizers")
        if own is not None:
            vars(pl_module)["configure_optimizers"] = own

    vars(pl_module)["configure_optimizers"] = configure_for_phase
    return undo


class Schedules(NamedTuple):
    """Schedulers of a phase for the running optimizers, and the settings that they began with."""

    configs: list[LRSchedulerConfig]
    """The schedulers at their start, with the Trainer's settings for them."""
    param_groups: list[list[dict[str, Any]]]
    """The settings with which every optimizer begins the phase, such as its first learning rate."""

    @property
    def states(self) -> list[dict[str, Any]]:
        """The states of the schedulers."""
        return [config.scheduler.state_dict() for config in self.configs]


def schedules_for(trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int, steps_before: int = 0) -> Schedules:
    """Have ``configure_optimizers`` make new schedulers for a phase, and let them drive the running optimizers.

    ``epochs`` is -1 for a phase without end; ``steps_before`` counts the steps before the phase. Raise
    MisconfigurationException if ``configure_optimizers`` returns other optimizers than before.
    """
    with seen_as_whole(trainer, epochs, steps_before):
        optimizers, configs = lightning_internals.new_optimizers(pl_module)
    if [type(optimizer) for optimizer in optimizers] != [type(optimizer) for optimizer in trainer.optimizers]:
        raise MisconfigurationException(
            "`configure_optimizers` must return the same optimizers whenever it is called: IMP calls it again to make"
            " learning-rate schedulers that are as long as the last phase."
        )
    running = {id(new): old for new, old in zip(optimizers, trainer.optimizers, strict=True)}
    for config in configs:
        _put_under(config.scheduler, running, set())
    return Schedules(configs, [optimizer.state_dict()["param_groups"] for optimizer in optimizers])


def adapted(then: Any, short: Any, long: Any) -> Any:
    """Adapt a scheduler's state to the length of another phase, and keep its position in the schedule.

    ``then`` is the ``state_dict()`` to adapt, ``short`` that of a new scheduler for the same phase, and ``long`` that
    of a new scheduler for the other phase. The result has the values of ``long`` wherever the two new ones differ.

    Examples:
        >>> adapted({"T_max": 5, "last_epoch": 2}, {"T_max": 5, "last_epoch": 0}, {"T_max": 8, "last_epoch": 0})
        {'T_max': 8, 'last_epoch': 2}

    """
    if isinstance(then, Mapping) and isinstance(short, Mapping) and isinstance(long, Mapping):
        return {key: adapted(value, short.get(key), long.get(key)) for key, value in then.items()}
    lists = (then, short, long)
    if all(isinstance(values, list) for values in lists) and len({len(values) for values in lists}) == 1:
        return [adapted(*values) for values in zip(*lists, strict=True)]
    return then if short == long else long


def check_frequencies(configs: Sequence[LRSchedulerConfig], period: int, offset: int) -> None:
    """Raise if a scheduler steps every few epochs and would step at other times in one cycle than in the next.

    ``period`` is the number of epochs per cycle, ``offset`` the number that a rewind skips.
    """
    for config in configs:
        if config.interval == "epoch" and (period % config.frequency or offset % config.frequency):
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} steps every {config.frequency} epochs, which does not divide"
                f" `epochs_per_cycle={period}` and `rewind_epoch={offset}`: cycles would differ in their learning"
                " rates. Choose multiples of the scheduler's `frequency`."
            )


def check_lengths(configs: Sequence[LRSchedulerConfig], steps: float, steps_per_epoch: float, phase: str) -> None:
    """Raise if the ``total_steps`` of OneCycleLR end before its phase does, since it then stops training.

    ``steps`` is the number of optimizer steps in the phase, infinite if it has no end; ``phase`` names it in the error.
    """
    for config in configs:
        if not isinstance(config.scheduler, OneCycleLR):
            continue
        needed = steps if config.interval == "step" else steps / steps_per_epoch
        needed = needed // config.frequency if math.isfinite(needed) else needed
        if needed > config.scheduler.total_steps:
            raise MisconfigurationException(
                f"OneCycleLR has total_steps={config.scheduler.total_steps}, but {phase} takes"
                f" {f'{needed:g}' if math.isfinite(needed) else 'endless'} steps. Set it to"
                " `self.trainer.estimated_stepping_batches` in `configure_optimizers`, where this is the length of each"
                " phase, and set `max_epochs`."
            )


def _put_under(scheduler: Any, running: Mapping[int, Optimizer], seen: set[int]) -> None:
    """Let a scheduler, and the schedulers that it consists of, drive the running optimizers."""
    if id(scheduler) in seen:
        return
    seen.add(id(scheduler))
    for name, value in vars(scheduler).items():
        if isinstance(value, Optimizer):
            setattr(scheduler, name, running[id(value)])
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if hasattr(part, "optimizer"):
                _put_under(part, running, seen)
