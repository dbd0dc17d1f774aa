"""How masks live through a training run: its steps, checkpoints and resumes."""

import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_drive.core import arguments, messages, saved_values, shards
from lightning_drive.core.arguments import Control, Schedule, Scope
from lightning_drive.core.masks import Masks
from lightning_drive.export import checkpoints
from lightning_drive.network import batch_norm, prunable
from lightning_drive.network.gradients import LossFunction
from lightning_drive.network.rewinding import RewindPoint
from lightning_drive.report import plan as plan_module
from lightning_drive.report.plan import Intent, PruningPlan
from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.search import loop
from lightning_drive.search.loop import Found
from lightning_drive.search.methods import Method
from lightning_drive.trainer import (
    checks,
    display,
    facts,
    loop_progress,
    network_copies,
    other_callbacks,
    reporting,
    restored_masks,
    run_length,
    sandbox,
    search,
    trained_parameters,
)
from lightning_drive.trainer.averages import load_batch_norm_statistics, restart_, tensors
from lightning_drive.trainer.enforcement import Enforcement
from lightning_drive.trainer.search import Outcome
from lightning_drive.trainer.spawned import Handover

_VERSION = 1

_LOOKS = 64
"""Up to which batch of an epoch to look, at powers of two, for copies of the network that change."""


class Pruning(NamedTuple):
    """What a callback knows of a pruning; set as a whole, so that a save at any moment has one that fits together."""

    masks: Masks = Masks()
    """The masks, on the CPU; empty before pruning."""
    report: PruningReport | None = None
    unfinished: Mapping[str, Mapping[str, Tensor]] | None = None
    """While all that follows from the masks is being done: new statistics of BatchNorm, by layer and buffer."""


class PruningCallback(pl.Callback):
    """Prune during training and keep what is pruned at zero: what all pruning callbacks share.

    Masks are found first and then committed at once, so an interrupt in between leaves a run that can be resumed. From
    there on pruned weights are exactly 0: their gradients are masked before clipping, the weights again after every
    optimizer step. Parameter names, their order and ``state_dict`` keys are never touched, so checkpoints load into
    the plain module, already sparse.

    In several processes, every rank scores its own batches, gradients are averaged, and all ranks get the same masks.

    A subclass says when it is time (:meth:`_is_due`) and what to do then (:meth:`_prune`). To change which parameters
    are prunable, override :meth:`prunable_parameters`; to prune copies of the network along, :meth:`averages`.

    Args:
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``.
        schedule: ``"exponential"`` or ``"linear"``, see :func:`lightning_drive.find_masks`.
        scope: ``"global"`` or ``"layerwise"``, see :func:`lightning_drive.find_masks`.
        include: Glob patterns over parameter names; ``None``: the weights of all layers that multiply by them, see
            :func:`lightning_drive.network.prunable.prunable_parameters`.
        exclude: Glob patterns over parameter names that stay dense.
        reset_best: Whether ModelCheckpoint and EarlyStopping forget what was before pruning; until then, EarlyStopping
            is held off.
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
        self.sparsity, self.schedule, self.scope = loop.check_settings(sparsity, schedule, scope)
        self.include = arguments.check_patterns("include", include)
        self.exclude = arguments.check_patterns("exclude", exclude)
        self.control: Control = arguments.check_choice("control", control, Control)
        self.reset_best = arguments.check_flag("reset_best", reset_best)
        self._pruning = Pruning()
        self._handover = Handover()
        self._remember_epoch = remember_epoch
        self._start: RewindPoint | None = None
        self._settings_then: dict[str, Any] | None = None  # those of restored masks, as far as they are known
        self._max_epochs = -1
        self._fit_started = False
        self._thread = 0
        self._searching = False
        self._restored = False
        self._resumes_epoch = False
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._live: Enforcement | None = None
        self._phase_start: float | None = None
        self._forgotten = ""
        self._names: tuple[str, ...] = ()  # what is prunable when ``fit`` starts
        self._copies: set[str | int] = set()  # names and places of those that were warned of
        self._sums: dict[str, tuple[float, ...]] = {}  # of what may be averages, in this epoch

    @property
    def masks(self) -> Masks:
        """The masks, on the CPU; empty before pruning."""
        self._collect()
        return self._pruning.masks

    @property
    def report(self) -> PruningReport | None:
        """What was pruned; ``None`` before pruning."""
        self._collect()
        return self._pruning.report

    @property
    def pruned(self) -> bool:
        """Whether the network has been pruned."""
        return bool(self.masks)

    def prunable_parameters(self, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Select the parameters that the masks will cover; override it for a rule that patterns cannot express.

        In a Trainer, those of them that no optimizer holds are left out afterwards: they are not trained.

        Args:
            pl_module: The module.

        Returns:
            Parameter name, as in ``pl_module.named_parameters()``, to the live parameter.

        """
        return prunable.prunable_parameters(pl_module, self.include, self.exclude)

    def averages(self, pl_module: pl.LightningModule) -> Iterable[nn.Module | Mapping[str, Tensor]]:
        """Return the copies of the network that are pruned along with it; override it where training keeps such copies.

        An average of dense and sparse weights is dense, so averages have to be pruned with the network. Those that
        Lightning's callbacks keep (``WeightAveraging``, ``EMAWeightAveraging``, ``StochasticWeightAveraging``) are
        found without this. It is called whenever masks are put on, from the start of ``fit`` on; return nothing for a
        copy that does not exist yet.

        Args:
            pl_module: The module.

        Returns:
            Every copy as a module whose parameters have the names that they have in ``pl_module``, or as a mapping
            from these names to tensors. By default, none.

        Example:
            A mean teacher inside the module:

            >>> from lightning_drive import DRIVEPruningCallback
            >>> class WithTeacher(DRIVEPruningCallback):
            ...     def averages(self, pl_module):
            ...         teacher = pl_module.teacher.named_parameters()
            ...         return [{f"student.{name}": tensor for name, tensor in teacher}]

            A copy of the whole module that another callback makes, as ``copy.deepcopy(pl_module)``:

            >>> class WithCopy(DRIVEPruningCallback):
            ...     def averages(self, pl_module):
            ...         copies = [getattr(each, "average", None) for each in pl_module.trainer.callbacks]
            ...         return [each for each in copies if each is not None]

            ``torch_ema``, made of ``pl_module.net.parameters()``, which keeps tensors without names:

            >>> class WithTorchEma(DRIVEPruningCallback):
            ...     def averages(self, pl_module):
            ...         names = [f"net.{name}" for name, _ in pl_module.net.named_parameters()]
            ...         return [dict(zip(names, pl_module.ema.shadow_params))]

        """
        return ()

    def plan(
        self, pl_module: nn.Module, *, max_epochs: int | None = None, steps_per_epoch: int | None = None
    ) -> PruningPlan:
        """Say what would be pruned, when, and what that would cost; nothing is done. ``print(callback.plan(model))``.

        In a Trainer, what no optimizer holds is not pruned. A module that no Trainer has got optimizers for yet shows
        only which parameters are frozen, so that the plan may have more parameters then.

        Args:
            pl_module: The module as it will be trained, or any torch module.
            max_epochs: Epochs of the whole run.
            steps_per_epoch: Training steps in each, such as ``len(train_loader)``.

        Raises:
            ValueError: If nothing is prunable, a pattern matches nothing, or a number is not a whole one of at least 1.

        """
        module: Any = pl_module
        trainer: Any = getattr(module, "_trainer", None)
        in_fit = isinstance(trainer, pl.Trainer) and trainer.optimizers
        return plan_module.plan(
            module,
            self._selected(trainer, module) if in_fit else self.prunable_parameters(module),
            self._intent(),
            sparsity=self.sparsity,
            schedule=self.schedule,
            scope=self.scope,
            exclude=self.exclude,
            max_epochs=max_epochs,
            steps_per_epoch=steps_per_epoch,
            untrained=trained_parameters.untrained(trainer, module) if in_fit else (),
        )

    # What a subclass says.

    def _intent(self) -> Intent:
        """Say when and how it will prune."""
        raise NotImplementedError

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Say whether it is time to prune (again)."""
        raise NotImplementedError

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find masks, put them down by :meth:`_record`, and finish by :meth:`_commit`."""
        raise NotImplementedError

    @property
    def _finished(self) -> bool:
        """Whether the masks are the final ones."""
        return self.pruned

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what a kind of callback does to a module that is pruned; doing it twice does no harm."""
        self._enforce(trainer, pl_module)

    def _check_module(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, before anything runs, what cannot work."""
        selected = self._selected(trainer, pl_module)
        prunable.check_numbers(selected)
        shards.holders(selected)
        self._names = tuple(selected)
        if text := trained_parameters.left_out(trainer, pl_module, self.prunable_parameters):
            display.show(trainer, text)
        if self._remember_epoch is not None:
            checks.check_finetuning(self, trainer)

    def _check_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse, once the data is loaded and a checkpoint restored, what cannot work; warn of what may not."""
        if not facts.is_quick_check(trainer):
            run_length.warn_of_unknown_length(trainer, self._intent(), self._remedy_for_unknown_length)
            run_length.warn_of_manual_steps(trainer, self._intent(), self._max_epochs)
            if not self.reset_best:
                run_length.warn_of_early_stopping(trainer, self._intent())

    def _metrics(self) -> dict[str, float]:
        """Give what is logged with every epoch, so that monitors and checkpoint names can use it."""
        if self.report is None:
            return {}
        metrics = {"pruning/sparsity": self.report.sparsity, "pruning/overall_sparsity": self.report.overall_sparsity}
        return {name: value for name, value in metrics.items() if value is not None}

    def _start_afresh(self) -> None:
        """Forget a module that the callback was used with before."""
        self._pruning, self._start, self._settings_then = Pruning(), None, None

    # When: each hook says what it does here.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work together, and note the length; a state to resume from is restored after this."""
        checks.check_namespace(self, trainer, pl_module)
        self._restored = self._searching = self._fit_started = False
        self._max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs  # other callbacks may change it
        if stage == "fit":
            checks.check_strategy(self, trainer, self._unshardable)
            checks.check_alone(self, trainer, PruningCallback)

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
        self._module, self._fit_started, self._thread = weakref.ref(pl_module), True, threading.get_ident()
        self._names, self._copies = tuple(self.masks), set()
        self._averages(pl_module)
        if not self._finished:
            self._check_module(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up restored masks again, now that weights and optimizers are restored too."""
        self._phase_start = time.monotonic() if trainer.global_step == 0 else None  # else only part of it is known
        self._resumes_epoch = True  # unless ``on_train_epoch_start`` comes first
        loop_progress.begin_batch_again(trainer)
        if not self._finished:
            self._check_training(trainer, pl_module)
        if self.pruned:
            if self._pruning.unfinished is None:
                self._enforce(trainer, pl_module)
            else:
                self._commit(trainer, pl_module)
            if self._restored:
                display.show(trainer, f"The masks were restored: {self.masks}")
            if self._finished and self.report is not None:
                restored_masks.warn_of_differences(self.masks, self.report, self.sparsity, self.control)
                if self._restored:
                    now, selects = self._settings(), (partial(self._selected, trainer), self.prunable_parameters)
                    restored_masks.warn_of_other_settings(
                        self.masks, self._settings_then or {}, now, selects, pl_module
                    )
        self._hold_off_early_stopping(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune when it is time."""
        self._warn_of_zeros(trainer, pl_module)
        self._warn_of_copies(trainer, pl_module)
        self._remember_when_due(trainer, pl_module)
        self._prune_when_due(trainer, pl_module)
        self._log_metrics(trainer, pl_module)
        self._resumes_epoch = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune and log where a run resumes in the middle of an epoch, which has no ``on_train_epoch_start`` then."""
        if self._resumes_epoch:
            self._warn_of_zeros(trainer, pl_module)
            self._warn_of_copies(trainer, pl_module)
        self._remember_when_due(trainer, pl_module, batch_idx)
        if self._prune_when_due(trainer, pl_module) or self._resumes_epoch:
            self._log_metrics(trainer, pl_module)
        self._resumes_epoch = False
        if self._live is not None:
            self._live.follow(trainer, pl_module)
            if batch_idx == 0:
                self._live.check(pl_module)
        if batch_idx <= _LOOKS and batch_idx & (batch_idx - 1) == 0:
            self._look_for_averages(trainer, pl_module, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on where pruned layers were replaced by others; mask again what others wrote."""
        self._look_for_averages(trainer, pl_module)
        if self._live is not None:
            self._live.check(pl_module)
            self._live.renew()

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Mask again what others wrote into pruned weights, now that whoever swaps averages in has done so."""
        if batch_idx == dataloader_idx == 0 and self._live is not None:
            self._live.renew()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mask the gradients: unscaled already, not yet clipped."""
        if self._live is not None:
            self._live.before_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mask the weights, where not every change to them has a hook after it."""
        if self._live is not None:
            self._live.after_batch(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return masks and report to the process that called ``fit``, where Lightning spawned or forked this one."""
        if self._live is not None:
            self._live.renew()
        self._handover.send(trainer.strategy.launcher, lambda: {**self.state_dict(), "start": None})

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish what was cut short, a commit or a step, for a checkpoint of the exception; let go of the module."""
        if self._fit_started and self.pruned:
            with suppress(Exception):  # which may be what the exception was about; a resume does it again
                if self._pruning.unfinished is not None and trainer.world_size == 1:
                    self._commit(trainer, pl_module)
            with suppress(ValueError):  # masks that do not fit, which were the exception then
                self.masks.apply_(pl_module)
        other_callbacks.hold_off_early_stopping(trainer, False)
        loop_progress.begin_epoch_again(trainer)
        self._handover.discard()
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the module and its optimizers, after a last look at what others wrote."""
        if self._live is not None:
            self._live.renew()
        other_callbacks.hold_off_early_stopping(trainer, False)
        self._release()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note a search for a learning rate or batch size: it saves before training starts, and returns to that."""
        self._searching = not self._fit_started
        loop_progress.let_epoch_begin_again(checkpoint)
        if self._live is not None and self._pruning.unfinished is None:  # else masks are just being put on
            self._live.renew(checkpoint.get("state_dict"))
        if self._fit_started and threading.get_ident() != self._thread:
            self._hold_still(checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the state of a pruning callback of another name; Lightning restores that of the same name."""
        states = checkpoint.get("callbacks") or {}
        own = [states[name] for name in (self.state_key, self._legacy_state_key) if name in states]
        taken = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        others = {name: states[name] for name in checkpoints.pruning_states(checkpoint) if name not in taken}
        pruned = [name for name, state in others.items() if state["report"] is not None]
        if own and (not pruned or saved_values.check(dict[str, object], own[0], "the callback state").get("report")):
            return
        fitting = [name for name, state in others.items() if _is_in_cycles(state) == _is_in_cycles(self.state_dict())]
        if len(others) == 1 and fitting and not own:
            self.load_state_dict(copy.deepcopy(others[fitting[0]]))
            if pruned:
                display.show(trainer, f"{type(self).__name__} takes over the masks of {pruned[0]} in the checkpoint.")
        elif pruned and trainer.state.fn == TrainerFn.FITTING:
            raise ValueError(
                f"{type(self).__name__} goes on only with the masks of one callback of its kind, IMP or not, but the"
                f" checkpoint was pruned by {messages.listed(others)}. Resume with the callback that the checkpoint was"
                " saved with, or begin anew from a dense checkpoint."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Save the masks, one bit per weight, the report, and what there is to return to."""
        return {
            "version": _VERSION,
            "masks": self.masks.state_dict(),
            "report": None if self.report is None else self.report.to_dict(),
            "start": None if self._start is None else self._start.state_dict(),
            "unfinished": self._pruning.unfinished,
            "settings": self._settings() if self._settings_then is None else self._settings_then,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        what = f"the checkpoint's {type(self).__name__} state"
        version = saved_values.check(dict[str, object], state_dict, what).get("version")
        if type(version) is not int or version != _VERSION:
            raise ValueError(
                f"The checkpoint's {type(self).__name__} state has version {messages.shown(version)}, but this"
                f" lightning_drive reads version {_VERSION}."
            )
        start = state_dict.get("start")
        start = None if start is None else RewindPoint.from_state_dict(start)
        if start is None and self._remember_epoch is not None and state_dict.get("unfinished") is not None:
            raise ValueError(
                f"{type(self).__name__} has to return to remembered weights, which {what} must have under 'start', got"
                f" None. Resume with the settings that the checkpoint was saved with. {saved_values.REMEDY}"
            )
        self._take(state_dict)
        self._start = start
        self._restored = self._restored or not self._searching

    def __getstate__(self) -> dict[str, Any]:
        """Leave the live parameters and hooks of this process out of copies and pickles."""
        self._collect()
        own = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}  # the module's
        return {**own, "_live": None, "_module": None, "_handover": self._handover.of_copy()}

    def _hold_still(self, checkpoint: dict[str, Any]) -> None:
        """Copy what another thread is going to write, and may be still writing when the network is pruned."""
        before = None
        while before is not self._pruning:  # else it was pruned meanwhile: once more
            before = self._pruning
            copies = {name: loop_progress.copied(checkpoint[name]) for name in ("state_dict", "optimizer_states")}
            state = self.state_dict()
        checkpoint.update(copies)
        checkpoint["callbacks"][self.state_key] = state

    def _collect(self) -> None:
        """Take what a copy of this callback found in processes that Lightning launched for a ``fit`` of this one."""
        if (state := self._handover.take()) is not None:
            self._take(state)

    def _take(self, state_dict: dict[str, Any]) -> None:
        masks = Masks.from_state_dict(state_dict.get("masks"))  # type: ignore[arg-type]
        values, settings = state_dict.get("report"), state_dict.get("settings", {})
        report = None if values is None else PruningReport.from_dict(values)
        restored_masks.check_belong_together(masks, report)
        settings = saved_values.check(dict[str, object], settings, "the settings in the checkpoint's callback state")
        kind = dict[str, dict[str, Tensor]] | None
        unfinished = saved_values.check(kind, state_dict.get("unfinished"), "the unfinished part of the callback state")
        self._check_settings(settings, report)
        self._pruning = Pruning(masks, report, unfinished)
        self._settings_then = settings if masks else None

    def _check_settings(self, then: dict[str, Any], report: PruningReport | None) -> None:
        """Raise if a state was saved with settings that these may not follow."""

    def _settings(self) -> dict[str, Any]:
        """Return in plain types what the masks depend on."""
        names = ("schedule", "scope", "control")
        patterns = {name: arguments.check_patterns(name, getattr(self, name)) for name in ("include", "exclude")}
        return {"sparsity": float(self.sparsity), **{name: getattr(self, name) for name in names}, **patterns}

    # What happens when it is time.

    def _remember_when_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int = 0) -> None:
        """Remember the point to return to, and keep it as long as it is needed."""
        if self._finished:
            if self._start is not None and self.report is not None and trainer.global_step > self.report.step:
                self._start = None
        elif self._start is None and self._remember_epoch is not None:
            past = trainer.current_epoch > self._remember_epoch or batch_idx > 0
            if facts.is_quick_check(trainer) or (trainer.current_epoch == self._remember_epoch and not past):
                schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
                self._start = RewindPoint.take(pl_module, trainer.optimizers, schedulers)
            elif trainer.current_epoch >= self._remember_epoch:
                raise MisconfigurationException(
                    f"{type(self).__name__} returns to the weights of the start of epoch {self._remember_epoch}, but"
                    f" this run goes on in epoch {trainer.current_epoch} from a checkpoint that does not have them."
                    " Resume from a checkpoint that was saved with this callback and these settings, or start from the"
                    " beginning."
                )

    def _hold_off_early_stopping(self, trainer: pl.Trainer) -> None:
        """Keep EarlyStopping from ending training before the last cut."""
        other_callbacks.hold_off_early_stopping(trainer, self.reset_best and not self._finished)

    def _prune_when_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Prune if it is time; say whether it was."""
        if self._finished or not self._is_due(trainer):
            return False
        try:
            self._prune(trainer, pl_module)
        except StopIteration as error:  # which Lightning takes for the end of training
            raise RuntimeError(f"Pruning failed, since {error!r} was raised while scoring.") from error
        return True

    def _search(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        method: Method,
        *,
        loss: Callable[[sandbox.Sandbox], LossFunction] | None = None,
        only_round: int | None = None,
        shuffle: bool = False,
        bn_batches: int = 0,
    ) -> Outcome:
        """Find the masks and the BatchNorm statistics that go with them; the module stays as it is."""
        return search.search(
            trainer,
            pl_module,
            method,
            partial(self._selected, trainer),
            sparsity=self.sparsity,
            masks=self.masks,
            schedule=self.schedule,
            scope=self.scope,
            loss=loss,
            only_round=only_round,
            shuffle=shuffle,
            bn_batches=bn_batches,
            others=self._others(trainer, pl_module),
        )

    def _others(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Name the matrices that are trained and stay dense, unless the user has said what is to be pruned."""
        selects_itself = type(self).prunable_parameters is not PruningCallback.prunable_parameters
        if self.include is not None or selects_itself:
            return []
        left_out = {**self._selected(trainer, pl_module), **trained_parameters.untrained(trainer, pl_module)}
        return prunable.dense_matrices(pl_module, left_out, self.exclude)

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
        """Put masks and report down, at once: from here on the network counts as pruned."""
        report = reporting.report(
            trainer,
            outcome,
            method,
            start=start,
            phase_start=self._phase_start,
            control=control,
            cycle=cycle,
            before=None if cycle is None else self.report,
        )
        self._pruning = Pruning(outcome.found.masks.to("cpu"), report, outcome.statistics)

    def _commit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do all that follows from masks that were put down; a resume repeats it if it is cut short."""
        start = time.monotonic()
        for module in (pl_module, *other_callbacks.averaged_models(trainer)):
            batch_norm.load_batch_norm_statistics(module, self._pruning.unfinished or {})
        load_batch_norm_statistics(self._averages(pl_module), self._pruning.unfinished or {})
        self._settle(trainer, pl_module)
        self._hold_off_early_stopping(trainer)
        if self._finished and self.reset_best:
            self._forgotten = other_callbacks.forget_best(trainer)
        self._phase_start = time.monotonic()
        report = self.report and reporting.with_commit(self.report, self._phase_start - start)
        self._pruning = Pruning(self.masks, report)

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
        if self._forgotten:
            rank_zero_info(self._forgotten)
            self._forgotten = ""

    def _enforce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masks on everything that is alive, and have every optimizer step followed by them."""
        warned = self._live is not None and self._live.warned
        self._release()
        copies = partial(self._averages, pl_module)
        self._live = Enforcement(pl_module, self.masks, copies=copies, warned=warned)
        self._live.begin(self, trainer, pl_module)

    def _reinitialise(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return to the remembered weights, with new initial values for the survivors."""
        assert self._start is not None
        redrawn = self._start.snapshot.redrawn(self.masks, sandbox.random_numbers(trainer))
        redrawn.rewind_(pl_module, self.masks)

    def _selected(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        """Select the prunable parameters that an optimizer holds."""
        return trained_parameters.select(trainer, pl_module, self.prunable_parameters)

    def _averages(self, pl_module: pl.LightningModule) -> list[dict[str, Tensor]]:
        """Return the tensors of what is pruned along, by the names that they have in the module."""
        return tensors(self.averages(pl_module), pl_module)

    def _restart_averages(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let averages begin again with the module as it is now."""
        other_callbacks.restart_averages(trainer, pl_module)
        restart_(self._averages(pl_module), pl_module)

    def _release(self) -> None:
        if self._live is not None:
            self._live.end()
        self._live = None

    def _log_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.barebones:
            # A batch size of 1, so that Lightning does not look for one in batches that may be of any kind.
            pl_module.log_dict(self._metrics(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    # What is warned of.

    def _warn_of_zeros(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn, once in a ``fit``, of a network that is sparse already and has no masks."""
        if self._resumes_epoch and not (self.pruned or self._is_due(trainer)):
            for text in self._zeros_without_masks(pl_module, self._names):
                rank_zero_warn(text)

    def _warn_of_copies(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of submodules that are copies of the network and are not pruned along."""
        others = trained_parameters.untrained(trainer, pl_module)
        alive = {each for name, each in pl_module.named_parameters() if each.requires_grad and name not in others}
        for each in network_copies.inside(pl_module, self._names, alive):
            self._warn_of_copy(pl_module, each)

    def _look_for_averages(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int = 1) -> None:
        """Warn of copies in attributes that change while training goes on, so that they are no mere records."""
        if batch_idx == 0:
            self._sums = {}
        callbacks = [each for each in other_callbacks.callbacks_of(trainer) if each is not self]
        for each, sums, is_record in network_copies.outside(pl_module, callbacks, self._names):
            if self._sums.setdefault(each.name, sums) != sums and not is_record:
                self._warn_of_copy(pl_module, each)

    def _warn_of_copy(self, pl_module: pl.LightningModule, found: network_copies.Copy) -> None:
        """Warn of a copy, once, if it is not pruned along."""
        along = {each.data_ptr() for average in self._averages(pl_module) for each in average.values()}
        places = {each.data_ptr() for each in found.pairs.values()}
        is_known = found.name in self._copies or not places.isdisjoint(along | self._copies)
        if not is_known and not network_copies.is_sparse(found, self.masks):
            self._copies.update((found.name, *places))
            rank_zero_warn(network_copies.warning(found, type(self).__name__))

    def _zeros_without_masks(
        self, pl_module: pl.LightningModule, names: Iterable[str], masks: Masks | None = None
    ) -> Iterator[str]:
        """Say that weights are pruned already, but are not masked: neither before a cut nor by the masks of one."""
        parameters = dict(pl_module.named_parameters())
        weights = {name: parameters[name] for name in names if name in parameters}
        numbers = trained_parameters.zeros(weights.values())
        trains = "these zeros will be trained like all other weights until it prunes"
        if masks is not None:
            kept = sum(
                int((shards.local(each.detach()) == 0).logical_and_(shards.part(masks[name], of=each)).sum())
                for name, each in weights.items()
            )
            trains = f"{kept:,} of these zeros are kept, and will be trained like all other weights"
        if numbers.are_many and (masks is None or kept):
            yield (
                f"{numbers.number:,} of {numbers.size:,} prunable weights ({numbers.share:.1%}) are 0 already, as in a"
                f" network that was pruned, but {type(self).__name__} has no masks for them: {trains}. To go on with a"
                " pruned network, pass a checkpoint as `ckpt_path` that was saved with the state of the callback that"
                " pruned it."
            )

    # What is refused before training starts.

    @property
    def _remedy_for_unknown_length(self) -> str:
        """What to set where an epoch may never end."""
        return "Set `limit_train_batches` to the number of batches that an epoch is to have."

    @property
    def _unshardable(self) -> str:
        """Say why this cannot be done with weights that are sharded over ranks; empty if it can."""
        if self._remember_epoch is not None:
            return f"it returns to the weights of epoch {self._remember_epoch}, and a checkpoint has no room for them."
        return ""


def _is_in_cycles(state: Mapping[str, Any]) -> bool:
    """Whether a callback state is one of IMP."""
    settings = state.get("settings")
    return isinstance(settings, dict) and "cycles" in settings
