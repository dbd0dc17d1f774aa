"""Iterative magnitude pruning: cycles of training, pruning and rewinding inside one fit."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_drive.callbacks.repeated_base import RepeatedPruningCallback
from lightning_drive.core import arguments
from lightning_drive.core.arguments import Control, Schedule, Scope, Sparsity
from lightning_drive.report import plan
from lightning_drive.report.plan import PruningPlan
from lightning_drive.search.methods import Magnitude
from lightning_drive.trainer import cycle_checks, end_of_training, restored_masks, search_in_fit, step_counts, terminal
from lightning_drive.trainer.cycle_schedules import Cycles, CycleSchedules
from lightning_drive.trainer.saved_state import SavedState


class IMPPruningCallback(RepeatedPruningCallback):
    """Find a lottery ticket by iterative magnitude pruning (IMP), and train it, inside one ``trainer.fit``.

    In each cycle the network trains for ``epochs_per_cycle`` epochs. Then the weights of the smallest magnitude are
    removed, and everything else returns to its state at the start of epoch ``rewind_epoch``: surviving weights,
    biases, all buffers, optimizer state and learning-rate schedules (Frankle & Carbin, 2019; with ``rewind_epoch`` > 0,
    Frankle et al., 2020). After cycle ``c`` of ``C`` exactly ``round(P * (1 - sparsity) ** (c / C))`` of the ``P``
    prunable weights are left. The last cut falls at the start of epoch ``cycles * epochs_per_cycle``, and the ticket
    trains from there to ``max_epochs``, which must be larger.

    ``configure_optimizers`` sees each phase as if it were the whole training: ``trainer.max_epochs`` is
    ``rewind_epoch + epochs_per_cycle`` there, and ``trainer.estimated_stepping_batches`` agrees with it. If the last
    phase has another length, ``configure_optimizers`` is called once more for its schedulers.

    Running averages (EMA, SWA) begin again with every cycle. EarlyStopping is held off until the last cut, after which
    ModelCheckpoint starts tracking again. Checkpoints hold a copy of the rewind point until the last cut. A cut that
    leaves no path from input to output ends the run with an error.

    Args:
        sparsity: Fraction of the prunable weights to remove in all, in ``[0, 1)``; 0.98 keeps 2 %. Or a mapping
            from glob patterns over parameter names to such fractions, see :func:`lightning_drive.find_masks`.
        cycles: How often to train, prune and rewind, at least 1.
        epochs_per_cycle: Epochs to train before each cut, at least 1.
        rewind_epoch: The epoch of the first cycle to whose start everything returns, from 0 (the initial weights) to
            ``epochs_per_cycle - 1``.
        schedule: ``exponential`` removes the same fraction of the survivors in every cycle, ``linear`` the same
            number of weights, ``cubic`` many in the first cycles and few in the last. Or a function, see
            :func:`lightning_drive.find_masks`.
        scope: ``global`` ranks all weights together; with ``layerwise`` every parameter keeps the same fraction, with
            ``erk`` (Evci et al., 2020) a larger one the smaller it is.
        include: Glob patterns over parameter names; only what matches is pruned. Default: the weights of all
            layers that multiply by them. ``["*"]``: everything of two dimensions or more.
        exclude: Glob patterns over parameter names that stay dense.
        bn_batches: At least 0, as in the other callbacks, but without effect here: BatchNorm's statistics return with
            the weights.
        reset_best: Whether ModelCheckpoint and EarlyStopping forget their results from before the last cut; until
            then, EarlyStopping is held off.
        control: For comparison: ``shuffle`` shuffles the final masks within each parameter; ``reinit`` keeps the
            masks, and trains from new initial values of the survivors. Default: neither.
        accelerate: Whether the pruned network trains in sparse forms: layers whose forward and backward pass is faster
            so on this machine, measured at the first batch after each cut (on a CPU). Sums come in another order, so
            weights agree with those of a dense run, or of a run that is resumed, within rounding, not bit for bit.

    Attributes:
        masks: The masks (:class:`lightning_drive.Masks`), on the CPU; empty in the first cycle.
        pruned: Whether the network has been pruned: ``False`` in the first cycle.
        report: The latest report (:class:`lightning_drive.PruningReport`); ``None`` in the first cycle.
        cycle: The number of finished cycles, from 0 to ``cycles``.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.

    Examples:
        Five cycles of ten epochs, and 30 epochs for the ticket:

        >>> import lightning.pytorch as pl
        >>> callback = IMPPruningCallback(sparsity=0.9, cycles=5, epochs_per_cycle=10)
        >>> trainer = pl.Trainer(max_epochs=5 * 10 + 30, callbacks=[callback], logger=False)

    """

    def __init__(
        self,
        *,
        sparsity: Sparsity,
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
        accelerate: bool = False,
    ) -> None:
        self.cycles = arguments.check_count("cycles", cycles)
        self.epochs_per_cycle = arguments.check_count("epochs_per_cycle", epochs_per_cycle)
        self.rewind_epoch = arguments.check_count("rewind_epoch", rewind_epoch, least=0)
        self.bn_batches = arguments.check_count("bn_batches", bn_batches, least=0)
        if self.rewind_epoch >= self.epochs_per_cycle:
            raise ValueError(
                f"`rewind_epoch` is an epoch of the first cycle, so it must be less than `epochs_per_cycle`"
                f" ({self.epochs_per_cycle}), got {self.rewind_epoch}."
            )
        if control == "reinit" and self.rewind_epoch > 0:
            raise ValueError(
                "`control='reinit'` trains from new initial values, so it needs `rewind_epoch=0`, got"
                f" rewind_epoch={self.rewind_epoch}."
            )
        super().__init__(
            sparsity=sparsity,
            schedule=schedule,
            scope=scope,
            include=include,
            exclude=exclude,
            reset_best=reset_best,
            control=control,
            accelerate=accelerate,
            remember_epoch=self.rewind_epoch,
        )
        self._goal.check_schedule(self.cycles)
        self._schedules: CycleSchedules | None = None  # those of this ``fit``

    @property
    def cycle(self) -> int:
        """The number of finished cycles, from 0 to ``cycles``."""
        return 0 if self.report is None or self.report.cycle is None else self.report.cycle

    # Hooks.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let ``configure_optimizers`` see one cycle."""
        super().setup(trainer, pl_module, stage)
        self._schedules = CycleSchedules(self._cycles, self._fit.max_epochs)
        if stage != "fit" or step_counts.is_quick_check(trainer):
            return
        if self._finished and self.masks.hold_for(pl_module):
            return
        cycle_checks.check_epochs(self, self._cycles, self._fit.max_epochs)
        self._schedules.plan(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if the module cannot be pruned, and start afresh on a module that the masks are not for."""
        assert self._schedules is not None
        self._schedules.end()
        super().on_fit_start(trainer, pl_module)
        self._schedules.begin(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put restored masks on, and set up the schedule of the phase that the run is in."""
        if self._fit.is_restored and not step_counts.is_quick_check(trainer):
            assert self._schedules is not None
            if not self._finished:
                cycle_checks.check_epochs(self, self._cycles, self._fit.max_epochs)
            self._schedules.resume(trainer, pl_module, self._cut_step)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Name the cycle in the progress bar, which has just named the epoch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0 and not self._finished:
            terminal.name_epoch(trainer, f"cycle {self.cycle + 1}/{self.cycles}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if training ended before the last cycle did."""
        if not self._finished:
            sparsities = self._sparsities(trainer, pl_module)
            end_of_training.warn_of_open_cycles(trainer, self._cycles, self.cycle, *sparsities)

    @override
    def _check_settings(self, saved: SavedState) -> None:
        cycle_checks.check_settings(saved, self._settings())

    def __getstate__(self) -> dict[str, Any]:
        """Leave the live parameters, schedulers and hooks of this process out of copies and pickles."""
        return {**super().__getstate__(), "_schedules": None}

    # Pruning.

    @property
    @override
    def _finished(self) -> bool:
        return self.cycle >= self.cycles

    @property
    def _cycles(self) -> Cycles:
        return Cycles(self.cycles, self.epochs_per_cycle, self.rewind_epoch)

    @property
    def _cut_step(self) -> int | None:
        """The global step of the last cut; ``None`` before it."""
        return self.report.step if self._finished and self.report is not None else None

    @property
    @override
    def _last_epoch(self) -> int:
        return self._cycles.last_cut

    @override
    def _plan(self, module: nn.Module, selected: Mapping[str, nn.Parameter], **run: Any) -> PruningPlan:
        return plan.plan(
            module,
            selected,
            method=self._cycles.method,
            **plan.counts(self._goal, selected, self.cycles),
            passes=0,
            pass_over="",
            unit="cycle",
            first_epoch=self.epochs_per_cycle,
            last_epoch=self._last_epoch,
            **run,
        )

    @override
    def _check_run(self, module: nn.Module, max_epochs: int = -1, steps_per_epoch: int | None = None) -> None:
        cycle_checks.check_epochs(self, self._cycles, max_epochs)

    @override
    def _is_due(self, trainer: pl.Trainer) -> bool:
        return self._due_cycle(trainer) > self.cycle

    def _due_cycle(self, trainer: pl.Trainer) -> int:
        if step_counts.is_quick_check(trainer):
            return self.cycles
        return min(trainer.current_epoch // self.epochs_per_cycle, self.cycles)

    @override
    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.monotonic()
        cycle = self._due_cycle(trainer)
        control: Control = self.control if cycle == self.cycles else "none"
        left_out = self._left_out(trainer, pl_module, "first cycle")
        outcome = self._search(
            trainer,
            pl_module,
            Magnitude(rounds=self.cycles),
            self._selected(trainer, pl_module),
            only_round=cycle,
            shuffle=search_in_fit.shuffle(trainer, control),
        )
        if not step_counts.is_quick_check(trainer):
            cycle_checks.check_paths(outcome, cycle, self._cycles, self.scope)
        outcome.found.warnings.extend(left_out)
        # Everything is computed: from here on only commit.
        self._record(trainer, outcome, self._cycles.method, start, control=control, cycle=cycle)
        forgotten = self._commit(trainer, pl_module)
        self._announce(trainer, outcome, forgotten, None if cycle == self.cycles else self._line())

    @override
    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._start is not None  # it is kept until training goes on after the last cut
        assert self._schedules is not None
        if self._finished and self.control == "reinit":
            self._reinitialise(trainer, pl_module)
        else:
            self._start.rewind_module_(pl_module, self.masks)
        self._schedules.rewind_(trainer, pl_module, self._start, self._cut_step)
        self._pruned_along(trainer, pl_module).restart_()
        super()._settle(trainer, pl_module)

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
        names = ("cycles", "epochs_per_cycle", "rewind_epoch")
        own = {name: int(getattr(self, name)) for name in names}
        return {**self._goal.settings(self.cycles), **super()._settings(), **own}

    @override
    def _release(self) -> None:
        if self._schedules is not None:
            self._schedules.end()
        self._schedules = None
        super()._release()

    # Checks before training starts.

    @override
    def _check_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._check_training(trainer, pl_module)
        self.masks.parameters_of(pl_module)  # raises for another module
        if self._fit.is_restored and self.pruned:
            run, select = f"cycle {self.cycle} of an IMP run", partial(self._selected, trainer)
            restored_masks.check_selection(self, run, "cycle", select, pl_module)
        if step_counts.is_quick_check(trainer) or self._schedules is None or not self._schedules.are_planned:
            return
        cycle_checks.check_training(self, trainer, pl_module, self._cycles)
        self._schedules.check(trainer, pl_module, self._cut_step)
        cycle_checks.check_swa(self, trainer, self._cycles)
