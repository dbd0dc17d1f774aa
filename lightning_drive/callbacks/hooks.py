"""The hooks in which a pruning callback acts, and its state in checkpoints."""

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
    frozen_layers,
    lightning_internals,
    loggers,
    loop_counts,
    other_callbacks,
    restored_masks,
    saved_state,
    step_counts,
    terminal,
    trained_parameters,
)
from lightning_drive.trainer.dense_copies import UnmaskedWeights
from lightning_drive.trainer.fit_state import Fit
from lightning_drive.trainer.saved_state import Pruning, SavedState


class PruningCallback(PruningActions):
    """The base of all pruning callbacks: prune during training, and keep pruned weights at zero.

    A search finds all masks first; then they are put into effect at once, so an interrupt in between leaves a run that
    can be resumed. From there on pruned weights are exactly 0: gradients are masked before clipping, and weights after
    every optimizer step. Parameter names, their order and ``state_dict`` keys never change, so checkpoints load into
    the plain module, already sparse.

    In several processes, every rank scores its own batches, gradients are averaged, and all ranks get the same masks.

    The arguments are those of :class:`~lightning_drive.callbacks.actions.PruningActions`.
    """

    _module: weakref.ref[pl.LightningModule] | None = None
    """The module of the last ``fit``."""

    # For subclasses to decide.

    @property
    def _last_epoch(self) -> int:
        """The epoch at whose start the last cut is due; 0 where :attr:`_step` decides."""
        raise NotImplementedError

    @property
    def _step(self) -> int | None:
        """The global step before which the only cut is due; ``None`` if it is due at the start of an epoch."""
        return None

    @property
    def _when(self) -> str:
        """The time of the last cut, in words for a sentence."""
        if self._step is not None:
            return f"before step {self._step}"
        return f"at the start of epoch {self._last_epoch} (counted from 0)"

    @property
    def _trains_sparse(self) -> bool:
        """Whether it is time to train in sparse forms, which are chosen anew for other masks."""
        return self.accelerate and self.pruned

    # Checks.

    def _check_module(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise, before anything runs, if the module cannot be pruned."""
        selected = self._selected(trainer, pl_module)
        prunable_checks.check_numbers(selected)
        frozen_layers.check_groups(self, trainer, pl_module, selected)
        shards.holders(selected)
        if text := trained_parameters.left_out(trainer, pl_module, self.prunable_parameters):
            terminal.show(trainer, text)
        if self._remember_epoch is not None:
            checks.check_finetuning(self, trainer)

    def _check_training(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if the time to prune cannot come, warn if it may not; data are loaded, and a checkpoint is restored."""
        if not step_counts.is_quick_check(trainer):
            last_cut = self._last_epoch, self._step, self._when
            end_of_training.warn_of_unknown_length(trainer, *last_cut, self._remedy_for_unknown_length)
            end_of_training.warn_of_manual_steps(trainer, *last_cut, self._fit.max_epochs)
            if not self.reset_best:
                end_of_training.warn_of_early_stopping(trainer, *last_cut)

    @property
    def _remedy_for_unknown_length(self) -> str:
        """The setting to change where an epoch may never end, as a sentence."""
        return "Set `limit_train_batches` to the number of batches of an epoch."

    @property
    def _unshardable(self) -> str:
        """The reason why weights sharded over ranks cannot be pruned; empty if they can."""
        if self._remember_epoch is not None:
            return f"it returns to the weights of epoch {self._remember_epoch}, and a checkpoint has no room for them."
        return ""

    # Hooks.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if settings do not work together, and note ``max_epochs``; a state is restored only after this."""
        checks.check_namespace(self, trainer, pl_module)
        self._fit = Fit(-1 if trainer.max_epochs is None else trainer.max_epochs)
        if stage == "fit":
            checks.check_strategy(self, trainer, self._unshardable)
            checks.check_alone(self, trainer, PruningCallback)

    def on_after_setup(self, **_: Any) -> None:
        """Raise under Fabric, which calls this hook but has no training loop to follow."""
        raise MisconfigurationException(
            f"{type(self).__name__} works in a `lightning.pytorch.Trainer`, got a `Fabric`, whose loops are your own."
            " Call `lightning_drive.find_masks` there, and `masks.apply_(module)` after every optimizer step."
        )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if the module cannot be pruned, and start afresh on a module that the masks are not for."""
        known = self._module is not None and self._module() is pl_module
        goes_on = self.masks.hold_for(pl_module) and (self._finished or (known and trainer.current_epoch > 0))
        if not (self._fit.is_restored or goes_on):
            self._start_afresh()
        self._module = weakref.ref(pl_module)
        self._fit.has_begun, self._fit.thread = True, threading.get_ident()
        averages = self._pruned_along(trainer, pl_module)
        averages.tensors()  # raises if they cannot be pruned with the module
        if not self._finished:
            self._check_module(trainer, pl_module)
        names = self.masks if self._finished else self._selected(trainer, pl_module)
        self._fit.unmasked = UnmaskedWeights(self, trainer, pl_module, averages, names)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put restored masks on, now that weights and optimizers are restored too."""
        self._fit.phase_start = time.monotonic() if trainer.global_step == 0 else None
        self._fit.is_resuming_epoch = True  # unless ``on_train_epoch_start`` comes first
        loop_counts.begin_batch_again(trainer)
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
        """Prune and log also when a run resumes within an epoch, which then has no ``on_train_epoch_start``."""
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
        if self._trains_sparse:
            loss_fn = getattr(self, "loss_fn", None)
            self._pruning = self._fit.sparse.begin_batch(trainer, pl_module, self._pruning, batch, loss_fn)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if pruned layers were replaced; mask again weights that other code wrote."""
        self._fit.sparse.end_batch()
        if self._fit.unmasked is not None:
            self._fit.unmasked.at_epoch_end(self.masks)
        if self._fit.enforcement is not None:
            self._fit.enforcement.check(pl_module)
            self._fit.enforcement.renew()

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Mask again weights that other code wrote, such as a callback that has just swapped averages in."""
        self._fit.sparse.end_batch()
        if batch_idx == dataloader_idx == 0 and self._fit.enforcement is not None:
            self._fit.enforcement.renew()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mask the gradients, which are unscaled already and not yet clipped."""
        if self._fit.enforcement is not None:
            self._fit.enforcement.before_step(trainer, pl_module, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mask the weights if changes to them may come without a hook."""
        self._fit.sparse.end_batch()
        if self._fit.enforcement is not None:
            self._fit.enforcement.after_batch(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Return masks and report to the process that called ``fit``, if Lightning spawned or forked this one."""
        if self._fit.enforcement is not None:
            self._fit.enforcement.renew()
        self._handover.send(trainer.strategy.launcher, lambda: {**self.state_dict(), "start": None})

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish an interrupted commit or step, for a checkpoint at the exception, and release the module."""
        self._fit.sparse.end_batch()
        if self._fit.has_begun and self.pruned:
            with suppress(Exception):  # the exception may come from the commit itself; a resume repeats it
                if self._pruning.unfinished is not None and trainer.world_size == 1:
                    self._commit(trainer, pl_module)
            with suppress(ValueError):  # from masks that do not fit: they caused the exception
                self.masks.apply_(pl_module)
        other_callbacks.hold_off_early_stopping(trainer, False)
        loop_counts.begin_epoch_again(trainer)
        self._handover.discard()
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Mask again weights that other code wrote, and release the module and its optimizers."""
        if self._fit.enforcement is not None:
            self._fit.enforcement.renew()
        other_callbacks.hold_off_early_stopping(trainer, False)
        self._release()
        self._fit = Fit()

    def _release(self) -> None:
        """Release the module and its optimizers."""
        self._fit.release()

    def _prune_when_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Prune if it is time, and return whether it was."""
        if self._finished or not self._is_due(trainer):
            return False
        try:
            self._prune(trainer, pl_module)
        except StopIteration as error:  # Lightning takes it for the end of training
            raise RuntimeError(f"Pruning failed, since {error!r} was raised while scoring.") from error
        return True

    def _log_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loggers.log_with_epoch(trainer, pl_module, self._metrics())

    # Checkpoints.

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note a search for a learning rate or batch size, which saves before training to return to it."""
        self._fit.is_probing = not self._fit.has_begun
        loop_counts.begin_saved_epoch_again(checkpoint)
        if self._fit.enforcement is not None and self._pruning.unfinished is None:  # else masks are just being put on
            self._fit.enforcement.renew(checkpoint.get("state_dict"))
        if self._fit.has_begun and threading.get_ident() != self._fit.thread:
            saved_state.hold_still(checkpoint, self, lambda: self._pruning)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the state of a pruning callback of another name; Lightning restores one of the same name."""
        own_names = (self.state_key, lightning_internals.legacy_state_key(self))
        if (renamed := saved_state.of_renamed(self, own_names, trainer, checkpoint)) is not None:
            name, state = renamed
            self.load_state_dict(copy.deepcopy({**state}))
            if state["report"] is not None:
                terminal.show(trainer, f"{type(self).__name__} takes over the masks of {name} in the checkpoint.")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the masks, one bit per weight, the report, the settings, and the stored weights while needed."""
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
                f"{type(self).__name__} has to return to stored weights, so {what} must have them under 'start', got"
                f" None. Resume with the settings that the checkpoint was saved with. {saved_values.REMEDY}"
            )
        self._take(saved)
        self._start = saved.start
        self._fit.is_restored = self._fit.is_restored or not self._fit.is_probing

    def __getstate__(self) -> dict[str, Any]:
        """Leave the ``fit`` of this process, with its live parameters and hooks, out of copies and pickles."""
        self._receive()
        own = {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}  # the module's
        return {**own, "_fit": Fit(), "_module": None, "_handover": self._handover.of_copy()}

    def _start_afresh(self) -> None:
        """Forget the module of an earlier ``fit``."""
        self._pruning, self._start, self._restored_settings = Pruning(), None, None

    def _settings(self) -> dict[str, Any]:
        """Return the settings that the masks depend on, in plain types."""
        patterns = {name: arguments.check_patterns(name, getattr(self, name)) for name in ("include", "exclude")}
        return {"control": self.control, **patterns}

    def _warn_of_other_settings(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the network was pruned with other settings, since it stays as it is."""
        assert self.report is not None
        restored_masks.warn_of_differences(self.masks, self.report, self._goal, self.control)
        if self._fit.is_restored:
            then, now = self._restored_settings or {}, self._settings()
            selects = (partial(self._selected, trainer), self.prunable_parameters)
            restored_masks.warn_of_other_settings(self.masks, then, now, selects, pl_module)
