"""The actions of a pruning callback: select parameters, search, record, put masks into effect, announce."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_drive.core import arguments
from lightning_drive.core.arguments import Control, Schedule, Scope, Sparsity
from lightning_drive.core.goal import Goal
from lightning_drive.network import batch_norm, prunable, sparsity_groups
from lightning_drive.network.masks import Masks
from lightning_drive.network.rewinding import RewindPoint
from lightning_drive.report.plan import PruningPlan
from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.search.methods import Method
from lightning_drive.trainer import (
    lightning_internals,
    loggers,
    other_callbacks,
    ranks,
    reporting,
    search_in_fit,
    step_counts,
    terminal,
    trained_parameters,
)
from lightning_drive.trainer.averages import Averages
from lightning_drive.trainer.fit_state import Fit
from lightning_drive.trainer.saved_state import Pruning, SavedState
from lightning_drive.trainer.search_in_fit import Outcome
from lightning_drive.trainer.spawned import Handover


class PruningActions(pl.Callback):
    """Settings and actions of all pruning callbacks; the hooks are in :mod:`lightning_drive.callbacks.hooks`.

    A subclass decides when to prune (:meth:`_is_due`) and how (:meth:`_prune`). To change which parameters are
    prunable, override :meth:`prunable_parameters`; to prune copies of the network as well, :meth:`averages`.

    Args:
        sparsity: A fraction, or a mapping from glob patterns to fractions, see :func:`lightning_drive.find_masks`.
        schedule: ``"exponential"``, ``"linear"``, ``"cubic"`` or a function, see :func:`lightning_drive.find_masks`.
        scope: ``"global"``, ``"layerwise"`` or ``"erk"``, see :func:`lightning_drive.find_masks`.
        include: Glob patterns over parameter names. ``None``: the weights of all layers that multiply by them, see
            :func:`lightning_drive.network.prunable.prunable_parameters`.
        exclude: Glob patterns over parameter names that stay dense.
        reset_best: Whether ModelCheckpoint and EarlyStopping forget their results from before pruning; until then,
            EarlyStopping is held off.
        control: ``"none"``, ``"shuffle"`` or ``"reinit"``, see :class:`lightning_drive.PruningReport`.
        accelerate: Whether the pruned network trains in sparse forms, where they are faster on this machine.
        remember_epoch: The epoch at whose start weights and optimizers are stored, to return to them; ``None``: never.

    """

    def __init__(
        self,
        *,
        sparsity: Sparsity,
        schedule: Schedule,
        scope: Scope,
        include: list[str] | None,
        exclude: list[str] | None,
        reset_best: bool,
        control: Control,
        accelerate: bool = False,
        remember_epoch: int | None,
    ) -> None:
        super().__init__()
        goal = Goal(sparsity, schedule, scope)
        self.sparsity, self.schedule, self.scope = goal.sparsity, goal.schedule, goal.scope
        self.include = arguments.check_patterns("include", include)
        self.exclude = arguments.check_patterns("exclude", exclude)
        self.control: Control = arguments.check_choice("control", control, Control)
        self.reset_best = arguments.check_flag("reset_best", reset_best)
        self.accelerate = arguments.check_flag("accelerate", accelerate)
        self._pruning = Pruning()
        self._start: RewindPoint | None = None
        self._remember_epoch = remember_epoch
        self._restored_settings: Mapping[str, Any] | None = None
        self._handover = Handover()
        self._fit = Fit()

    @property
    def masks(self) -> Masks:
        """The masks, on the CPU; empty before pruning."""
        self._receive()
        return self._pruning.masks

    @property
    def report(self) -> PruningReport | None:
        """The report of the pruning; ``None`` before it."""
        self._receive()
        return self._pruning.report

    @property
    def pruned(self) -> bool:
        """Whether the network has been pruned."""
        return bool(self.masks)

    def prunable_parameters(self, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Select the parameters to prune; override it for a rule that patterns cannot express.

        In a Trainer, parameters that no optimizer holds are left out afterwards, since they are not trained.

        Args:
            pl_module: The module.

        Returns:
            Parameter name, as in ``pl_module.named_parameters()``, to the parameter itself.

        """
        return prunable.prunable_parameters(pl_module, self.include, self.exclude)

    def averages(self, pl_module: pl.LightningModule) -> Iterable[nn.Module | Mapping[str, Tensor]]:
        """Return copies of the network to prune along with it; override it if your training keeps such copies.

        An average of dense and sparse weights is dense, so averages have to be pruned with the network. Those that
        Lightning's callbacks keep (``WeightAveraging``, ``EMAWeightAveraging``, ``StochasticWeightAveraging``) are
        pruned without this. The method is called whenever masks are put on, from the start of ``fit`` on; leave out a
        copy that does not exist yet.

        Args:
            pl_module: The module.

        Returns:
            The copies: modules whose parameters have the same names as in ``pl_module``, or mappings from these names
            to tensors. Default: none.

        Examples:
            A mean teacher inside the module:

            >>> from lightning_drive import DRIVEPruningCallback
            >>> class WithTeacher(DRIVEPruningCallback):
            ...     def averages(self, pl_module):
            ...         teacher = pl_module.teacher.named_parameters()
            ...         return [{f"student.{name}": tensor for name, tensor in teacher}]

            A copy of the whole module that another callback makes, as ``copy.deepcopy(pl_module)``:

            >>> class WithCopy(DRIVEPruningCallback):
            ...     def averages(self, pl_module):
            ...         callbacks = pl_module.trainer.callbacks
            ...         copies = [getattr(callback, "average", None) for callback in callbacks]
            ...         return [average for average in copies if average is not None]

            ``torch_ema``, created with ``pl_module.net.parameters()``, which keeps tensors without names:

            >>> class WithTorchEma(DRIVEPruningCallback):
            ...     def averages(self, pl_module):
            ...         names = [f"net.{name}" for name, _ in pl_module.net.named_parameters()]
            ...         return [dict(zip(names, pl_module.ema.shadow_params))]

        """
        return ()

    def plan(
        self, pl_module: nn.Module, *, max_epochs: int | None = None, steps_per_epoch: int | None = None
    ) -> PruningPlan:
        """Plan what would be pruned, when, and at what cost, without doing it: ``print(callback.plan(model))``.

        In a Trainer, parameters that no optimizer holds are not pruned. Before a Trainer has optimizers for the module,
        only frozen parameters are known to be untrained, so the plan may then list more parameters.

        Args:
            pl_module: The module as it will be trained, or any torch module.
            max_epochs: Epochs of the whole run, at least 1.
            steps_per_epoch: Training steps in an epoch, at least 1, such as ``len(train_loader)``.

        Returns:
            The plan, to be printed or read.

        Raises:
            ValueError: If nothing is prunable, a pattern matches nothing, ``sparsity`` has no pattern for a prunable
                parameter, a number is not an integer of at least 1, or ``fit`` would not start: training ends before
                the last cut, or there is no loss to score by.

        """
        given = {"max_epochs": max_epochs, "steps_per_epoch": steps_per_epoch}
        run: dict[str, Any] = {
            name: arguments.check_count(name, number) for name, number in given.items() if number is not None
        }
        module: Any = pl_module
        trainer: Any = lightning_internals.trainer_of(module)
        in_fit = trainer is not None and trainer.optimizers
        selected = self._selected(trainer, module) if in_fit else self.prunable_parameters(module)
        sparsity_groups.check(self._goal, module, selected, self.prunable_parameters)
        untrained = trained_parameters.untrained(trainer, module) if in_fit else ()
        self._check_run(module, **run)
        return self._plan(module, selected, exclude=self.exclude, untrained=untrained, **run)

    # For subclasses to decide.

    def _plan(self, module: nn.Module, selected: Mapping[str, nn.Parameter], **run: Any) -> PruningPlan:
        """Plan the pruning of the selected parameters, see :func:`lightning_drive.report.plan.plan`."""
        raise NotImplementedError

    def _check_run(self, module: nn.Module, max_epochs: int = -1, steps_per_epoch: int | None = None) -> None:
        """Raise if a run cannot prune, or ends before the last cut; -1 and ``None`` where its length is not known."""

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether it is time to prune, or to prune again."""
        raise NotImplementedError

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Search for masks, :meth:`_record` them, :meth:`_commit`, and announce."""
        raise NotImplementedError

    @property
    def _finished(self) -> bool:
        """Whether the masks are the final ones."""
        return self.pruned

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring a pruned module to the state in which its training goes on; a second call changes nothing."""
        self._enforce(trainer, pl_module)

    def _metrics(self) -> dict[str, float]:
        """Return the metrics of every epoch, which monitors and names of checkpoints can use."""
        return reporting.metrics(self.report)

    # The actions.

    @property
    def _goal(self) -> Goal:
        return Goal(self.sparsity, self.schedule, self.scope)

    def _receive(self) -> None:
        """Take over masks and report from the processes that Lightning launched for a ``fit`` of this callback."""
        if (state := self._handover.take()) is not None:
            self._take(SavedState.from_dict(state, f"the {type(self).__name__} state of a launched process"))

    def _take(self, saved: SavedState) -> None:
        self._check_settings(saved)
        self._pruning = saved.pruning
        self._restored_settings = saved.settings if saved.pruning.masks else None

    def _check_settings(self, saved: SavedState) -> None:
        """Raise if a state was saved with settings that the present ones cannot continue."""

    def _selected(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Select the prunable parameters that an optimizer holds."""
        return trained_parameters.select(trainer, pl_module, self.prunable_parameters)

    def _others(self, trainer: pl.Trainer, pl_module: pl.LightningModule, selected: Iterable[str]) -> list[str]:
        """Return the names of trained matrices that stay dense, or none if the user chose what to prune."""
        selects_itself = type(self).prunable_parameters is not PruningActions.prunable_parameters
        if self.include is not None or selects_itself:
            return []
        left_out = {*selected, *trained_parameters.untrained(trainer, pl_module)}
        return prunable.dense_matrices(pl_module, left_out, self.exclude)

    def _remember_when_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int = 0) -> None:
        """Store the point to return to when its epoch begins, and drop it when it is no longer needed."""
        if self._finished:
            if self._start is not None and self.report is not None and trainer.global_step > self.report.step:
                self._start = None
        elif self._start is None and self._remember_epoch is not None:
            past = trainer.current_epoch > self._remember_epoch or batch_idx > 0
            if step_counts.is_quick_check(trainer) or (trainer.current_epoch == self._remember_epoch and not past):
                schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
                self._start = RewindPoint.take(pl_module, trainer.optimizers, schedulers)
            elif trainer.current_epoch >= self._remember_epoch:
                raise MisconfigurationException(
                    f"{type(self).__name__} returns to the weights of the start of epoch {self._remember_epoch}, but"
                    f" this run goes on in epoch {trainer.current_epoch} from a checkpoint that does not have them."
                    " Resume from a checkpoint that was saved with this callback and these settings, or start from the"
                    " beginning."
                )

    def _search(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, method: Method, names: Iterable[str], **options: Any
    ) -> Outcome:
        """Search for masks of the named parameters, see :func:`lightning_drive.trainer.search_in_fit.search`."""
        others = self._others(trainer, pl_module, names)
        return search_in_fit.search(
            trainer, pl_module, method, self._goal, [*names], masks=self.masks, others=others, **options
        )

    def _record(
        self,
        trainer: pl.Trainer,
        outcome: Outcome,
        method: str,
        start: float,
        *,
        control: Control,
        cycle: int | None = None,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Record masks and report together; from here on the network counts as pruned."""
        report = reporting.report(
            trainer,
            outcome,
            method,
            start=start,
            phase_start=self._fit.phase_start,
            control=control,
            cycle=cycle,
            before=None if cycle is None else self.report,
        )
        self._pruning = Pruning(outcome.found.masks.to("cpu"), report, statistics or {})

    def _commit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Put recorded masks into effect; a resume repeats it if it is interrupted. Return which best was forgotten."""
        start, forgotten = time.monotonic(), ""
        statistics = self._pruning.unfinished or {}
        batch_norm.load_batch_norm_statistics(pl_module, statistics)
        self._pruned_along(trainer, pl_module).load_batch_norm_statistics_(statistics)
        self._settle(trainer, pl_module)
        self._hold_off_early_stopping(trainer)
        if self._finished and self.reset_best:
            forgotten = other_callbacks.forget_best(trainer)
        self._fit.phase_start = time.monotonic()
        report = self.report and reporting.with_commit(self.report, self._fit.phase_start - start)
        self._pruning = Pruning(self.masks, report)
        return forgotten

    def _announce(self, trainer: pl.Trainer, outcome: Outcome, forgotten: str, text: str | None = None) -> None:
        """Show what was pruned above the progress bar, and log it."""
        assert self.report is not None
        with terminal.above_bar(trainer):
            reporting.announce(trainer, self.report, outcome, self._metrics(), self._fit.announced, text)
            if self._finished:
                loggers.log_pictures(trainer, self.report)
            if forgotten:
                rank_zero_info(forgotten)

    def _hold_off_early_stopping(self, trainer: pl.Trainer) -> None:
        """Keep EarlyStopping from ending training before the last cut."""
        other_callbacks.hold_off_early_stopping(trainer, self.reset_best and not self._finished)

    def _enforce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masks on the module and its averages, and again after every optimizer step."""
        averages = self._pruned_along(trainer, pl_module)
        self._fit.enforce(self, trainer, pl_module, self.masks, averages)

    def _reinitialise(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return to the stored weights, with new initial values for the survivors."""
        assert self._start is not None
        redrawn = self._start.redrawn(self.masks, ranks.random_numbers(trainer))
        redrawn.rewind_module_(pl_module, self.masks)

    def _pruned_along(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Averages:
        """Return the averages of the module, which are pruned with it."""
        return Averages(trainer, pl_module, self.averages)
