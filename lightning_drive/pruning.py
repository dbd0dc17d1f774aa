"""When a Trainer prunes, and how the masks live through training, checkpoints and resumes."""

import math
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_drive import companions, display, finding, flow, gradients, methods, prunable, scoring
from lightning_drive.finding import Found, Scope
from lightning_drive.masking import MaskedParameters, Masks
from lightning_drive.methods import Method
from lightning_drive.report import PruningReport
from lightning_drive.schedules import Schedule

_VERSION = 1


class PruningCallback(pl.Callback):
    """Train densely for some epochs, prune once, keep the masks until the end: what all early-pruning callbacks share.

    At the start of epoch ``warmup_epochs`` all rounds are computed first and then committed at once, so an interrupt
    in between leaves a dense run that can be resumed. From there on pruned weights are exactly 0: their gradients are
    masked before clipping, the weights again after every optimizer step. Parameter names, their order and
    ``state_dict`` keys are never touched, so checkpoints load into the plain module, already sparse.

    A subclass gives a method. To change which parameters are prunable, override :meth:`prunable_parameters`.

    Args:
        method: The method that finds the masks.
        sparsity: Fraction of the prunable weights to remove, in ``[0, 1)``.
        warmup_epochs: Dense epochs before pruning, at least 0.
        schedule: ``"exponential"`` or ``"linear"``, see :func:`lightning_drive.find_masks`.
        scope: ``"global"`` or ``"layerwise"``, see :func:`lightning_drive.find_masks`.
        include: Glob patterns over parameter names; ``None``: linear and convolutional weights.
        exclude: Glob patterns over parameter names that stay dense.
        loss_fn: ``loss_fn(pl_module, batch)`` returns the loss to score by; ``None``: the module's ``training_step``.
        bn_batches: Training batches for re-estimating BatchNorm's statistics after pruning; 0: leave them.
        reset_best: Whether ModelCheckpoint and EarlyStopping forget the dense epochs when the network is pruned.

    """

    def __init__(
        self,
        method: Method,
        *,
        sparsity: float,
        warmup_epochs: int,
        schedule: Schedule,
        scope: Scope,
        include: list[str] | None,
        exclude: list[str] | None,
        loss_fn: Callable[..., Any] | None,
        bn_batches: int,
        reset_best: bool,
    ) -> None:
        super().__init__()
        finding.check_settings(method, sparsity, schedule, scope)
        methods.check_count("warmup_epochs", warmup_epochs, least=0)
        methods.check_count("bn_batches", bn_batches, least=0)
        prunable.check_patterns("include", include)
        prunable.check_patterns("exclude", exclude)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"`loss_fn` must be a function `loss_fn(pl_module, batch)` or None, got {loss_fn!r}.")
        if not isinstance(reset_best, bool):
            raise TypeError(f"`reset_best` must be True or False, got {reset_best!r}.")
        self.method = method
        self.sparsity = sparsity
        self.warmup_epochs = warmup_epochs
        self.schedule: Schedule = schedule
        self.scope: Scope = scope
        self.include = include
        self.exclude = exclude
        self.loss_fn = loss_fn
        self.bn_batches = bn_batches
        self.reset_best = reset_best
        self.masks = Masks()
        self.report: PruningReport | None = None
        self._restored = False
        self._live: MaskedParameters | None = None
        self._handles: list[RemovableHandle] = []
        self._hookless = False

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

    # When: each hook says what it does here.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget that a state was restored; a checkpoint to resume from is loaded after this."""
        self._restored = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, and start afresh on a module that the masks were not made for."""
        if self.masks and not self._restored and not self.masks.hold_for(pl_module):
            self.masks, self.report = Masks(), None
        self._check(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up restored masks again, now that weights and optimizers are restored too."""
        if self.pruned:
            self._enforce(trainer, pl_module)
            self._check_restored()
        else:
            self._check_that_warmup_ends(trainer)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune when the warm-up is over."""
        self._prune_when_due(trainer, pl_module)
        self._log_sparsity(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune where a run resumes in the middle of an epoch, which starts without ``on_train_epoch_start``."""
        if self._prune_when_due(trainer, pl_module):
            self._log_sparsity(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Mask the gradients: unscaled already, not yet clipped."""
        if self._live is not None:
            self._live.zero_gradients_()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mask the weights, for optimizers that offer no hook after their step."""
        if self._live is not None and self._hookless:
            self._live.zero_weights_()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before its warm-up did."""
        if not self.pruned:
            rank_zero_warn(
                f"Training ended in epoch {trainer.current_epoch}, before the {self.warmup_epochs} warm-up epochs were"
                " over: the network is dense. Lower `warmup_epochs`, or let training run longer."
            )

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the module and its optimizers."""
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the module and its optimizers."""
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Save the masks, one bit per weight, and the report."""
        report = None if self.report is None else self.report.to_dict()
        return {"version": _VERSION, "masks": self.masks.state_dict(), "report": report}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the masks and the report."""
        if state_dict.get("version") != _VERSION:
            raise ValueError(
                f"The checkpoint's {type(self).__name__} state has version {state_dict.get('version')}, but this"
                f" lightning_drive reads version {_VERSION}."
            )
        self.masks = Masks.from_state_dict(state_dict["masks"])
        self.report = None if state_dict["report"] is None else PruningReport.from_dict(state_dict["report"])
        self._restored = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave the live parameters and hooks of this process out of copies and pickles."""
        return {**vars(self), "_live": None, "_handles": []}

    # What happens when it is time.

    def _prune_when_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Prune once the warm-up is over and not yet pruned; say whether that was now."""
        if self.pruned or not (_is_quick_check(trainer) or trainer.current_epoch >= self.warmup_epochs):
            return False
        self._prune(trainer, pl_module)
        return True

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.monotonic()
        found, statistics = self._search(trainer, pl_module)
        notes = list(found.warnings)
        if found.path_error:
            notes.append(
                f"Effective sparsity was not measured, since `forward` failed on the first tensor of a batch"
                f" ({found.path_error}). Set `example_input_array` on the module to the tensor that it takes."
            )
        # Everything is computed: from here on only commit. The masks come first, since whoever resumes applies them.
        self.masks = found.masks.to("cpu")
        self.report = PruningReport.of(
            found.masks,
            found.active,
            method=str(self._method(trainer)),
            seconds=time.monotonic() - start,
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            warnings=notes,
        )
        self._enforce(trainer, pl_module)
        gradients.load_batch_norm_statistics(statistics)
        for warning in found.warnings:
            rank_zero_warn(warning)
        rank_zero_info(f"\n{self.report}")
        self._log_report(trainer)
        if self.reset_best:
            companions.forget_best(trainer)

    def _search(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> tuple[Found, dict[nn.Module, dict[str, Tensor]]]:
        """Find the masks and the BatchNorm statistics that go with them; the module stays as it is."""
        method = self._method(trainer)
        loss_fn = self.loss_fn or scoring.training_step_loss(trainer)
        with (
            display.progress(trainer, f"Pruning by {type(method).__name__}", method.rounds) as advance,
            scoring.sandbox(trainer, pl_module),
            scoring.TrainingBatches(trainer, pl_module).opened() as batches,
        ):
            found = finding.search(
                pl_module,
                method,
                sparsity=self.sparsity,
                parameters=self.prunable_parameters(pl_module),
                batches=batches,
                loss_fn=loss_fn,
                schedule=self.schedule,
                scope=self.scope,
                example_input=flow.first_tensor(pl_module.example_input_array),
                on_round=lambda *_: advance(),
            )
            with gradients.undisturbed(pl_module):
                found.masks.apply_(pl_module)
                statistics = gradients.batch_norm_statistics(pl_module, loss_fn, islice(batches, self.bn_batches))
        return found, statistics

    def _method(self, trainer: pl.Trainer) -> Method:
        """Give the method, with two rounds at most in a quick check by ``fast_dev_run``."""
        return methods.with_fewer_rounds(self.method, 2) if _is_quick_check(trainer) else self.method

    def _enforce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the masks on everything that is alive, and have every optimizer step followed by them."""
        self._release()
        self._live = MaskedParameters(pl_module, self.masks)
        self._live.zero_weights_()
        self._live.zero_gradients_()
        for average in companions.averaged_models(trainer):
            self.masks.apply_(average)
        for optimizer in trainer.optimizers:
            self._live.zero_optimizer_state_(optimizer)
            if hasattr(optimizer, "register_step_post_hook"):
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
            else:  # Lightning also takes wrappers that only look like an optimizer
                self._hookless = True

    def _after_step(self, *_: Any) -> None:
        if self._live is not None:
            self._live.zero_weights_()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._live, self._hookless = [], None, False

    def _log_sparsity(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the sparsity with every epoch, so that monitors and checkpoint names can use it."""
        if self.report is not None and not trainer.barebones:
            pl_module.log("pruning/sparsity", self.report.sparsity, on_step=False, on_epoch=True)

    def _log_report(self, trainer: pl.Trainer) -> None:
        report = self.report
        assert report is not None
        metrics = {
            "pruning/sparsity": report.sparsity,
            "pruning/density": report.density,
            "pruning/effective_sparsity": report.effective_sparsity,
            "pruning/seconds": report.seconds,
        }
        for logger in trainer.loggers:
            logger.log_metrics(
                {key: value for key, value in metrics.items() if value is not None}, step=trainer.global_step
            )

    # What is refused before training starts.

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = type(self).__name__
        if trainer.world_size > 1 or isinstance(
            trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
        ):
            raise MisconfigurationException(
                f"{name} works on one device for now, got {type(trainer.strategy).__name__} with {trainer.world_size}"
                " processes: ranks would end with different masks. Set `Trainer(devices=1)`."
            )
        if (
            not self.pruned
            and not _is_quick_check(trainer)
            and trainer.max_epochs is not None
            and 0 <= trainer.max_epochs <= self.warmup_epochs
        ):
            raise MisconfigurationException(
                f"{name}(warmup_epochs={self.warmup_epochs}) prunes at the start of epoch {self.warmup_epochs} (counted"
                f" from 0), but training ends after max_epochs={trainer.max_epochs} epochs, so it would never prune."
                " Raise `max_epochs` or lower `warmup_epochs`."
            )
        if self.loss_fn is None:
            scoring.check_training_step(pl_module)
        self.prunable_parameters(pl_module)

    def _check_that_warmup_ends(self, trainer: pl.Trainer) -> None:
        if _is_quick_check(trainer) or not math.isfinite(trainer.num_training_batches):
            return
        steps = self.warmup_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if 0 <= trainer.max_steps <= steps:
            raise MisconfigurationException(
                f"{type(self).__name__}(warmup_epochs={self.warmup_epochs}) prunes after {steps} steps, but training"
                f" ends after max_steps={trainer.max_steps}, so it would never prune. Raise `max_steps` or lower"
                " `warmup_epochs`."
            )

    def _check_restored(self) -> None:
        asked = self.masks.num_prunable * (1 - self.sparsity)
        if abs(self.masks.num_kept - asked) > len(self.masks):  # rounding may take one weight per parameter
            rank_zero_warn(
                f"The checkpoint was pruned to a sparsity of {self.masks.sparsity:.4f} and stays so:"
                f" `sparsity={self.sparsity}` has no effect. To prune to another one, start from a dense checkpoint."
            )


def _is_quick_check(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``: one short epoch, in which pruning should be seen to work."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
