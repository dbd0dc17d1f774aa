"""Gradual pruning: many small cuts inside one run, each after some training with what the last one left."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn
from typing_extensions import override

from lightning_drive.callbacks.repeated_base import RepeatedPruningCallback
from lightning_drive.core import arguments
from lightning_drive.core.arguments import Control, Criterion, Schedule, Scope, Sparsity
from lightning_drive.report import plan
from lightning_drive.report.plan import PruningPlan
from lightning_drive.search import methods
from lightning_drive.search.methods import DRIVE, Magnitude, Method
from lightning_drive.search.scoring_batches import NothingToScoreByError
from lightning_drive.trainer import (
    batches,
    checks,
    cut_window,
    end_of_training,
    frozen_layers,
    reporting,
    restored_masks,
    search_in_fit,
    step_counts,
    terminal,
)
from lightning_drive.trainer.cut_window import CutWindow
from lightning_drive.trainer.saved_state import Pruning, SavedState


class GradualPruningCallback(RepeatedPruningCallback):
    """Prune little by little inside one run, so that training makes up for every cut before the next.

    From the start of epoch ``start_epoch`` to that of ``end_epoch`` there are ``cuts_per_epoch`` cuts an epoch, each
    at the end of an equal part of the window ("To prune, or not to prune", Zhu & Gupta, 2018). Weights that are left
    go on as they are; pruned ones never return, and optimizers forget them. After cut ``c`` of ``C`` exactly
    ``round(P * density)`` of the ``P`` prunable weights are left, with the density of the ``schedule`` at ``c / C``;
    from the start of epoch ``end_epoch`` on it is ``round(P * (1 - sparsity))``, for good.

    Unlike IMP it takes no additional epochs. A cut by magnitude takes a fraction of a training step. One by
    ``drive`` takes a forward and a backward pass: it is made right before the step on a batch, and scores by the loss
    on that very batch, without Dropout and in float32, as :class:`lightning_drive.DRIVE` does. The gradients of
    training itself would be free, but a run that is resumed right before a cut has none.

    EarlyStopping is held off until the last cut, after which ModelCheckpoint starts tracking again. Paths from input
    to output and multiply-adds are measured once, at the last cut.

    Args:
        sparsity: Fraction of the prunable weights to remove in all, in ``[0, 1)``; 0.98 keeps 2 %. Or a mapping
            from glob patterns over parameter names to such fractions, see :func:`lightning_drive.find_masks`.
        start_epoch: Dense epochs before the window, at least 0. Default: 2, which was tried in runs of 15 and 35
            epochs, or half of ``end_epoch`` if that is less.
        end_epoch: The epoch, counted from 0, at whose start the last cut is. It must be more than ``start_epoch``, and
            less than the ``max_epochs`` of the run. Default: two thirds of ``max_epochs``.
        cuts_per_epoch: Cuts in each epoch of the window, at least 1. Where an epoch has fewer steps, there is a cut
            before each of them. Within gradient accumulation there is none.
        criterion: ``magnitude`` removes the smallest weights; ``drive`` those of the lowest DRIVE score.
        schedule: ``cubic`` removes many weights at first and few at last, ``exponential`` the same fraction of the
            survivors in every cut, ``linear`` the same number. Or a function, see :func:`lightning_drive.find_masks`.
        scope: ``global`` ranks all weights together; with ``layerwise`` every parameter keeps the same fraction, with
            ``erk`` (Evci et al., 2020) a larger one the smaller it is.
        include: Glob patterns over parameter names; only what matches is pruned. Default: the weights of all
            layers that multiply by them. ``["*"]``: everything of two dimensions or more.
        exclude: Glob patterns over parameter names that stay dense.
        loss_fn: Function ``loss_fn(pl_module, batch)`` that returns the loss for ``criterion="drive"``. Default: the
            module's ``training_step``, with logging silenced. Needed for manual optimization.
        bn_batches: Training batches for re-estimating BatchNorm's running statistics after the last cut, at least 0.
            Default: 0, since training goes on between the cuts, which keeps them up to date.
        reset_best: Whether ModelCheckpoint and EarlyStopping forget their results from before the last cut; until
            then, EarlyStopping is held off.
        control: For comparison: ``shuffle`` chooses at random, with as many weights in every parameter as were to be
            left, in every cut; ``reinit`` keeps the final masks, and trains from new initial values of the survivors.
            Default: neither.
        accelerate: Whether the pruned network trains in sparse forms: layers whose forward and backward pass is faster
            so on this machine, measured at the first batch after the last cut (on a CPU). Sums come in another order,
            so weights agree with those of a dense run, or of a run that is resumed, within rounding, not bit for bit.

    Attributes:
        masks: The masks (:class:`lightning_drive.Masks`), on the CPU; empty before the first cut.
        pruned: Whether the network has been pruned: ``False`` before the first cut.
        report: The report (:class:`lightning_drive.PruningReport`) of all cuts so far; ``None`` before the first.
        cut: The number of cuts so far.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument has the wrong type.

    Examples:
        Four cuts an epoch, from the start of epoch 2 to that of epoch 20:

        >>> import lightning.pytorch as pl
        >>> callback = GradualPruningCallback(sparsity=0.98)
        >>> trainer = pl.Trainer(max_epochs=30, callbacks=[callback], logger=False)

    """

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        start_epoch: int | None = None,
        end_epoch: int | None = None,
        cuts_per_epoch: int = 4,
        criterion: Criterion = "magnitude",
        schedule: Schedule = "cubic",
        scope: Scope = "global",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        bn_batches: int = 0,
        reset_best: bool = True,
        control: Control = "none",
        accelerate: bool = False,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            schedule=schedule,
            scope=scope,
            include=include,
            exclude=exclude,
            reset_best=reset_best,
            control=control,
            accelerate=accelerate,
            remember_epoch=0 if control == "reinit" else None,
        )
        self.start_epoch = None if start_epoch is None else arguments.check_count("start_epoch", start_epoch, least=0)
        self.end_epoch = None if end_epoch is None else arguments.check_count("end_epoch", end_epoch)
        self.cuts_per_epoch = arguments.check_count("cuts_per_epoch", cuts_per_epoch)
        self.criterion: Criterion = arguments.check_choice("criterion", criterion, Criterion)
        self.loss_fn = arguments.check_loss_fn(loss_fn)
        self.bn_batches = arguments.check_count("bn_batches", bn_batches, least=0)
        self._window: CutWindow | None = None  # that of the run, once it is known
        if self.end_epoch is not None:
            self._goal.check_schedule(self._window_of(-1).num_cuts)
        self._batch: list[Any] | None = None  # the one that is about to be trained on

    @property
    def cut(self) -> int:
        """The number of cuts so far."""
        return self.report.cuts[-1].cut if self.report is not None and self.report.cuts else 0

    # Hooks.

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Cut where it is time, and name the sparsity in the progress bar."""
        before, self._batch = self.cut, [batch]
        try:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx == 0:
                self._log_metrics(trainer, pl_module)
        finally:
            self._batch = None
        if self.pruned and not self._finished and (batch_idx == 0 or self.cut > before):
            terminal.name_epoch(trainer, f"sparsity {self.masks.sparsity:.1%}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if training ended before the last cut."""
        if not self._finished:
            end_of_training.warn_of_open_window(trainer, *self._sparsities(trainer, pl_module), self._when)

    @override
    def _log_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._batch is not None:  # of what two hooks log in an epoch, Lightning does not take the later one
            super()._log_metrics(trainer, pl_module)

    @override
    def _take(self, saved: SavedState) -> None:
        super()._take(saved)
        if saved.pruning.masks:
            self._window = CutWindow.saved(saved.settings)

    @override
    def _check_settings(self, saved: SavedState) -> None:
        report = saved.pruning.report
        if report is not None and report.cuts:
            goal = self._goal.settings(CutWindow.saved(saved.settings).num_cuts)
            given = {"start_epoch": self.start_epoch, "end_epoch": self.end_epoch}
            cut_window.check_settings(report.cuts[-1].cut, saved.settings, {**self._settings(), **goal, **given})

    @override
    def _settings(self) -> dict[str, Any]:
        start, end = (self.start_epoch, self.end_epoch) if self._window is None else self._window[:2]
        own = {"start_epoch": start, "end_epoch": end, "cuts_per_epoch": self.cuts_per_epoch}
        return {**self._goal.settings(self._num_cuts), **super()._settings(), **own, "criterion": self.criterion}

    @override
    def _start_afresh(self) -> None:
        super()._start_afresh()
        self._window = None

    # When.

    def _window_of(self, max_epochs: int) -> CutWindow:
        """Return the window in a run of ``max_epochs``; that of this run, if it is known, for -1."""
        own = self._window if max_epochs < 0 else None
        return own or CutWindow.of(self.start_epoch, self.end_epoch, self.cuts_per_epoch, max_epochs)

    @property
    def _num_cuts(self) -> int:
        return 1 if self._window is None else self._window.num_cuts

    @property
    @override
    def _finished(self) -> bool:
        return self.cut >= self._num_cuts

    @property
    @override
    def _trains_sparse(self) -> bool:
        return self.accelerate and self._finished

    @property
    @override
    def _last_epoch(self) -> int:
        return 0 if self._window is None else self._window.end

    @override
    def _is_due(self, trainer: pl.Trainer) -> bool:
        has_data = self._batch is not None or self.criterion == "magnitude"
        return has_data and self._num_due(trainer) > self.cut

    def _num_due(self, trainer: pl.Trainer) -> int:
        """Return how many cuts are due by now; all of them in a quick check."""
        if self._window is None:
            return 0
        return self._num_cuts if step_counts.is_quick_check(trainer) else cut_window.num_due(trainer, self._window)

    # Pruning.

    def _method(self, num_cuts: int) -> Method:
        """Return the method whose rounds are the cuts."""
        return DRIVE(rounds=num_cuts) if self.criterion == "drive" else Magnitude(rounds=num_cuts)

    def _text(self, window: CutWindow | None) -> str:
        """Return the method as reports and plans name it."""
        return f"Gradual{type(self._method(1)).__name__}({window})"

    @override
    def _plan(self, module: nn.Module, selected: Mapping[str, nn.Parameter], **run: Any) -> PruningPlan:
        window = self._window_of(run.get("max_epochs", -1))
        return plan.plan(
            module,
            selected,
            method=self._text(window),
            **plan.counts(self._goal, selected, window.num_cuts),
            passes=methods.num_passes(self._method(window.num_cuts)),
            pass_over="a training batch",
            unit="cut",
            first_epoch=window.start,
            last_epoch=window.end,
            **run,
        )

    @override
    def _check_run(self, module: nn.Module, max_epochs: int = -1, steps_per_epoch: int | None = None) -> None:
        cut_window.check_epochs(self, self._window_of(max_epochs), max_epochs)
        if self.criterion == "drive":
            checks.check_batches_are_seen(module)
            if self.loss_fn is None:
                checks.check_training_step(module)

    @override
    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start, cut = time.monotonic(), self._num_due(trainer)
        warnings = [] if self.pruned else [*self._left_dense(trainer, pl_module)]
        with suppress(NothingToScoreByError):  # a batch without a loss leaves the cut to the next one
            make = self._cut if cut < self._num_cuts else self._cut_for_good
            make(trainer, pl_module, cut, start, warnings)

    def _left_dense(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[str]:
        """Warn of parameters that the first cut leaves out, so that they stay dense."""
        assert self._window is not None
        yield from self._left_out(trainer, pl_module, "training before the first cut")
        yield from frozen_layers.warnings(self, trainer, pl_module, (), "start_epoch", self._window.start)

    def _cut(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: int, start: float, warnings: list[str]
    ) -> None:
        """Do a cut that is not the last one, which must take no longer than a training step."""
        settings = self._search_settings(trainer, pl_module, cut)
        found = search_in_fit.cut_once(trainer, pl_module, goal=self._goal, masks=self.masks, **settings)
        found.warnings.extend(warnings)
        times: Any = {"start": start, "phase_start": self._fit.phase_start}
        report = reporting.of_cut(trainer, found, self._text(self._window), **times, control=self.control)
        # Everything is computed: from here on only commit.
        self._pruning = Pruning(found.masks.to("cpu"), reporting.after_cuts(report, self.report, cut, trainer), {})
        self._commit(trainer, pl_module)
        reporting.announce_cut(trainer, found.warnings, self._metrics(), self._fit.announced)

    def _cut_for_good(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: int, start: float, warnings: list[str]
    ) -> None:
        """Do the last cut, and diagnose its outcome."""
        outcome = self._search(trainer, pl_module, **self._search_settings(trainer, pl_module, cut))
        masks, before = outcome.found.masks, time.monotonic()
        statistics = search_in_fit.batch_norm_statistics(trainer, pl_module, masks, self.bn_batches, self.loss_fn)
        outcome.phases["batch_norm"] = time.monotonic() - before
        outcome.found.warnings.extend(warnings)
        times: Any = {"start": start, "phase_start": self._fit.phase_start}
        report = reporting.report(trainer, outcome, self._text(self._window), **times, control=self.control)
        # Everything is computed: from here on only commit.
        self._pruning = Pruning(masks.to("cpu"), reporting.after_cuts(report, self.report, cut, trainer), statistics)
        forgotten = self._commit(trainer, pl_module)
        self._announce(trainer, outcome, forgotten)

    def _search_settings(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: int) -> dict[str, Any]:
        """Return the settings of the search for a cut; the first cut decides which parameters are pruned."""
        return {
            "method": self._method(self._num_cuts),
            "names": [*(self.masks or self._selected(trainer, pl_module))],
            "only_round": cut,
            "batches": self._batch if self.criterion == "drive" else None,
            "loss_fn": self.loss_fn,
            "shuffle": search_in_fit.shuffle(trainer, self.control, self.masks or None),
        }

    @override
    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._finished and self.control == "reinit" and self._start is not None:
            self._reinitialise(trainer, pl_module)
            self._start.rewind_optimizers_(trainer.optimizers, learning_rates=False)
            self._pruned_along(trainer, pl_module).restart_()
        super()._settle(trainer, pl_module)

    # Checks before training starts.

    @override
    def _check_module(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._window is None or not self.pruned:
            self._window = cut_window.of_run(self, trainer, self._fit.max_epochs)
            self._goal.check_schedule(self._num_cuts)
        super()._check_module(trainer, pl_module)
        self._check_run(pl_module)

    @override
    def _check_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._check_training(trainer, pl_module)
        self.masks.parameters_of(pl_module)  # raises for another module
        if self.bn_batches:
            batches.check_data(trainer)
        if self._window is None or step_counts.is_quick_check(trainer):
            return
        cut_window.check_epochs(self, self._window, self._fit.max_epochs)  # also a restored one
        cut_window.check_training(self, trainer, pl_module, self._window)
        if self._fit.is_restored and self.pruned:
            run, select = f"cut {self.cut} of a gradual pruning", partial(self._selected, trainer)
            restored_masks.check_selection(self, run, "cut", select, pl_module)
