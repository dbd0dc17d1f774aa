"""The base of callbacks that prune once, after a dense warm-up, also for a method of your own."""

import inspect
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

from lightning_drive.callbacks.hooks import PruningCallback
from lightning_drive.core import arguments
from lightning_drive.core.arguments import Control, Schedule, Scope, Sparsity
from lightning_drive.report import plan
from lightning_drive.report.plan import PruningPlan
from lightning_drive.search import methods
from lightning_drive.search.methods import Method
from lightning_drive.trainer import batches, checks, end_of_training, frozen_layers, search_in_fit, step_counts
from lightning_drive.trainer.checks import SettingsError
from lightning_drive.trainer.dense_copies import zeros_without_masks


class WarmupPruningCallback(PruningCallback):
    """Train densely for some epochs, prune once, and keep the masks to the end.

    Pruning happens at the start of epoch ``warmup_epochs``, after the validation and the checkpoint of the epoch
    before, or before the batch of global step ``warmup_steps``, even in the middle of an epoch.

    Args:
        method: The method that finds the masks.
        sparsity: See :class:`~lightning_drive.callbacks.actions.PruningActions`.
        warmup_epochs: Dense epochs before pruning, at least 0.
        warmup_steps: Dense optimizer steps before pruning, at least 0, in place of ``warmup_epochs``, which must then
            be left out: for endless streams, and warm-ups that are not whole epochs. Steps are counted as by
            ``trainer.global_step``: those of all optimizers together, and one for every ``accumulate_grad_batches``
            batches. ``None``: ``warmup_epochs`` decides.
        schedule: See there.
        scope: See there.
        include: See there.
        exclude: See there.
        loss_fn: ``loss_fn(pl_module, batch)`` returns the loss to score by. ``None``: the module's ``training_step``.
        bn_batches: Training batches for re-estimating BatchNorm's statistics after pruning, at least 0; 0 leaves them
            as they are.
        reset_best: See there.
        control: See there.
        accelerate: See there.

    """

    def __init__(
        self,
        method: Method,
        *,
        sparsity: Sparsity,
        warmup_epochs: int = 0,
        warmup_steps: int | None = None,
        schedule: Schedule = "exponential",
        scope: Scope = "global",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        bn_batches: int = 20,
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
        methods.check_method(method)
        self.method = method
        self._goal.check_schedule(method.rounds)
        self.warmup_epochs = arguments.check_count("warmup_epochs", warmup_epochs, least=0)
        self.warmup_steps = None
        if warmup_steps is not None:
            self.warmup_steps = arguments.check_count("warmup_steps", warmup_steps, least=0)
            _check_left_out(type(self), "warmup_epochs", self.warmup_epochs, "warmup_steps", self.warmup_steps)
        self.loss_fn = arguments.check_loss_fn(loss_fn)
        self.bn_batches = arguments.check_count("bn_batches", bn_batches, least=0)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if training ended before the warm-up did."""
        if not self.pruned:
            remedy = f"Lower `{self._warmup[0]}`, or let training run longer."
            if self.warmup_steps is None and math.isinf(trainer.num_training_batches):
                remedy = self._remedy_for_unknown_length
            end_of_training.warn_of_dense_end(trainer, self._when, remedy)

    @property
    @override
    def _last_epoch(self) -> int:
        return self.warmup_epochs if self.warmup_steps is None else 0

    @property
    @override
    def _step(self) -> int | None:
        return self.warmup_steps

    @override
    def _plan(self, module: nn.Module, selected: Mapping[str, nn.Parameter], **run: Any) -> PruningPlan:
        pass_over = "a single sample, in float64" if methods.reads(self.method) == "shape" else "a training batch"
        return plan.plan(
            module,
            selected,
            method=methods.described(self.method),
            **plan.counts(self._goal, selected, self.method.rounds),
            passes=methods.num_passes(self.method),
            pass_over=pass_over,
            first_epoch=self._last_epoch,
            last_epoch=self._last_epoch,
            first_step=self._step,
            **run,
        )

    @override
    def _settings(self) -> dict[str, Any]:
        return {**self._goal.settings(self.method.rounds), **super()._settings()}

    @override
    def _check_run(self, module: nn.Module, max_epochs: int = -1, steps_per_epoch: int | None = None) -> None:
        if methods.reads(self.method) == "loss" and self.loss_fn is None:
            checks.check_training_step(module)
        if max_epochs >= 0 and steps_per_epoch is not None:
            self._check_steps("max_epochs", max_epochs, max_epochs * steps_per_epoch)
        if self.warmup_steps is None and 0 <= max_epochs <= self.warmup_epochs:
            raise SettingsError(
                f"{type(self).__name__}(warmup_epochs={self.warmup_epochs}) prunes at the start of epoch"
                f" {self.warmup_epochs} (counted from 0), but training ends after max_epochs={max_epochs} epochs, so it"
                " would never prune. Raise `max_epochs` or lower `warmup_epochs`."
            )

    @override
    def _is_due(self, trainer: pl.Trainer) -> bool:
        if step_counts.is_quick_check(trainer):
            return True
        if self.warmup_steps is None:
            return trainer.current_epoch >= self.warmup_epochs
        return trainer.global_step >= self.warmup_steps and not step_counts.is_accumulating(trainer)

    @property
    def _warmup(self) -> tuple[str, int]:
        """Name and value of the argument that sets the time to prune."""
        if self.warmup_steps is None:
            return "warmup_epochs", self.warmup_epochs
        return "warmup_steps", self.warmup_steps

    @override
    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.monotonic()
        method = methods.with_fewer_rounds(self.method, 2) if step_counts.is_quick_check(trainer) else self.method
        names = self._selected(trainer, pl_module)
        shuffle = search_in_fit.shuffle(trainer, self.control)
        outcome = self._search(trainer, pl_module, method, names, loss_fn=self.loss_fn, shuffle=shuffle)
        masks = outcome.found.masks
        before = time.monotonic()
        statistics = search_in_fit.batch_norm_statistics(trainer, pl_module, masks, self.bn_batches, self.loss_fn)
        outcome.phases["batch_norm"] = time.monotonic() - before
        outcome.found.warnings.extend(frozen_layers.warnings(self, trainer, pl_module, masks, *self._warmup))
        outcome.found.warnings.extend(zeros_without_masks(self, pl_module, masks, masks))
        # Everything is computed: from here on only commit.
        self._record(trainer, outcome, methods.described(method), start, control=self.control, statistics=statistics)
        forgotten = self._commit(trainer, pl_module)
        self._announce(trainer, outcome, forgotten)

    @override
    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.control == "reinit" and self._start is not None:
            self._reinitialise(trainer, pl_module)
            self._start.rewind_optimizers_(trainer.optimizers, learning_rates=False)
            self._pruned_along(trainer, pl_module).restart_()
        super()._settle(trainer, pl_module)

    @property
    @override
    def _unshardable(self) -> str:
        puts_weights = methods.reads(self.method) == "shape"
        return super()._unshardable or ("SynFlow has to put other weights in their place." if puts_weights else "")

    @override
    def _check_module(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._check_module(trainer, pl_module)
        self._check_run(pl_module, -1 if step_counts.is_quick_check(trainer) else self._fit.max_epochs)

    @override
    def _check_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._check_training(trainer, pl_module)
        reads_statistics = self.bn_batches > 0 and self._warmup[1] > 0
        reads_loss = methods.reads(self.method) == "loss"
        if reads_loss or reads_statistics or pl_module.example_input_array is None:
            batches.check_data(trainer)
        if step_counts.is_quick_check(trainer):
            return
        if self.warmup_steps is not None:
            self._check_last_step(trainer, pl_module)
            return
        steps = sum(step_counts.steps_per_epoch(trainer, epoch) for epoch in range(self.warmup_epochs))
        is_known = math.isfinite(steps) and pl_module.automatic_optimization  # otherwise a batch may have any number
        if is_known and 0 <= trainer.max_steps <= steps:
            raise MisconfigurationException(
                f"{type(self).__name__}(warmup_epochs={self.warmup_epochs}) prunes after {steps:g} steps, but training"
                f" ends after max_steps={trainer.max_steps}, so it would never prune. Raise `max_steps` or lower"
                " `warmup_epochs`."
            )

    def _check_last_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if training ends before step ``warmup_steps``."""
        if trainer.max_steps >= 0:
            self._check_steps("max_steps", trainer.max_steps, trainer.max_steps)
        if self._fit.max_epochs >= 0 and pl_module.automatic_optimization:  # else a batch may have any number of steps
            left = range(trainer.current_epoch, self._fit.max_epochs)
            steps = sum(step_counts.steps_per_epoch(trainer, epoch) for epoch in left)
            self._check_steps("max_epochs", self._fit.max_epochs, trainer.global_step + steps)

    def _check_steps(self, name: str, value: int, steps: float) -> None:
        """Raise if training ends, after so many steps by an argument of the Trainer, before step ``warmup_steps``."""
        if self.warmup_steps is not None and steps <= self.warmup_steps:
            raise SettingsError(
                f"{type(self).__name__}(warmup_steps={self.warmup_steps}) prunes before step {self.warmup_steps}"
                f" (counted from 0), but with {name}={value} training ends after {steps:g} steps, so it would never"
                f" prune. Raise `{name}` or lower `warmup_steps`."
            )

    @property
    @override
    def _remedy_for_unknown_length(self) -> str:
        return f"Set `warmup_steps` in place of `warmup_epochs`. {super()._remedy_for_unknown_length}"


def _check_left_out(kind: type, name: str, value: Any, decides: str, given: Any) -> None:
    """Raise if an argument differs from its default though another argument decides.

    The default, which a file of settings may contain, is looked up in the constructors, from the class upwards.
    """
    signatures = (inspect.signature(ancestor.__init__).parameters for ancestor in kind.__mro__)  # type: ignore[misc]
    default = next(parameters[name].default for parameters in signatures if name in parameters)
    if value != default:
        raise ValueError(
            f"`{decides}` sets when to prune in place of `{name}`, which must be left out then, got"
            f" {decides}={given} and {name}={value}. Set only one of them."
        )
