"""The rounds show up in the Trainer's own progress bar, or as one line where there is none."""

from pathlib import Path
from typing import Any

import fits
import pytest
from fits import ConvModule
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_drive import display


def test_progress__rich(tmp_path: Path) -> None:
    """A task with a step for each round runs full and is hidden afterwards; the bar's own task stays its own."""
    seen: list[tuple[str, float, float | None]] = []

    class Bar(RichProgressBar):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            self.left_over = [task.visible for task in self.progress.tasks if "Pruning" in task.description]

    class Loss:
        def __call__(self, module: Any, batch: Any) -> Any:
            tasks = [task for task in bar.progress.tasks if "Pruning" in task.description]
            seen.extend((task.description, task.completed, task.total) for task in tasks)
            return module.training_step(batch, 0)

    bar = Bar()
    callback = fits.drive(warmup_epochs=0, loss_fn=Loss(), bn_batches=0)
    fits.trainer(tmp_path, callback, bar, enable_progress_bar=True, max_epochs=1).fit(ConvModule(), fits.loader())
    assert [(completed, total) for _, completed, total in seen] == [(index, 5) for index in range(5)]
    assert "Pruning by DRIVE" in seen[0][0]
    assert bar.left_over == [False]
    assert bar.train_progress_bar.total == 3


def test_progress__tqdm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits.trainer(tmp_path, fits.drive(), TQDMProgressBar(), enable_progress_bar=True).fit(ConvModule(), fits.loader())
    assert "Pruning by DRIVE:" in capsys.readouterr().out


def test_progress__none(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fits.trainer(tmp_path, fits.drive()).fit(ConvModule(), fits.loader())
    assert "Pruning by DRIVE: 5 rounds" in caplog.text
    assert capsys.readouterr().out == ""


def test_progress__disabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar that is switched off stays off."""
    bar = RichProgressBar(refresh_rate=0)
    running = fits.trainer(tmp_path, bar, enable_progress_bar=True)
    with display.progress(running, "Pruning", 3) as advance:
        advance()
    assert capsys.readouterr().out == ""
