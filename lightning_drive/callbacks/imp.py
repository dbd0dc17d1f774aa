"""Iterative magnitude pruning: cycles of training, pruning and rewinding inside one fit."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_drive.callbacks.base import PruningCallback
from lightning_drive.core import arguments, saved_values
from lightning_drive.core.arguments import Control, Schedule, Scope
from lightning_drive.core.masks import collapsed_layers
from lightning_drive.core.messages import listed, shown
from lightning_drive.network.rewinding import RewindPoint
from lightning_drive.report.plan import Intent
from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.search.loop import Found
from lightning_drive.search.methods import Magnitude
from lightning_drive.search.vanishing_scores import patterns
from lightning_drive.trainer import (
    display,
    facts,
    loop_progress,
    other_callbacks,
    phases,
    restored_masks,
    run_length,
    training_step,
)


class IMPPruningCallback(PruningCallback):
    """Find a lottery ticket by iterative magnitude pruning (IMP), and train it, inside one ``trainer.fit``.

    In each cycle the network trains for ``epochs_per_cycle`` epochs. Then the weights of the smallest magnitude are
    removed, and everything else returns to where it was at the start of epoch ``rewind_epoch``: surviving weights,
    biases, all buffers, optimizer state and learning-rate schedules (Frankle & Carbin, 2019; with ``rewind_epoch`` > 0,
    Frankle et al., 2020). After cycle ``c`` of ``C`` exactly ``round(P * (1 - sparsity) ** (c / C))`` of the ``P``
    prunable weights are left. The last cut falls at the start of epoch ``cycles * epochs_per_cycle``, and the ticket
    trains from there to ``max_epochs``, which must be larger.

    ``configure_optimizers`` sees each phase as if it were the whole training: ``trainer.max_epochs`` is there
    ``rewind_epoch + epochs_per_cycle``, and ``trainer.estimated_stepping_batches`` goes with it. If the last phase is
    of another length, ``configure_optimizers`` is called once more for its schedulers.

    Running averages (EMA, SWA) begin again with every cycle. EarlyStopping is held off until the last cut, and
    ModelCheckpoint then tracks the best anew. Checkpoints hold a copy of the rewind point until the last cut. A network
    that a cut leaves without a path from input to output ends the run with an error.

    Args:
        sparsity: Fraction of the prunable weights to remove in all, in ``[0, 1)``: 0.98 keeps 2 %.
        cycles: How often to train, prune and rewind, at least 1.
        epochs_per_cycle: Epochs to train before each cut, at least 1.
        rewind_epoch: The epoch of the first cycle to whose start everything returns, from 0 (the initial weights) to
            ``epochs_per_cycle - 1``.
        schedule: ``exponential`` removes the same fraction of the survivors in every cycle, ``linear`` the same
            number of weights.
        scope: ``global`` ranks all weights together; with ``layerwise`` every parameter keeps the same fraction.
        include: Glob patterns over parameter names; only what matches is pruned. Default: the weights of all
            layers that multiply by them. ``["*"]``: everything of two dimensions or more.
        exclude: Glob patterns over parameter names that stay dense.
        bn_batches: At least 0, as in the other callbacks, but without effect here: BatchNorm's statistics return with
            the weights.
        reset_best: Whether ModelCheckpoint and EarlyStopping forget what was before the last cut, until which
            EarlyStopping is held off.
        control: For comparison: ``shuffle`` shuffles the final masks within each parameter; ``reinit`` keeps the
            masks, and trains from new initial values of the survivors. Default: neither.

    Attributes:
        masks: The masks (:class:`lightning_drive.Masks`), on the CPU; empty in the first cycle.
        pruned: Whether the network has been pruned: ``False`` in the first cycle.
        report: What was pruned last (:class:`lightning_drive.PruningReport`); ``None`` in the first cycle.
        cycle: How many cycles lie behind, from 0 to ``cycles``.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.

    Example:
        Five cycles of ten epochs, and 30 epochs for the ticket:

        >>> import lightning.pytorch as pl
        >>> callback = IMPPruningCallback(sparsity=0.9, cycles=5, epochs_per_cycle=10)
        >>> trainer = pl.Trainer(max_epochs=5 * 10 + 30, callbacks=[callback], logger=False)

    """

    def __init__(
        self,
        *,
        sparsity: float,
        cycles: int = 50,
        epochs_per_cycle: int = 20,
        rewind_epoch: int = 0,
        schedule: Schedule = "exponential",
        scope: Scope = "global",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        bn_batches: int = 20,
        reset_best: bool = True,
        control: Control = "none",
    ) -> None:
        cycles = arguments.check_count("cycles", cycles)
        epochs_per_cycle = arguments.check_count("epochs_per_cycle", epochs_per_cycle)
        rewind_epoch = arguments.check_count("rewind_epoch", rewind_epoch, least=0)
        bn_batches = arguments.check_count("bn_batches", bn_batches, least=0)
        if rewind_epoch >= epochs_per_cycle:
            raise ValueError(
                f"`rewind_epoch` is an epoch of the first cycle, so it must be less than `epochs_per_cycle`"
                f" ({epochs_per_cycle}), got {rewind_epoch}."
            )
        if control == "reinit" and rewind_epoch > 0:
            raise ValueError(
                "`control='reinit'` trains from new initial values, so it needs `rewind_epoch=0`, got"
                f" rewind_epoch={rewind_epoch}."
            )
        super().__init__(
            sparsity=sparsity,
            schedule=schedule,
            scope=scope,
            include=include,
            exclude=exclude,
            reset_best=reset_best,
            control=control,
            remember_epoch=rewind_epoch,
        )
        self.cycles = cycles
        self.epochs_per_cycle = epochs_per_cycle
        self.rewind_epoch = rewind_epoch
        self.bn_batches = bn_batches
        self._without_gradient: set[str] | None = None  # names of what has had none in the first cycle
        self._planned: int | None = None
        self._undo_plan: Callable[[], None] | None = None
        self._schedulers: list[LRSchedulerConfig] = []

    @property
    def cycle(self) -> int:
        """How many cycles lie behind."""
        return 0 if self.report is None or self.report.cycle is None else self.report.cycle

    # When.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let ``configure_optimizers`` see one cycle."""
        super().setup(trainer, pl_module, stage)
        self._planned = None
        if stage != "fit" or facts.is_quick_check(trainer):
            return
        if self._finished and self.masks.hold_for(pl_module):
            return
        self._check_epochs()
        self._planned = self._cycle_length
        self._undo_plan = phases.plan(trainer, pl_module, self._planned)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, and start afresh on a module that the masks were not made for."""
        self._forget_plan()
        super().on_fit_start(trainer, pl_module)
        self._schedulers = list(trainer.lr_scheduler_configs)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up restored masks again, and a schedule for the phase that the run is in."""
        if self._restored and not facts.is_quick_check(trainer):
            self._resume_schedule(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        if self._without_gradient is None:
            self._without_gradient = set() if self.pruned else set(self._selected(trainer, pl_module))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mask the gradients; in the first cycle, note what has one."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._without_gradient and not self.pruned:
            names = self._without_gradient
            self._without_gradient = {name for name in names if pl_module.get_parameter(name).grad is None}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Save also what has had no gradient so far."""
        names = self._without_gradient
        return {**super().state_dict(), "without_gradient": None if names is None else sorted(names)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, now or in an earlier version."""
        what = "the names of what had no gradient in the callback state"
        names = saved_values.check(list[str] | None, dict(state_dict).get("without_gradient"), what)
        super().load_state_dict(state_dict)
        self._without_gradient = None if names is None else set(names)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the cycle in the progress bar, which has just named the epoch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0 and not self._finished:
            display.name_epoch(trainer, f", cycle {self.cycle + 1}/{self.cycles}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before its cycles did."""
        if not self._finished:
            rank_zero_warn(
                f"Training ended in epoch {run_length.last_epoch(trainer)}{run_length.reason(trainer)}, in cycle"
                f" {self.cycle} (counted from 0) of {self.cycles}: the network has a sparsity of"
                f" {self.masks.sparsity:.4f}, not {self.sparsity}. The next cut would have been at the start of epoch"
                f" {(self.cycle + 1) * self.epochs_per_cycle}. Let training run for more than"
                f" {self.cycles * self.epochs_per_cycle} epochs, or lower `cycles` or `epochs_per_cycle`."
            )

    @override
    def _check_settings(self, then: dict[str, Any], report: PruningReport | None) -> None:
        """Raise if cycles are left and would go on with other settings; older checkpoints do not have them all."""
        now, cycle = self._settings(), 0 if report is None else report.cycle or 0
        cycles = saved_values.check(int, then.get("cycles"), "the number of cycles in the checkpoint's settings")
        names = [name for name in now if name in then and name not in ("include", "exclude")]
        other = [name for name in names if type(then[name]) is not type(now[name]) or then[name] != now[name]]
        if cycle < cycles and other:
            before, after = ({name: shown(of[name]) for name in other} for of in (then, now))
            raise ValueError(
                f"The checkpoint is from cycle {cycle} of an IMP run with {_listed(before)}, but this"
                f" IMPPruningCallback has {_listed(after)}: its cycles would not follow on. Resume with the settings of"
                " the checkpoint."
            )

    @override
    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._without_gradient = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the live parameters, schedulers and hooks of this process out of copies and pickles."""
        return {**super().__getstate__(), "_undo_plan": None, "_schedulers": []}

    # What happens when it is time.

    @property
    @override
    def _finished(self) -> bool:
        return self.cycle >= self.cycles

    @override
    def _intent(self) -> Intent:
        return Intent(self._method(), self.cycles, 0, "", self.epochs_per_cycle, self.cycles * self.epochs_per_cycle)

    @override
    def _is_due(self, trainer: pl.Trainer) -> bool:
        return self._due_cycle(trainer) > self.cycle

    def _method(self) -> str:
        return f"IMP({_listed(self._cycle_settings())})"

    def _due_cycle(self, trainer: pl.Trainer) -> int:
        if facts.is_quick_check(trainer):
            return self.cycles
        return min(trainer.current_epoch // self.epochs_per_cycle, self.cycles)

    @override
    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.monotonic()
        cycle = self._due_cycle(trainer)
        is_last = cycle == self.cycles
        names = list(super()._selected(trainer, pl_module))
        left_out = [] if self.pruned else [name for name in names if name not in self._selected(trainer, pl_module)]
        outcome = self._search(
            trainer,
            pl_module,
            Magnitude(rounds=self.cycles),
            loss=training_step.loss_of,
            only_round=cycle,
            shuffle=is_last and self.control == "shuffle",
        )
        if not facts.is_quick_check(trainer):
            self._check_paths(outcome.found, cycle)
        if left_out:
            outcome.found.warnings.append(
                f"{listed(map(repr, left_out))} had no gradient in all of the first cycle: the loss does not depend on"
                " them, since they are not used, or only under `no_grad` or through `detach`. They are left out and"
                f" stay dense, as with `exclude={patterns(left_out, names)}`."
            )
        # Everything is computed: from here on only commit.
        self._record(trainer, outcome, self._method(), start, control=self.control if is_last else "none", cycle=cycle)
        self._commit(trainer, pl_module)
        with display.above_bar(trainer):
            self._announce(trainer, outcome.found, None if is_last else self._line())

    @override
    def _selected(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Select the prunable parameters that an optimizer holds and, from the first cut on, that had gradients."""
        selected = super()._selected(trainer, pl_module)
        left_out = self._without_gradient if self.pruned or self._is_due(trainer) else None
        reached = {name: each for name, each in selected.items() if name not in (left_out or ())}
        return reached or selected  # without any, no step has been seen

    @override
    def _others(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        return [name for name in super()._others(trainer, pl_module) if name not in (self._without_gradient or ())]

    def _check_paths(self, found: Found, cycle: int) -> None:
        """Raise if nothing is left to train."""
        if found.active is not None and not found.active.num_kept:
            empty = collapsed_layers(found.masks)
            where = f", and no weight is left in {listed(map(repr, empty))}" if empty else ""
            scope = "" if self.scope == "layerwise" else " set `scope='layerwise'`,"
            raise MisconfigurationException(
                f"After cycle {cycle} of {self.cycles}, at a sparsity of {found.masks.sparsity:.2%}, the network is cut"
                f" off: no path from its input to its output is left{where}. Nothing can come of the epochs that"
                f" follow. Lower `sparsity`, raise `cycles`,{scope} or leave small layers out with `exclude`."
            )

    @override
    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._start is not None  # it is kept until training goes on after the last cut
        start = self._start_of_phase(trainer, pl_module, self._start)
        if self._finished and self.control == "reinit":
            self._reinitialise(trainer, pl_module)
        else:
            start.snapshot.rewind_(pl_module, self.masks)
        start.rewind_optimizers_(trainer.optimizers, learning_rates=True)
        start.rewind_schedulers_([config.scheduler for config in self._schedulers])
        trainer.lr_scheduler_configs[:] = self._schedulers  # SWA may have put its own there
        self._restart_averages(trainer, pl_module)
        super()._settle(trainer, pl_module)

    def _start_of_phase(self, trainer: pl.Trainer, pl_module: pl.LightningModule, start: RewindPoint) -> RewindPoint:
        """Get schedulers for the phase that begins, and the rewind point as it is for them."""
        if self._finished and self._ticket_has_another_length and start.schedulers:
            long = self._schedules_of_the_ticket(trainer, pl_module)
            self._schedulers = long.configs
            if not self.rewind_epoch:  # all schedules are at their beginning
                groups = zip(start.optimizers, long.param_groups, strict=True)
                optimizers = [{**state, "param_groups": each} for state, each in groups]
                return replace(start, optimizers=optimizers, schedulers=long.states)
            short = phases.schedules_for(trainer, pl_module, self._cycle_length)
            states = zip(start.schedulers, short.states, long.states, strict=True)
            return replace(start, schedulers=[phases.adapted(*each) for each in states])
        if len(self._schedulers) != len(start.schedulers):  # SWA removes them where it is resumed itself
            self._schedulers = phases.schedules_for(trainer, pl_module, self._cycle_length).configs
        return start

    def _resume_schedule(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get schedulers for the phase of the checkpoint, where those at hand are of another length."""
        if not self._finished:
            self._check_epochs()
        length = self._ticket_length if self._finished else self._cycle_length
        configs = trainer.lr_scheduler_configs  # empty also where SWA, resumed itself, has taken over
        if configs and length != self._planned:
            if self._finished:
                new = self._schedules_of_the_ticket(trainer, pl_module)
            else:
                new = phases.schedules_for(trainer, pl_module, length)
            for config, old in zip(new.configs, configs, strict=True):
                config.scheduler.load_state_dict(old.scheduler.state_dict())
            trainer.lr_scheduler_configs[:] = self._schedulers = new.configs
        self._planned = self._cycle_length

    def _schedules_of_the_ticket(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> phases.Schedules:
        return phases.schedules_for(trainer, pl_module, self._ticket_length, self._steps_before_ticket(trainer))

    def _steps_before_ticket(self, trainer: pl.Trainer) -> int:
        """Count the steps before the last phase, without those that its learning-rate schedule has behind it."""
        last_cut = self.cycles * self.epochs_per_cycle
        if self._finished and self.report is not None:
            steps = float(self.report.step)
        else:  # before training, to see whether the schedule will do
            steps = last_cut * loop_progress.steps_per_epoch(trainer)
        return round(steps * (1 - self.rewind_epoch / last_cut))

    @property
    def _cycle_length(self) -> int:
        """How many epochs a learning-rate schedule runs in a cycle, those before the rewind point included."""
        return self.rewind_epoch + self.epochs_per_cycle

    @property
    def _ticket_length(self) -> int:
        """The same for the last phase; -1: without end."""
        if self._max_epochs == -1:
            return -1
        return self.rewind_epoch + self._max_epochs - self.cycles * self.epochs_per_cycle

    @property
    def _ticket_has_another_length(self) -> bool:
        return self._planned is not None and self._ticket_length != self._planned

    @override
    def _metrics(self) -> dict[str, float]:
        return {**super()._metrics(), "pruning/cycle": float(self.cycle)}

    def _line(self) -> str:
        return (
            f"IMP cycle {self.cycle} of {self.cycles} is over: {self.masks.num_kept:,} of"
            f" {self.masks.num_prunable:,} weights are kept (sparsity {self.masks.sparsity:.2%}), and training returns"
            f" to the start of epoch {self.rewind_epoch}."
        )

    @override
    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), **self._cycle_settings()}

    def _cycle_settings(self) -> dict[str, int]:
        names = ("cycles", "epochs_per_cycle", "rewind_epoch")
        return {name: int(getattr(self, name)) for name in names}

    @override
    def _release(self) -> None:
        self._forget_plan()
        super()._release()

    def _forget_plan(self) -> None:
        if self._undo_plan is not None:
            self._undo_plan()
            self._undo_plan = None

    # What is refused before training starts.

    def _check_epochs(self) -> None:
        last_cut = self.cycles * self.epochs_per_cycle
        if 0 <= self._max_epochs <= last_cut:
            raise MisconfigurationException(
                f"{type(self).__name__}(cycles={self.cycles}, epochs_per_cycle={self.epochs_per_cycle}) prunes for the"
                f" last time at the start of epoch {last_cut} (counted from 0) and then trains the ticket, but training"
                f" ends after max_epochs={self._max_epochs} epochs. Set `max_epochs` to {last_cut} plus the epochs for"
                " the ticket, or lower `cycles` or `epochs_per_cycle`."
            )

    @override
    def _check_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._check_training(trainer, pl_module)
        self.masks.parameters_of(pl_module)  # or it is another module
        if (
            self._restored
            and self.pruned
            and not restored_masks.is_selection(self.masks, partial(self._selected, trainer), pl_module)
        ):
            raise MisconfigurationException(
                f"The checkpoint is from cycle {self.cycle} of an IMP run that prunes other parameters than"
                f" `include={self.include}` and `exclude={self.exclude}` select now: its cycles would not follow on."
                f" Resume with the settings of the checkpoint, which select: {listed(self.masks)}."
            )
        if facts.is_quick_check(trainer) or self._planned is None:
            return
        last_cut = self.cycles * self.epochs_per_cycle
        steps_per_epoch = loop_progress.steps_per_epoch(trainer)
        is_known = pl_module.automatic_optimization  # else a batch may have any number of steps
        if is_known and 0 <= trainer.max_steps <= last_cut * steps_per_epoch < math.inf:
            raise MisconfigurationException(
                f"{type(self).__name__}(cycles={self.cycles}, epochs_per_cycle={self.epochs_per_cycle}) prunes for the"
                f" last time after {last_cut * steps_per_epoch:g} steps and then trains the ticket, but training ends"
                f" after max_steps={trainer.max_steps}. Raise `max_steps`, or lower `cycles` or `epochs_per_cycle`."
            )
        for callback in other_callbacks.callbacks_of(trainer):
            if isinstance(callback, GradientAccumulationScheduler) and len(callback.scheduling) > 1:
                raise MisconfigurationException(
                    f"{type(self).__name__} repeats the same training in every cycle, but"
                    f" GradientAccumulationScheduler(scheduling={callback.scheduling}) changes it at epochs counted"
                    " over the whole run. Accumulate the same number of batches throughout, with"
                    " `Trainer(accumulate_grad_batches=...)`."
                )
        phases.check_frequencies(self._schedulers, self.epochs_per_cycle, self.rewind_epoch)
        if self._schedulers and math.isfinite(steps_per_epoch):
            steps = self._cycle_length * steps_per_epoch
            phases.check_lengths(self._schedulers, steps, steps_per_epoch, "an IMP cycle")
            if self._ticket_has_another_length:
                configs = self._schedules_of_the_ticket(trainer, pl_module).configs
                steps = math.inf if self._ticket_length == -1 else self._ticket_length * steps_per_epoch
                if trainer.max_steps >= 0:
                    steps = min(steps, trainer.max_steps - self._steps_before_ticket(trainer))
                phases.check_lengths(configs, steps, steps_per_epoch, "training the ticket")
        for callback in other_callbacks.callbacks_of(trainer):
            if isinstance(callback, StochasticWeightAveraging):
                self._check_swa(trainer, callback)

    def _check_swa(self, trainer: pl.Trainer, swa: StochasticWeightAveraging) -> None:
        last_cut, callbacks = self.cycles * self.epochs_per_cycle, other_callbacks.callbacks_of(trainer)
        if swa.swa_start <= self.rewind_epoch or (
            swa.swa_start <= last_cut and callbacks.index(swa) < callbacks.index(self)
        ):
            raise MisconfigurationException(
                f"StochasticWeightAveraging replaces the learning-rate schedule in epoch {swa.swa_start}, before"
                f" {type(self).__name__} can return to it. Set `swa_epoch_start` to {last_cut + 1} or more, which"
                f" averages the ticket's training, and put {type(self).__name__} before it in `callbacks`."
            )
        if swa.swa_start < last_cut:
            rank_zero_warn(
                f"StochasticWeightAveraging starts in epoch {swa.swa_start}, before IMP's last cut at epoch"
                f" {last_cut}: its learning rate ends with the cycle, and its average begins again with every"
                f" cycle. To average the ticket's training, set `swa_epoch_start` to {last_cut + 1} or more."
            )


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
