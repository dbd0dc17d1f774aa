"""The state of a fit ends with it: afterwards a callback keeps nothing of the run alive."""

import gc
import weakref
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from chosen_forms import IN_TRAINING, prefer
from fits import CALLBACKS, ConvModule

from lightning_drive.trainer.fit_state import Fit


class Scheduled(ConvModule):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Fail(pl.Callback):
    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise ValueError("in the middle of a run")


@pytest.mark.parametrize("epoch", [None, 0, 3], ids=["whole", "fails_before_pruning", "fails_after_pruning"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_nothing_stays_alive(name: str, epoch: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *IN_TRAINING)
    callback, module = CALLBACKS[name](accelerate=True), Scheduled()
    trainer = fits.trainer(tmp_path, callback, Fail(epoch))
    try:
        trainer.fit(module, fits.loader())
    except ValueError as error:
        assert str(error) == "in the middle of a run"  # noqa: PT017 - a context would keep the frames
    alive = [weakref.ref(thing) for thing in (module, trainer, *trainer.optimizers)]
    for one in (callback, *trainer.callbacks):  # type: ignore[attr-defined]
        for attribute in ("log", "log_dict"):  # Lightning's own, of the module
            vars(one).pop(attribute, None)
    del module, trainer, one
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
    assert epoch is not None or callback._fit == Fit()
