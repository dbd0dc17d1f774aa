"""Scoring drops the gradients that Lightning is about to drop, and calls ``training_step`` as training does."""

from pathlib import Path
from typing import Any, ClassVar

import fits
import lightning.pytorch as pl
import pytest
import torch
from fits import ConvModule

from lightning_drive.trainer import sandbox, training_step
from lightning_drive.trainer.training_step import free_gradients


class OwnZeroGrad(ConvModule):
    """Counts on gradients that are still there."""

    def optimizer_zero_grad(self, *args: Any) -> None:
        super().optimizer_zero_grad(*args)


class ManualGradients(ConvModule):
    """Optimizes as it likes, and clears gradients when it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))


@pytest.mark.parametrize(("make", "are_kept"), [(ConvModule, False), (OwnZeroGrad, True), (ManualGradients, True)])
def test_free_gradients(make: type[ConvModule], are_kept: bool, tmp_path: Path) -> None:
    """Scoring needs no room beside gradients that Lightning is about to drop; all others are left alone."""
    module = make()
    module.unused = torch.nn.Parameter(torch.ones(2))  # of no optimizer
    frees: list[set[str]] = []

    class Free(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                module.unused.grad = torch.ones(2)
                before = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
                free_gradients(trainer, pl_module)
                frees.append({name for name in before if module.get_parameter(name).grad is None})

    optimized = {name for name, _ in module.named_parameters()} - {"unused"}
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [module.get_parameter(name) for name in sorted(optimized)], lr=0.01
    )
    fits.trainer(tmp_path, Free(), max_epochs=2, limit_val_batches=0).fit(module, fits.loader())
    assert frees == [set() if are_kept else optimized]


def test_free_gradients__of_a_callback(tmp_path: Path) -> None:
    """The callback that prunes lets go of them before it scores, so that none come back after it."""
    there: list[bool] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            there.append(any(parameter.grad is not None for parameter in pl_module.parameters()))

    callbacks = Watch(), fits.drive(warmup_epochs=1), Watch()
    fits.trainer(tmp_path, *callbacks, max_epochs=2, limit_val_batches=0).fit(ConvModule(), fits.loader())
    assert there == [False, False, True, False]


class Hooked(ConvModule):
    """Notes the calls around ``training_step``, and skips one batch."""

    seen: ClassVar[list[Any]]  # of the class, since what the module itself has is copied for scoring

    def on_train_epoch_start(self) -> None:
        self.seen.append("epoch")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else {"loss": super().training_step(batch, batch_idx)}


def losses(tmp_path: Path, module: Any, num_batches: int) -> list[Any]:
    """Run the first batch several times through the loss of a sandbox."""
    results: list[Any] = []

    class Score(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            with sandbox.sandbox(trainer, pl_module) as inside:
                loss = training_step.loss_of(inside)
                results.extend(loss(inside.module, next(iter(fits.loader()))) for _ in range(num_batches))

    fits.trainer(tmp_path, Score(), max_epochs=1, limit_val_batches=0).fit(module, fits.loader())
    return results


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_loss_of__hooks_of_training(tmp_path: Path) -> None:
    """The module's own hooks come before ``training_step``, and indices of batches begin anew with each pass."""
    kind = type("Watched", (Hooked,), {"seen": []})
    results = losses(tmp_path, kind(), 5)
    assert kind.seen == [*("epoch", 0, 1, 2, 0, 1), *("epoch", 0, 1, 2)]  # of scoring, then of training
    assert [result is None for result in results] == [False, True, False, False, True]
    assert results[0] == results[3]


def test_loss_of__manual_optimization(tmp_path: Path) -> None:
    """A pass through ``forward`` estimates BatchNorm's statistics; ``training_step`` would step the optimizers."""
    [result] = losses(tmp_path, ManualGradients(), 1)
    assert result.shape == (16, fits.NUM_CLASSES)
