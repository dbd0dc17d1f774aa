"""When a pruning callback acts: the hooks of Lightning, and the callback's state in checkpoints."""

import copy
import threading
import time
import weakref
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from typing_extensions import override

from lightning_drive.callbacks.actions import PruningActions
from lightning_drive.core import arguments, saved_values, shards
from lightning_drive.network import prunable_checks
from lightning_drive.trainer import (
    checks,
    end_of_training,
    lightning_internals,
    other_callbacks,
    restored_masks,
    resuming,
    saved_state,
    step_counts,
    terminal,
    trained_parameters,
)
from lightning_drive.trainer.dense_copies import UnmaskedWeights
from lightning_drive.trainer.fit_state import Fit
from lightning_drive.trainer.saved_state import Pruning, SavedState


class PruningCallback(PruningActions):
    """Prune during training and keep what is pruned at zero: what all pruning callbacks share.

    Masks are found first and then committed at once, so an interrupt in between leaves a run that can be resumed. From
    there on pruned weights are exactly 0: their gradients are masked before clipping, the weights again after every
    optimizer step. Parameter names, their order and ``state_dict`` keys are never touched, so checkpoints load into
    the plain module, already sparse.

    In several processes, every rank scores its own batches, gradients are averaged, and all ranks get the same masks.

    The arguments are those of :class:`~lightning_drive.callbacks.actions.PruningActions`.
    """

    _module: weakref.ref[pl.LightningModule] | None = None
    """The module of the last ``fit``."""

    # What a subclass decides.

    @property
    def _last_epoch(self) -> int:
        """At the start of which epoch the last cut is due; 0 where :attr:`_step` decides."""
        raise NotImplementedError

    @property
    def _step(self) -> int | None:
        """Before which global step the only cut is due; ``None``: at the start of an epoch."""
        return None

    @property
    def _when(self) -> str:
        """When it prunes last, to be put into a sentence."""
        if self._step is not None:
            return f"before step {self._step}"
        return f"at the start of epoch {self._last_epoch} (counted from 0)"

    # What is checked.

    def _check_module(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise, before anything runs, if the module cannot be pruned."""
        selected = self._selected(trainer, pl_module)
        prunable_checks.check_numbers(selected)
        shards.holders(selected)
        if text := trained_parameters.left_out(trainer, pl_module, self.prunable_parameters):
            terminal.show(trainer, text)
        if self._remember_epoch is not None:
            checks.check_finetuning(self, trainer)

    def _check_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise, once data are loaded and a checkpoint is restored, if it never could be time to prune; warn if not."""
        if not step_counts.is_quick_check(trainer):
            last_cut = self._last_epoch, self._step, self._when
            end_of_training.warn_of_unknown_length(trainer, *last_cut, self._remedy_for_unknown_length)
            end_of_training.warn_of_manual_steps(trainer, *last_cut, self._fit.max_epochs)
            if not self.reset_best:
                end_of_training.warn_of_early_stopping(trainer, *last_cut)

    @property
    def _remedy_for_unknown_length(self) -> str:
        """What to set where an epoch may never end."""
        return "Set `limit_train_batches` to the number of batches that an epoch is to have."

    @property
    def _unshardable(self) -> str:
        """Why this callback cannot prune weights that are sharded over ranks; empty if it can."""
        if self._remember_epoch is not None:
            return f"it returns to the weights of epoch {self._remember_epoch}, and a checkpoint has no room for them."
        return ""

    # When.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if things do not work together, and note the length; a state to resume from is restored after this."""
        checks.check_namespace(self, trainer, pl_module)
        self._fit = Fit(-1 if trainer.max_epochs is None else trainer.max_epochs)
        if stage == "fit":
            checks.check_strategy(self, trainer, self._unshardable)
            checks.check_alone(self, trainer, PruningCallback)

    def on_after_setup(self, **_: Any) -> None:
        """Raise under Fabric, which calls this: it has no training loop whose epochs and steps could be followed."""
        raise MisconfigurationException(
            f"{type(self).__name__} works in a `lightning.pytorch.Trainer`, got a `Fabric`, whose loops are your own."
            " Call `lightning_drive.find_masks` there, and `masks.apply_(module)` after every optimizer step."
        )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if the module cannot be pruned, and start afresh on one that the masks were not made for."""
        known = self._module is not None and self._module() is pl_module
        goes_on = self.masks.hold_for(pl_module) and (self._finished or (known and trainer.current_epoch > 0))
        if not (self._fit.is_restored or goes_on):
            self._start_afresh()
        self._module = weakref.ref(pl_module)
        self._fit.has_begun, self._fit.thread = True, threading.get_ident()
        averages = self._pruned_along(trainer, pl_module)
        averages.tensors()  # which raises if they cannot be pruned along
        if not self._finished:
            self._check_module(trainer, pl_module)
        names = self.masks if self._finished else self._selected(trainer, pl_module)
        self._fit.unmasked = UnmaskedWeights(self, trainer, pl_module, averages, names)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up restored masks again, now that weights and optimizers are restored too."""
        self._fit.phase_start = time.monotonic() if trainer.global_step == 0 else None
        self._fit.is_resuming_epoch = True  # unless ``on_train_epoch_start`` comes first
        resuming.begin_batch_again(trainer)
        if not self._finished:
            self._check_training(trainer, pl_module)
        if self.pruned:
            if self._pruning.unfinished is None:
                self._enforce(trainer, pl_module)
            else:
                self._commit(trainer, pl_module)
            if self._fit.is_restored:
                terminal.show(trainer, f"The masks were restored: {self.masks}")
            if self._finished and self.report is not None:
                self._warn_of_other_settings(trainer, pl_module)
        self._hold_off_early_stopping(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune when it is time."""
        if self._fit.unmasked is not None:
            self._fit.unmasked.at_epoch_start(self.masks, is_due=self._is_due(trainer))
        self._remember_when_due(trainer, pl_module)
        self._prune_when_due(trainer, pl_module)
        self._log_metrics(trainer, pl_module)
        self._fit.is_resuming_epoch = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune and log where a run resumes in the middle of an epoch, which has no ``on_train_epoch_start`` then."""
        if self._fit.is_resuming_epoch and self._fit.unmasked is not None:
            self._fit.unmasked.at_epoch_start(self.masks, is_due=self._is_due(trainer))
        self._remember_when_due(trainer, pl_module, batch_idx)
        if self._prune_when_due(trainer, pl_module) or self._fit.is_resuming_epoch:
            self._log_metrics(trainer, pl_module)
        self._fit.is_resuming_epoch = False
        if self._fit.enforcement is not None:
            self._fit.enforcement.follow(trainer, pl_module)
            if batch_idx == 0:
                self._fit.enforcement.check(pl_module)
        if self._fit.unmasked is not None:
            self._fit.unmasked.at_batch_start(self.masks, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if pruned layers were replaced by others; mask again what others wrote."""
        if self._fit.unmasked is not None:
            self._fit.unmasked.at_epoch_end(self.masks)
        if self._fit.enforcement is not None:
            self._fit.enforcement.check(pl_module)
            self._fit.enforcement.renew()

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Mask again what others wrote into pruned weights, now that whoever swaps averages in has done so."""
        if batch_idx == dataloader_idx == 0 and self._fit.enforcement is not None:
            self._fit.enforcement.renew()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mask the gradients: unscaled already, not yet clipped."""
        if self._fit.enforcement is not None:
            self._fit.enforcement.before_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mask the weights, where not every change to them has a hook after it."""
        if self._fit.enforcement is not None:
            self._fit.enforcement.after_batch(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return masks and report to the process that called ``fit``, where Lightning spawned or forked this one."""
        if self._fit.enforcement is not None:
            self._fit.enforcement.renew()
        self._handover.send(trainer.strategy.launcher, lambda: {**self.state_dict(), "start": None})

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish what was cut short, a commit or a step, for a checkpoint of the exception; let go of the module."""
        if self._fit.has_begun and self.pruned:
            with suppress(Exception):  # which may be what the exception was about; a resume does it again
                if self._pruning.unfinished is not None and trainer.world_size == 1:
                    self._commit(trainer, pl_module)
            with suppress(ValueError):  # masks that do not fit, which were the exception then
                self.masks.apply_(pl_module)
        other_callbacks.hold_off_early_stopping(trainer, False)
        resuming.begin_epoch_again(trainer)
        self._handover.discard()
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the module and its optimizers, after a last look at what others wrote."""
        if self._fit.enforcement is not None:
            self._fit.enforcement.renew()
        other_callbacks.hold_off_early_stopping(trainer, False)
        self._release()
        self._fit = Fit()

    def _release(self) -> None:
        """Let go of the module and its optimizers."""
        self._fit.release()

    def _prune_when_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Prune if it is time; return whether it was."""
        if self._finished or not self._is_due(trainer):
            return False
        try:
            self._prune(trainer, pl_module)
        except StopIteration as error:  # which Lightning takes for the end of training
            raise RuntimeError(f"Pruning failed, since {error!r} was raised while scoring.") from error
        return True

    def _log_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.barebones:
            # A batch size of 1, so that Lightning does not look for one in batches that may be of any kind.
            pl_module.log_dict(self._metrics(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)

    # What is saved and restored.

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note a search for a learning rate or batch size: it saves before training starts, and returns to that."""
        self._fit.is_probing = not self._fit.has_begun
        resuming.begin_saved_epoch_again(checkpoint)
        if self._fit.enforcement is not None and self._pruning.unfinished is None:  # else masks are just being put on
            self._fit.enforcement.renew(checkpoint.get("state_dict"))
        if self._fit.has_begun and threading.get_ident() != self._fit.thread:
            saved_state.hold_still(checkpoint, self, lambda: self._pruning)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the state of a pruning callback of another name; Lightning restores that of the same name."""
        own_names = (self.state_key, lightning_internals.legacy_state_key(self))
        if (renamed := saved_state.of_renamed(self, own_names, trainer, checkpoint)) is not None:
            name, state = renamed
            self.load_state_dict(copy.deepcopy({**state}))
            if state["report"] is not None:
                terminal.show(trainer, f"{type(self).__name__} takes over the masks of {name} in the checkpoint.")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the masks, one bit per weight, the report, and what there is to return to."""
        self._receive()
        settings = self._settings() if self._restored_settings is None else self._restored_settings
        return SavedState(self._pruning, self._start, settings).to_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        what = f"the checkpoint's {type(self).__name__} state"
        saved = SavedState.from_dict(state_dict, what)
        if saved.start is None and self._remember_epoch is not None and saved.pruning.unfinished is not None:
            raise ValueError(
                f"{type(self).__name__} has to return to remembered weights, which {what} must have under 'start', got"
                f" None. Resume with the settings that the checkpoint was saved with. {saved_values.REMEDY}"
            )
        self._take(saved)
        self._start = saved.start
        self._fit.is_restored = self._fit.is_restored or not self._fit.is_probing

    def __getstate__(self) -> dict[str, Any]:
        """Leave the ``fit`` of this process, and with it live parameters and hooks, out of copies and pickles."""
        self._receive()
        own = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}  # the module's
        return {**own, "_fit": Fit(), "_module": None, "_handover": self._handover.of_copy()}

    def _start_afresh(self) -> None:
        """Forget a module that the callback was used with before."""
        self._pruning, self._start, self._restored_settings = Pruning(), None, None

    def _settings(self) -> dict[str, Any]:
        """Return in plain types what the masks depend on."""
        names = ("schedule", "scope", "control")
        patterns = {name: arguments.check_patterns(name, getattr(self, name)) for name in ("include", "exclude")}
        return {"sparsity": float(self.sparsity), **{name: getattr(self, name) for name in names}, **patterns}

    def _warn_of_other_settings(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the network was pruned in another way than it would be now: it stays as it is."""
        assert self.report is not None
        restored_masks.warn_of_differences(self.masks, self.report, self.sparsity, self.control)
        if self._fit.is_restored:
            then, now = self._restored_settings or {}, self._settings()
            selects = (partial(self._selected, trainer), self.prunable_parameters)
            restored_masks.warn_of_other_settings(self.masks, then, now, selects, pl_module)
