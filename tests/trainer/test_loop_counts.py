"""A run that is saved or stopped before an epoch or a batch resumes with it."""

from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest

from lightning_drive.trainer import loop_counts

SETTINGS: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}


class Stopping(pl.Callback):
    """Saves where scoring takes its time, or stops there and saves then."""

    def __init__(self, file: Path, batch_idx: int | None, *, mends: bool, stops: bool) -> None:
        self.file, self.batch_idx, self.mends, self.stops = file, batch_idx, mends, stops

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.batch_idx is None:
            self.save(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.batch_idx == batch_idx:
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        if trainer.current_epoch == 1:
            if self.stops:
                raise RuntimeError("stopped")
            trainer.save_checkpoint(self.file)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.mends and not self.stops:
            loop_counts.begin_saved_epoch_again(checkpoint)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.mends:
            loop_counts.begin_epoch_again(trainer)
        trainer.save_checkpoint(self.file)


class Resumed(pl.Callback):
    def __init__(self, *, mends: bool) -> None:
        self.mends = mends

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.mends:
            loop_counts.begin_batch_again(trainer)


def batches_after_resume(tmp_path: Path, batch_idx: int | None, *, mends: bool, stops: bool) -> list[list[float]]:
    """Return what is trained on after a resume, the first numbers of each batch."""
    stopping = Stopping(tmp_path / "saved.ckpt", batch_idx, mends=mends, stops=stops)
    trainer = fits.trainer(tmp_path, stopping, **SETTINGS)
    if stops:
        with pytest.raises(RuntimeError, match="stopped"):
            trainer.fit(fits.ConvModule(), fits.loader())
    else:
        trainer.fit(fits.ConvModule(), fits.loader())
    module = fits.ConvModule()
    trainer = fits.trainer(tmp_path, Resumed(mends=mends), **SETTINGS)
    trainer.fit(module, fits.loader(), ckpt_path=tmp_path / "saved.ckpt")
    assert trainer.current_epoch == 2
    return [batch.tolist() for batch in module.calls]


ALL = [batch[0][:, 0, 0, 0].tolist() for batch in fits.loader()]


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("mends", [False, True])
def test_begin_epoch_again(tmp_path: Path, mends: bool, stops: bool) -> None:
    batches = batches_after_resume(tmp_path, None, mends=mends, stops=stops)
    assert batches == ALL if mends else len(batches) < len(ALL)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("batch_idx", [0, 1, 2])
def test_begin_batch_again(tmp_path: Path, batch_idx: int, stops: bool) -> None:
    assert len(batches_after_resume(tmp_path, batch_idx, mends=True, stops=stops)) == 3 - batch_idx
