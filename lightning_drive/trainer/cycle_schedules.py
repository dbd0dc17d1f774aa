"""Learning-rate schedules of an IMP run: one of the length of a cycle, and one of the length of the last phase."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_drive.network.rewinding import RewindPoint
from lightning_drive.trainer import phase_schedules, step_counts
from lightning_drive.trainer.phase_schedules import Schedules


class Cycles(NamedTuple):
    """The cycles of an IMP run."""

    number: int
    epochs: int
    """Epochs per cycle."""
    rewind_epoch: int

    def __str__(self) -> str:
        return f"cycles={self.number}, epochs_per_cycle={self.epochs}"

    @property
    def method(self) -> str:
        """The method as reports and plans name it."""
        return f"IMP({self}, rewind_epoch={self.rewind_epoch})"

    @property
    def last_cut(self) -> int:
        """The epoch at whose start the last cut is due."""
        return self.number * self.epochs


class CycleSchedules:
    """The learning-rate schedules of one ``fit``, created in ``setup``.

    A ``cut_step`` is the global step of the last cut, ``None`` before it.
    """

    def __init__(self, cycles: Cycles, max_epochs: int) -> None:
        self._cycles = cycles
        # Epochs of a schedule, those before the rewind included.
        self._cycle_length = cycles.rewind_epoch + cycles.epochs
        self._ticket_length = -1 if max_epochs == -1 else cycles.rewind_epoch + max_epochs - cycles.last_cut
        self._planned: int | None = None
        self._undo_plan: Callable[[], None] | None = None
        self._configs: list[LRSchedulerConfig] = []

    @property
    def are_planned(self) -> bool:
        """Whether ``configure_optimizers`` made the schedules for a phase of this run."""
        return self._planned is not None

    def plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let ``configure_optimizers`` see one cycle, until :meth:`begin`."""
        self._planned = self._cycle_length
        self._undo_plan = phase_schedules.plan(trainer, pl_module, self._planned)

    def begin(self, trainer: pl.Trainer) -> None:
        """Take over the schedulers that ``configure_optimizers`` made."""
        self.end()
        self._configs = list(trainer.lr_scheduler_configs)

    def end(self) -> None:
        """Restore ``configure_optimizers``."""
        if self._undo_plan is not None:
            self._undo_plan()
        self._undo_plan = None

    def resume(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut_step: int | None) -> None:
        """Make schedulers for the phase of a checkpoint if the present ones have another length."""
        length = self._cycle_length if cut_step is None else self._ticket_length
        configs = trainer.lr_scheduler_configs  # empty also where SWA, resumed itself, has taken over
        if configs and length != self._planned:
            if cut_step is None:
                new = phase_schedules.schedules_for(trainer, pl_module, length)
            else:
                new = self._of_ticket(trainer, pl_module, cut_step)
            for config, old in zip(new.configs, configs, strict=True):
                config.scheduler.load_state_dict(old.scheduler.state_dict())
            trainer.lr_scheduler_configs[:] = self._configs = new.configs
        self._planned = self._cycle_length

    def rewind_(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, start: RewindPoint, cut_step: int | None
    ) -> None:
        """Rewind the Trainer's optimizers and schedulers to the start of the phase that begins."""
        start = self._start_of_phase(trainer, pl_module, start, cut_step)
        start.rewind_optimizers_(trainer.optimizers, learning_rates=True)
        start.rewind_schedulers_([config.scheduler for config in self._configs])
        trainer.lr_scheduler_configs[:] = self._configs  # SWA may have put its own there

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut_step: int | None) -> None:
        """Raise if cycles would differ in their learning rates, or a schedule ends before its phase does."""
        phase_schedules.check_frequencies(self._configs, self._cycles.epochs, self._cycles.rewind_epoch)
        steps_per_epoch = step_counts.steps_per_epoch(trainer)
        if not self._configs or math.isinf(steps_per_epoch):
            return
        steps = self._cycle_length * steps_per_epoch
        phase_schedules.check_lengths(self._configs, steps, steps_per_epoch, "an IMP cycle")
        if self._ticket_has_another_length:
            configs = self._of_ticket(trainer, pl_module, cut_step).configs
            steps = math.inf if self._ticket_length == -1 else self._ticket_length * steps_per_epoch
            if trainer.max_steps >= 0:
                steps = min(steps, trainer.max_steps - self._steps_before_ticket(trainer, cut_step))
            phase_schedules.check_lengths(configs, steps, steps_per_epoch, "training the ticket")

    def _start_of_phase(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, start: RewindPoint, cut_step: int | None
    ) -> RewindPoint:
        """Make schedulers for the phase that begins, and return the rewind point adapted to them."""
        if cut_step is not None and self._ticket_has_another_length and start.schedulers:
            long = self._of_ticket(trainer, pl_module, cut_step)
            self._configs = long.configs
            if not self._cycles.rewind_epoch:  # all schedules are at their beginning
                groups = zip(start.optimizers, long.param_groups, strict=True)
                optimizers = [{**state, "param_groups": group} for state, group in groups]
                return replace(start, optimizers=optimizers, schedulers=long.states)
            short = phase_schedules.schedules_for(trainer, pl_module, self._cycle_length)
            states = zip(start.schedulers, short.states, long.states, strict=True)
            return replace(start, schedulers=[phase_schedules.adapted(*state) for state in states])
        if len(self._configs) != len(start.schedulers):  # SWA removes them where it is resumed itself
            self._configs = phase_schedules.schedules_for(trainer, pl_module, self._cycle_length).configs
        return start

    def _of_ticket(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut_step: int | None) -> Schedules:
        steps_before = self._steps_before_ticket(trainer, cut_step)
        return phase_schedules.schedules_for(trainer, pl_module, self._ticket_length, steps_before)

    def _steps_before_ticket(self, trainer: pl.Trainer, cut_step: int | None) -> int:
        """Return the number of steps before the last phase, less those that its schedule starts with."""
        steps = self._cycles.last_cut * step_counts.steps_per_epoch(trainer) if cut_step is None else cut_step
        return round(steps * (1 - self._cycles.rewind_epoch / self._cycles.last_cut))

    @property
    def _ticket_has_another_length(self) -> bool:
        return self._planned is not None and self._ticket_length != self._planned
