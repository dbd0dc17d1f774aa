"""How masks live through a training run: its steps, checkpoints, resumes and reports."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_drive import (
    companions,
    compatibility,
    costs,
    display,
    finding,
    flow,
    gradients,
    masking,
    methods,
    planning,
    prunable,
    scoring,
    shards,
)
from lightning_drive.costs import Costs
from lightning_drive.finding import Found, Scope
from lightning_drive.handover import Handover
from lightning_drive.masking import MaskedParameters, Masks
from lightning_drive.messages import listed
from lightning_drive.methods import Method
from lightning_drive.planning import Intent, PruningPlan
from lightning_drive.ranks import Ranks
from lightning_drive.report import Control, CycleReport, PruningReport
from lightning_drive.rewinding import RewindPoint
from lightning_drive.schedules import Schedule

_VERSION = 1


@dataclass(frozen=True)
class Outcome:
    """What a search brings back, before any of it is put down."""

    found: Found
    statistics: dict[nn.Module, dict[str, Tensor]]
    """BatchNorm layer to the statistics that go with the masks."""
    costs: Costs
    phases: dict[str, float]
    """Seconds by phase."""


class PruningCallback(pl.Callback):
    """Prune during training and keep what is pruned at zero: what all pruning callbacks share.

    Masks are found first and then committed at once, so an interrupt in between leaves a run that can be resumed. From
    there on pruned weights are exactly 0: their gradients are masked before clipping, the weights again after every
    optimizer step. Parameter names, their order and ``state_dict`` keys are never touched, so checkpoints load into
    the plain module, already sparse.

    In several processes, every rank scores its own batches, gradients are averaged, and all ranks get the same masks.

    A subclass says when it is time (:meth:`_is_due`) and what to do then (:meth:`_prune`). To change which parameters
    are prunable, override :meth:`prunable_parameters`.

    Args:
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``.
        schedule: ``"exponential"`` or ``"linear"``, see :func:`lightning_drive.find_masks`.
        scope: ``"global"`` or ``"layerwise"``, see :func:`lightning_drive.find_masks`.
        include: Glob patterns over parameter names; ``None``: linear and convolutional weights.
        exclude: Glob patterns over parameter names that stay dense.
        reset_best: Whether ModelCheckpoint and EarlyStopping forget what was before pruning.
        control: ``"none"``, ``"shuffle"`` or ``"reinit"``, see :class:`lightning_drive.PruningReport`.
        remember_epoch: At the start of which epoch to remember weights and optimizers, to return to; ``None``: never.

    """

    def __init__(
        self,
        *,
        sparsity: float,
        schedule: Schedule,
        scope: Scope,
        include: list[str] | None,
        exclude: list[str] | None,
        reset_best: bool,
        control: Control,
        remember_epoch: int | None,
    ) -> None:
        super().__init__()
        finding.check_settings(sparsity, schedule, scope)
        prunable.check_patterns("include", include)
        prunable.check_patterns("exclude", exclude)
        methods.check_choice("control", control, Control)
        if not isinstance(reset_best, bool):
            raise TypeError(f"`reset_best` must be True or False, got {reset_best!r}.")
        self.sparsity = sparsity
        self.schedule: Schedule = schedule
        self.scope: Scope = scope
        self.include = include
        self.exclude = exclude
        self.reset_best = reset_best
        self.control: Control = control
        self._masks = Masks()
        self._report: PruningReport | None = None
        self._handover = Handover()
        self._remember_epoch = remember_epoch
        self._start: RewindPoint | None = None
        self._max_epochs = -1
        self._fit_started = False
        self._searching = False
        self._restored = False
        self._resumes_epoch = False
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._live: MaskedParameters | None = None
        self._handles: list[RemovableHandle] = []
        self._hookless = False
        self._phase_start: float | None = None

    @property
    def masks(self) -> Masks:
        """The masks, on the CPU; empty before pruning."""
        self._collect()
        return self._masks

    @property
    def report(self) -> PruningReport | None:
        """What was pruned; ``None`` before pruning."""
        self._collect()
        return self._report

    @property
    def pruned(self) -> bool:
        """Whether the network has been pruned."""
        return bool(self.masks)

    def prunable_parameters(self, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Select the parameters that the masks will cover; override it for a rule that patterns cannot express.

        Args:
            pl_module: The module.

        Returns:
            Parameter name, as in ``pl_module.named_parameters()``, to the live parameter.

        """
        return prunable.prunable_parameters(pl_module, self.include, self.exclude)

    def plan(
        self, pl_module: nn.Module, *, max_epochs: int | None = None, steps_per_epoch: int | None = None
    ) -> PruningPlan:
        """Say what would be pruned, when, and what that would cost; nothing is done. ``print(callback.plan(model))``.

        Args:
            pl_module: The module as it will be trained, or any torch module.
            max_epochs: Epochs of the whole run.
            steps_per_epoch: Training steps in each, such as ``len(train_loader)``.

        Raises:
            ValueError: If nothing is prunable, a pattern matches nothing, or a number is not a whole one of at least 1.

        """
        for argument, value in (("max_epochs", max_epochs), ("steps_per_epoch", steps_per_epoch)):
            if value is not None:
                methods.check_count(argument, value)
        selected = self.prunable_parameters(pl_module)  # type: ignore[arg-type]
        intent = self._intent()
        sizes = [parameter.numel() for parameter in selected.values()]
        return PruningPlan(
            intent.method,
            planning.planned_parameters(pl_module, selected, self.exclude),
            planning.counts(sizes, intent.rounds, self.sparsity, self.schedule, self.scope),
            intent.passes,
            intent.pass_over,
            intent.first_epoch,
            intent.last_epoch,
            None if max_epochs is None or steps_per_epoch is None else max_epochs * steps_per_epoch,
            max_epochs,
        )

    # What a subclass says.

    def _intent(self) -> Intent:
        """Say when and how it will prune."""
        raise NotImplementedError

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Say whether it is time to prune (again)."""
        raise NotImplementedError

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find masks, put them down by :meth:`_record`, and settle."""
        raise NotImplementedError

    @property
    def _finished(self) -> bool:
        """Whether the masks are the final ones."""
        return self.pruned

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do all that follows from masks that were put down; doing it twice does no harm."""
        self._enforce(trainer, pl_module)

    def _check_module(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, before anything runs, what cannot work."""
        shards.holders(self.prunable_parameters(pl_module))
        for other in companions.callbacks_of(trainer):
            if isinstance(other, BaseFinetuning) and self._remember_epoch is not None:
                raise MisconfigurationException(
                    f"{type(self).__name__} returns to an earlier state of the training (as IMP and control='reinit'"
                    f" do), but cannot return to one before {type(other).__name__} unfroze layers and gave them to the"
                    " optimizer. Train with one of the two."
                )

    def _check_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, once the data is loaded and a checkpoint restored, what cannot work."""

    def _metrics(self) -> dict[str, float]:
        """Give what is logged with every epoch, so that monitors and checkpoint names can use it."""
        return {} if self.report is None else {"pruning/sparsity": self.report.sparsity}

    def _start_afresh(self) -> None:
        """Forget a module that the callback was used with before."""
        self._masks, self._report, self._start = Masks(), None, None

    # When: each hook says what it does here.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work together, and note the length; a state to resume from is restored after this."""
        compatibility.check_namespace(self, trainer)
        self._restored = self._searching = self._fit_started = False
        self._max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs  # other callbacks may change it
        if stage == "fit":
            compatibility.check_strategy(self, trainer, self._unshardable)
            self._check_companions(trainer)

    def on_after_setup(self, **_: Any) -> None:
        """Refuse Fabric, which calls this: it has no training loop whose epochs and steps could be followed."""
        raise MisconfigurationException(
            f"{type(self).__name__} works in a `lightning.pytorch.Trainer`, got a `Fabric`, whose loops are your own."
            " Call `lightning_drive.find_masks` there, and `masks.apply_(module)` after every optimizer step."
        )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, and start afresh on a module that the masks were not made for."""
        known = self._module is not None and self._module() is pl_module
        goes_on = self.masks.hold_for(pl_module) and (self._finished or (known and trainer.current_epoch > 0))
        if not (self._restored or goes_on):
            self._start_afresh()
        self._module, self._fit_started = weakref.ref(pl_module), True
        if not self._finished:
            self._check_module(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up restored masks again, now that weights and optimizers are restored too."""
        self._phase_start = time.monotonic() if trainer.global_step == 0 else None  # else only part of it is known
        self._resumes_epoch = True  # unless ``on_train_epoch_start`` comes first
        if not self._finished:
            self._check_training(trainer, pl_module)
        if self.pruned:
            interrupted = self._restored and self.report is not None and trainer.global_step == self.report.step
            (self._settle if interrupted else self._enforce)(trainer, pl_module)
            self._check_restored()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune when it is time."""
        self._remember_when_due(trainer, pl_module)
        self._prune_when_due(trainer, pl_module)
        self._log_metrics(trainer, pl_module)
        self._resumes_epoch = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune and log where a run resumes in the middle of an epoch, which has no ``on_train_epoch_start`` then."""
        self._remember_when_due(trainer, pl_module, batch_idx)
        if self._prune_when_due(trainer, pl_module) or self._resumes_epoch:
            self._log_metrics(trainer, pl_module)
        self._resumes_epoch = False
        if batch_idx == 0:
            self._check_live(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on where pruned layers were replaced by others."""
        self._check_live(pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mask the gradients: unscaled already, not yet clipped."""
        if self._live is not None and not compatibility.unscales_in_step(trainer, optimizer):
            self._live.zero_gradients_()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mask the weights, where not every change to them has a hook after it."""
        if self._live is not None and self._hookless:
            self._live.zero_weights_()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring masks and report back to the process that spawned this one."""
        if self._handover.is_elsewhere and trainer.is_global_zero:
            self._handover.leave({**self.state_dict(), "start": None})

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish what was cut short, a commit or a step, for a checkpoint of the exception; let go of the module."""
        if self._fit_started and self.pruned:
            with suppress(ValueError):  # masks that do not fit, which were the exception then
                self.masks.apply_(pl_module)
        scoring.begin_epoch_again(trainer)
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the module and its optimizers."""
        self._release()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note a search for a learning rate or batch size: it saves before training starts, and returns to that."""
        self._searching = not self._fit_started

    @override
    def state_dict(self) -> dict[str, Any]:
        """Save the masks, one bit per weight, the report, and what there is to return to."""
        return {
            "version": _VERSION,
            "masks": self.masks.state_dict(),
            "report": None if self.report is None else self.report.to_dict(),
            "start": None if self._start is None else self._start.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if state_dict.get("version") != _VERSION:
            raise ValueError(
                f"The checkpoint's {type(self).__name__} state has version {state_dict.get('version')}, but this"
                f" lightning_drive reads version {_VERSION}."
            )
        start = state_dict.get("start")
        self._take(state_dict)
        self._start = None if start is None else RewindPoint.from_state_dict(start)
        self._restored = self._restored or not self._searching

    def __getstate__(self) -> dict[str, Any]:
        """Leave the live parameters and hooks of this process out of copies and pickles."""
        self._collect()
        own = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}  # the module's
        return {**own, "_live": None, "_handles": [], "_module": None}

    def _collect(self) -> None:
        """Take what a copy of this callback has found out in a process that was spawned from this one."""
        if self._module is None and (state := self._handover.take()) is not None:  # this process has not trained itself
            self._take(state)

    def _take(self, state_dict: dict[str, Any]) -> None:
        report = state_dict["report"]
        self._masks = Masks.from_state_dict(state_dict["masks"])
        self._report = None if report is None else PruningReport.from_dict(report)

    # What happens when it is time.

    def _remember_when_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int = 0) -> None:
        """Remember the point to return to, and keep it as long as it is needed."""
        if self._finished:
            if self._start is not None and self.report is not None and trainer.global_step > self.report.step:
                self._start = None
        elif self._start is None and self._remember_epoch is not None:
            past = trainer.current_epoch > self._remember_epoch or batch_idx > 0
            if is_quick_check(trainer) or (trainer.current_epoch == self._remember_epoch and not past):
                schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
                self._start = RewindPoint.take(pl_module, trainer.optimizers, schedulers)
            elif trainer.current_epoch >= self._remember_epoch:
                raise MisconfigurationException(
                    f"{type(self).__name__} returns to the weights of the start of epoch {self._remember_epoch}, but"
                    f" this run goes on in epoch {trainer.current_epoch} from a checkpoint that does not have them."
                    " Resume from a checkpoint that was saved with this callback and these settings, or start from the"
                    " beginning."
                )

    def _prune_when_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Prune if it is time; say whether it was."""
        if self._finished or not self._is_due(trainer):
            return False
        self._prune(trainer, pl_module)
        return True

    def _search(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        method: Method,
        *,
        loss_fn: Callable[..., Any] | None = None,
        only_round: int | None = None,
        shuffle: bool = False,
        bn_batches: int = 0,
    ) -> Outcome:
        """Find the masks and the BatchNorm statistics that go with them; the module stays as it is."""
        times = [time.monotonic()] * 2  # when the search began, and when its last round was over

        def on_round(*_: Any) -> None:
            times[1] = time.monotonic()
            advance()

        num_rounds = method.rounds if only_round is None else 1
        ranks = scoring.ranks_of(trainer)
        shards.reshard_(pl_module)  # validation, a forward pass without a backward pass, leaves parameters whole
        scoring.free_gradients(trainer, pl_module)
        parameters = self.prunable_parameters(pl_module)
        with (
            display.progress(trainer, f"Pruning by {type(method).__name__}", num_rounds) as advance,
            scoring.sandbox(trainer, pl_module),
            scoring.TrainingBatches(trainer, pl_module).opened() as batches,
        ):
            found = finding.search(
                pl_module,
                method,
                sparsity=self.sparsity,
                parameters=parameters,
                batches=batches,
                loss_fn=loss_fn,
                masks=self.masks,
                schedule=self.schedule,
                scope=self.scope,
                example_input=flow.first_tensor(pl_module.example_input_array),
                on_round=on_round,
                only_round=only_round,
                shuffle=self._generator(ranks) if shuffle else None,
                ranks=ranks,
            )
            measured = costs.measure(pl_module, parameters, found.example_input)
            times.append(time.monotonic())
            statistics = {}
            if loss_fn is not None:
                with gradients.undisturbed(pl_module), ranks.together():
                    found.masks.apply_(pl_module)
                    statistics = gradients.batch_norm_statistics(pl_module, loss_fn, islice(batches, bn_batches))
                ranks.mean_(
                    value for layer in statistics.values() for value in layer.values() if value.is_floating_point()
                )
        times.append(time.monotonic())
        spans = [after - before for before, after in pairwise(times)]
        return Outcome(
            found, statistics, measured, dict(zip(("rounds", "measuring", "batch_norm"), spans, strict=True))
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
    ) -> None:
        """Put masks and report down; what follows from them is repeated when an interrupted run is resumed."""
        found, measured = outcome.found, outcome.costs
        before = self._report if cycle is not None else None
        phases = outcome.phases
        if self._phase_start is not None:
            phases = {"warmup" if cycle is None else "training": start - self._phase_start, **phases}
        cycles = () if before is None else before.cycles
        if cycle is not None:
            metrics = companions.last_metrics(trainer)
            cycles = (*cycles, CycleReport(cycle, found.masks.num_kept, phases, metrics))
        report = PruningReport.of(
            found.masks,
            found.active,
            method=method,
            seconds=time.monotonic() - start,
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            warnings=[*found.warnings, *_not_measured(found, measured)],
            control=control,
            cycle=cycle,
            itemsizes=measured.itemsizes,
            multiply_adds=measured.multiply_adds,
            phases=phases,
            rounds=found.rounds if before is None else before.rounds + found.rounds,
            scores=found.scores,
            cycles=cycles,
            other_multiply_adds=measured.others,
        )
        self._masks, self._report = found.masks.to("cpu"), report

    def _committed(self, start: float) -> None:
        """Note how long it took to put down all that follows from the masks."""
        assert self._report is not None
        self._phase_start = time.monotonic()
        phases = {**self._report.phases, "commit": self._phase_start - start}
        cycles = self._report.cycles and (*self._report.cycles[:-1], replace(self._report.cycles[-1], phases=phases))
        self._report = replace(self._report, phases=phases, cycles=cycles)

    def _announce(self, trainer: pl.Trainer, found: Found, text: str | None = None) -> None:
        """Tell the user and the loggers what was pruned: all of the report, or a text in its place."""
        assert self.report is not None
        for warning in found.warnings:
            rank_zero_warn(warning)
        display.show(trainer, self.report if text is None else text)
        metrics = {
            "pruning/sparsity": self.report.sparsity,
            "pruning/density": self.report.density,
            "pruning/effective_sparsity": self.report.effective_sparsity,
            "pruning/seconds": self.report.seconds,
            **self._metrics(),
        }
        display.log_metrics(trainer, {key: value for key, value in metrics.items() if value is not None})
        if self._finished:
            display.log_pictures(trainer, self.report)

    def _enforce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masks on everything that is alive, and have every optimizer step followed by them."""
        self._release()
        shards.reshard_(pl_module)
        self._live = MaskedParameters(pl_module, self.masks)
        self._live.zero_weights_()
        self._live.zero_gradients_()
        for average in companions.averaged_models(trainer):
            self.masks.apply_(average)
        if self._gradients_are_read_early(trainer, pl_module):
            self._handles += self._live.zero_gradients_at_once(keep_overflow=compatibility.scaler(trainer) is not None)
        self._hookless = not pl_module.automatic_optimization
        for optimizer in trainer.optimizers:
            self._live.zero_optimizer_state_(optimizer)
            for each in masking.with_wrapped(optimizer):
                self._follow_steps(trainer, pl_module, each)
                if self._live.may_divide_by_zero:
                    compatibility.warn_of_small_eps(each)

    def _follow_steps(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Have every step of an optimizer followed by the masks, and led by them where the gradients may need it."""
        # Lightning also takes wrappers that only look like an optimizer, or were never initialised as one.
        step = getattr(type(optimizer), "step", None)
        hooked = getattr(step, "hooked", False) and "_optimizer_step_post_hooks" in vars(optimizer)
        if not hooked:
            self._hookless = True
            return
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if not pl_module.automatic_optimization or compatibility.unscales_in_step(trainer, optimizer):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    def _gradients_are_read_early(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether gradients may be used, or clipped, before :meth:`on_before_optimizer_step` masks them."""
        in_module = ("backward", "on_after_backward", "optimizer_step")
        in_callbacks = ("on_after_backward", "on_before_optimizer_step")
        others = [callback for callback in companions.callbacks_of(trainer) if callback is not self]
        return (
            not pl_module.automatic_optimization
            or any(is_overridden(hook, pl_module, pl.LightningModule) for hook in in_module)
            or any(is_overridden(hook, callback, pl.Callback) for callback in others for hook in in_callbacks)
        )

    def _reinitialise(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return to the remembered weights, with new initial values for the survivors."""
        assert self._start is not None
        generator = self._generator(scoring.ranks_of(trainer))
        self._start.snapshot.redrawn(self.masks, generator).rewind_(pl_module, self.masks)

    def _generator(self, ranks: Ranks) -> torch.Generator:
        """Give random numbers that depend on the first rank's seed, and neither repeat nor use up those of training."""
        return torch.Generator().manual_seed(ranks.broadcast(torch.initial_seed()) ^ 0x5EED)

    def _before_step(self, *_: Any) -> None:
        if self._live is not None:
            self._live.zero_gradients_()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._live is not None:
            self._live.zero_weights_()
            if self._live.may_divide_by_zero:
                self._live.zero_optimizer_state_(optimizer)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._live, self._hookless = [], None, False

    def _log_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.barebones:
            # A batch size of 1, so that Lightning does not look for one in batches that may be of any kind.
            pl_module.log_dict(self._metrics(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    def _check_live(self, pl_module: pl.LightningModule) -> None:
        replaced = [] if self._live is None else self._live.replaced_in(pl_module)
        if replaced:
            raise MisconfigurationException(
                f"The masks are on the parameters that {type(pl_module).__name__} had when it was pruned, but"
                f" {listed(replaced)} was replaced or removed since, and what is there now would train without a mask."
                " Write new values into a layer in place, replace it before pruning, or leave it out with `exclude`."
            )

    # What is refused before training starts.

    def _check_companions(self, trainer: pl.Trainer) -> None:
        for other in companions.callbacks_of(trainer):
            if other is not self and isinstance(other, (PruningCallback, ModelPruning)):
                raise MisconfigurationException(
                    f"Only one callback of a Trainer can prune, got {type(self).__name__} and {type(other).__name__}:"
                    " each would cut what the other keeps, and neither would reach its `sparsity`. Remove one of them."
                )

    @property
    def _unshardable(self) -> str:
        """Say why this cannot be done with weights that are sharded over ranks; empty if it can."""
        if self._remember_epoch is not None:
            return f"it returns to the weights of epoch {self._remember_epoch}, and a checkpoint has no room for them."
        return ""

    def _check_restored(self) -> None:
        if not self._finished or self.report is None:
            return
        asked = self.masks.num_prunable * (1 - self.sparsity)
        if abs(self.masks.num_kept - asked) > len(self.masks):  # rounding may take one weight per parameter
            rank_zero_warn(
                f"The checkpoint was pruned to a sparsity of {self.masks.sparsity:.4f} and stays so:"
                f" `sparsity={self.sparsity}` has no effect. To prune to another one, start from a dense checkpoint."
            )
        if self.report.control != self.control:
            rank_zero_warn(
                f"The checkpoint was pruned with control={self.report.control!r} and stays so:"
                f" `control={self.control!r}` has no effect. Start from a dense checkpoint."
            )


def _not_measured(found: Found, measured: Costs) -> Iterator[str]:
    """Say what the report does not have, and why."""
    remedy = "Set `example_input_array` on the module to the tensor that it takes."
    if found.active is None and not found.path_error:
        yield (
            "Effective sparsity and multiply-adds were not measured: paths are not followed through sharded parameters."
        )
    if found.path_error:
        neither = found.example_input is None or measured.error == found.path_error
        both = " and multiply-adds were" if neither else " was"
        yield (
            f"Effective sparsity{both} not measured, since `forward` failed on the first tensor of a batch"
            f" ({found.path_error}). {remedy}"
        )
    if measured.error and measured.error != found.path_error:
        yield (
            "Multiply-adds were not measured, since `forward` failed on the first tensor of a batch"
            f" ({measured.error}). {remedy}"
        )
    yield from measured.warnings


def is_quick_check(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``: one short epoch, in which pruning should be seen to work.

    Args:
        trainer: The Trainer.

    """
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
