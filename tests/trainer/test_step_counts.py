"""Steps are counted as the Trainer takes them."""

import math
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_drive.trainer import step_counts


class Endless:
    def __iter__(self) -> Any:
        return iter(fits.loader())


class Watching(pl.Callback):
    """Notes what is counted, and what happens."""

    def __init__(self) -> None:
        self.per_epoch: list[float] = []
        self.steps = [0]
        self.accumulating: list[bool] = []
        self.at_epoch_start: list[bool] = []
        self.indices: list[tuple[int, int]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.per_epoch = [step_counts.steps_per_epoch(trainer, epoch) for epoch in range(2)]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.at_epoch_start.append(step_counts.is_accumulating(trainer))
        self.indices.append((step_counts.batch_index(trainer), 0))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.accumulating.append(step_counts.is_accumulating(trainer))
        self.indices.append((step_counts.batch_index(trainer), batch_idx))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("settings", "callbacks", "per_epoch", "accumulating"),
    [
        ({}, [], [3, 3], [False] * 6),
        ({"accumulate_grad_batches": 2}, [], [2, 2], [False, True, False] * 2),
        ({"accumulate_grad_batches": 5}, [], [1, 1], [False, True, True] * 2),
        ({"limit_train_batches": 2, "accumulate_grad_batches": 2}, [], [1, 1], [False, True] * 2),
        ({}, [GradientAccumulationScheduler({0: 1, 1: 3})], [3, 1], [False] * 4 + [True] * 2),
    ],
    ids=["plain", "accumulated", "never_full", "limited", "by_epoch"],
)
def test_steps(settings: Any, callbacks: Any, per_epoch: Any, accumulating: Any, tmp_path: Path) -> None:
    watching = Watching()
    settings = {"max_epochs": 2, "limit_val_batches": 0, **settings}
    fits.trainer(tmp_path, *callbacks, watching, **settings).fit(fits.ConvModule(), fits.loader())
    assert watching.per_epoch == per_epoch
    assert [after - before for before, after in zip(watching.steps, watching.steps[1:], strict=False)] == per_epoch
    assert watching.accumulating == accumulating
    assert watching.at_epoch_start == [False, False]
    assert all(found == expected for found, expected in watching.indices)


def test_steps_per_epoch__unknown_length(tmp_path: Path) -> None:
    watching = Watching()
    fits.trainer(tmp_path, watching, max_epochs=1, limit_val_batches=0).fit(fits.ConvModule(), Endless())
    assert watching.per_epoch == [math.inf] * 2


@pytest.mark.parametrize(("runs", "expected"), [(False, False), (True, True), (1, True), (3, True)])
def test_is_quick_check(runs: Any, expected: bool, tmp_path: Path) -> None:
    assert step_counts.is_quick_check(fits.trainer(tmp_path, fast_dev_run=runs)) is expected
