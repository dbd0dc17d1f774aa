"""Peak memory while scoring against that of a training step, in the same run."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import pytest
from benchmarks import trainers
from benchmarks.measure import peak_of_tensors
from benchmarks.page import Figure
from benchmarks.trainers import Module

from lightning_drive import DRIVEPruningCallback
from lightning_drive.network import prunable


class Peaks(pl.Callback):
    """Measures the peak of epoch 1, which is dense, and of the pruning at the start of epoch 2."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.training: list[int] = []
        self.scoring: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:  # gradients and momentum are there
            self.training = self.stack.enter_context(peak_of_tensors())

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            self.stack.close()
            self.scoring = self.stack.enter_context(peak_of_tensors())


class Until(pl.Callback):
    """Ends the measurement; comes after the callback that prunes."""

    def __init__(self, peaks: Peaks) -> None:
        self.peaks = peaks

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 2:
            self.peaks.stack.close()


@pytest.mark.parametrize(("name", "batch_size"), [("ResNet-18", 128), ("ResNet-18", 16), ("AlexNet", 16)])
def test_scoring(figure: Callable[..., Figure], name: str, batch_size: int) -> None:
    """Copies of the prunable weights that scoring needs beyond what a training step needs."""
    module = Module(name, batch_size, steps=4)
    weights = sum(4 * parameter.numel() for parameter in prunable.prunable_parameters(module).values())

    def take() -> tuple[list[float], dict[str, list[float]]]:
        peaks = Peaks()
        drive = DRIVEPruningCallback(sparsity=0.98, warmup_epochs=2, rounds=4, bn_batches=0)
        trainers.trainer(peaks, drive, Until(peaks), max_epochs=3).fit(module)
        masks = weights // 4
        return [(peaks.scoring[0] - peaks.training[0] - masks) / weights], {"one copy": [1.0]}

    figure(
        "memory",
        f"DRIVE, {name}, batches of {batch_size}",
        "copies of the weights",
        take,
        goal=1.0,
        note="beyond the peak of a training step (SGD with momentum), and the masks",
    )
