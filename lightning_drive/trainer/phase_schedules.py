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
    """Let the Trainer say that training is as long as one phase: ``max_epochs``, ``estimated_stepping_batches``.

    Args:
        trainer: The Trainer.
        epochs: Length of the phase; -1: without end.
        steps_before: Steps that were taken before the phase; they do not count for its ``max_steps``.

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
    """Let ``configure_optimizers`` see one phase as the whole training.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        epochs: Length of the phase.

    Returns:
        A function that undoes it.

    """
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
    """Schedulers for a phase, over the running optimizers, and what they were made with."""

    configs: list[LRSchedulerConfig]
    """The schedulers at their beginning, with the Trainer's settings for them."""
    param_groups: list[list[dict[str, Any]]]
    """The settings with which each optimizer begins the phase, such as its first learning rate."""

    @property
    def states(self) -> list[dict[str, Any]]:
        """The states of the schedulers."""
        return [config.scheduler.state_dict() for config in self.configs]


def schedules_for(trainer: pl.Trainer, pl_module: pl.LightningModule, epochs: int, steps_before: int = 0) -> Schedules:
    """Have ``configure_optimizers`` make schedulers for a phase, and put the running optimizers under them.

    Args:
        trainer: A Trainer in the middle of ``fit``.
        pl_module: Its module.
        epochs: Length of the phase; -1: without end.
        steps_before: Steps that were taken before the phase.

    Returns:
        New schedulers at their beginning.

    Raises:
        MisconfigurationException: If there are other optimizers than before.

    """
    with seen_as_whole(trainer, epochs, steps_before):
        optimizers, configs = lightning_internals.new_optimizers(pl_module)
    if [type(optimizer) for optimizer in optimizers] != [type(optimizer) for optimizer in trainer.optimizers]:
        raise MisconfigurationException(
            "`configure_optimizers` must give the same optimizers whenever it is called: IMP calls it again to make"
            " learning-rate schedulers that are as long as the last phase."
        )
    running = {id(new): old for new, old in zip(optimizers, trainer.optimizers, strict=True)}
    for config in configs:
        _put_under(config.scheduler, running, set())
    return Schedules(configs, [optimizer.state_dict()["param_groups"] for optimizer in optimizers])


def adapted(then: Any, short: Any, long: Any) -> Any:
    """Give a scheduler's state the length of another phase, and leave where in the schedule it is.

    Args:
        then: The ``state_dict()`` to adapt.
        short: That of a new scheduler for the phase that ``then`` is from.
        long: That of a new scheduler for the other phase.

    Returns:
        ``then``, with the values of ``long`` wherever the two new ones differ.

    Example:
        >>> adapted({"T_max": 5, "last_epoch": 2}, {"T_max": 5, "last_epoch": 0}, {"T_max": 8, "last_epoch": 0})
        {'T_max': 8, 'last_epoch': 2}

    """
    if isinstance(then, Mapping) and isinstance(short, Mapping) and isinstance(long, Mapping):
        return {key: adapted(value, short.get(key), long.get(key)) for key, value in then.items()}
    lists = (then, short, long)
    if all(isinstance(each, list) for each in lists) and len({len(each) for each in lists}) == 1:
        return [adapted(*each) for each in zip(*lists, strict=True)]
    return then if short == long else long


def check_frequencies(configs: Sequence[LRSchedulerConfig], period: int, offset: int) -> None:
    """Refuse schedulers that would step in other epochs of one cycle than of the next.

    Args:
        configs: The Trainer's schedulers.
        period: Epochs per cycle.
        offset: Epochs that a rewind skips.

    Raises:
        MisconfigurationException: If a scheduler steps every few epochs, and they do not divide both.

    """
    for config in configs:
        if config.interval == "epoch" and (period % config.frequency or offset % config.frequency):
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} steps every {config.frequency} epochs, which does not divide"
                f" `epochs_per_cycle={period}` and `rewind_epoch={offset}`: cycles would differ in their learning"
                " rates. Choose multiples of the scheduler's `frequency`."
            )


def check_lengths(configs: Sequence[LRSchedulerConfig], steps: float, steps_per_epoch: float, phase: str) -> None:
    """Refuse a schedule that ends before its phase does: OneCycleLR then stops training with an error.

    Args:
        configs: The schedulers of the phase.
        steps: Optimizer steps in the phase, infinite where it has no end.
        steps_per_epoch: Optimizer steps in an epoch.
        phase: What to call the phase.

    Raises:
        MisconfigurationException: If ``total_steps`` is too low.

    """
    for config in configs:
        if not isinstance(config.scheduler, OneCycleLR):
            continue
        needed = steps if config.interval == "step" else steps / steps_per_epoch
        needed = needed // config.frequency if math.isfinite(needed) else needed
        if needed > config.scheduler.total_steps:
            raise MisconfigurationException(
                f"OneCycleLR has total_steps={config.scheduler.total_steps}, but {phase} takes"
                f" {f'{needed:g}' if math.isfinite(needed) else 'endless'} steps. Give it"
                " `self.trainer.estimated_stepping_batches` in `configure_optimizers`, which is the length of each"
                " phase there, and set `max_epochs`."
            )


def _put_under(scheduler: Any, running: Mapping[int, Optimizer], seen: set[int]) -> None:
    """Let a scheduler, and those that it is made of, drive the running optimizers."""
    if id(scheduler) in seen:
        return
    seen.add(id(scheduler))
    for name, value in vars(scheduler).items():
        if isinstance(value, Optimizer):
            setattr(scheduler, name, running[id(value)])
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if hasattr(part, "optimizer"):
                _put_under(part, running, seen)
