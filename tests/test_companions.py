"""Callbacks beside the pruning one: averages are pruned as well, and the best model is a sparse one."""

from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from fits import ConvModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging


class Scripted(ConvModule):
    """Its validation score is best while the network is dense, as it often is."""

    SCORES = (0.1, 0.2, 0.9, 0.7, 0.8, 0.75)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.SCORES[self.current_epoch])


def test_best_checkpoint_is_sparse(tmp_path: Path) -> None:
    callback = fits.drive()
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss")
    fits.trainer(tmp_path, callback, checkpoint, max_epochs=6).fit(Scripted(), fits.loader())
    assert Path(checkpoint.best_model_path).name == "epoch=3.ckpt"
    assert checkpoint.best_model_score == torch.tensor(0.7)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    module = ConvModule()
    module.load_state_dict(saved)
    assert callback.masks.hold_for(module)
    assert (tmp_path / "epoch=0.ckpt").exists()


def test_best_checkpoint_is_sparse__turned_off(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss")
    fits.trainer(tmp_path, fits.drive(reset_best=False), checkpoint, max_epochs=6).fit(Scripted(), fits.loader())
    assert Path(checkpoint.best_model_path).name == "epoch=0.ckpt"


def test_best_checkpoint_is_sparse__maximum(tmp_path: Path) -> None:
    class Rising(Scripted):
        SCORES = (0.9, 0.8, 0.1, 0.3, 0.2, 0.1)

    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", mode="max", save_top_k=2)
    fits.trainer(tmp_path, fits.drive(), checkpoint, max_epochs=6).fit(Rising(), fits.loader())
    assert Path(checkpoint.best_model_path).name == "epoch=3.ckpt"
    assert sorted(Path(path).name for path in checkpoint.best_k_models) == ["epoch=3.ckpt", "epoch=4.ckpt"]


@pytest.mark.parametrize(("reset_best", "last_epoch"), [(True, 5), (False, 2)])
def test_early_stopping_waits_for_the_sparse_network(tmp_path: Path, reset_best: bool, last_epoch: int) -> None:
    """Dense epochs neither set the bar nor use up the patience."""
    stopping = EarlyStopping("val_loss", patience=2)
    callback = fits.drive(reset_best=reset_best)
    running = fits.trainer(tmp_path, callback, stopping, max_epochs=6)
    running.fit(Scripted(), fits.loader())
    assert running.current_epoch - 1 == last_epoch
    assert callback.pruned


def test_reset_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fits.trainer(tmp_path, fits.drive(), checkpoint).fit(Scripted(), fits.loader())
    assert "ModelCheckpoint (monitor='val_loss'): tracking of the best begins again" in caplog.text


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="weight averaging came with Lightning 2.6")
@pytest.mark.parametrize("pruning_first", [True, False])
def test_averaged_weights_are_sparse(tmp_path: Path, pruning_first: bool) -> None:
    """What an EMA callback averages, validates with, saves, and leaves behind is pruned, too."""
    module, callback = ConvModule(), fits.drive()
    average = pl.callbacks.EMAWeightAveraging(decay=0.9)
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    callbacks = [callback, average] if pruning_first else [average, callback]
    fits.trainer(tmp_path, *callbacks, checkpoint).fit(module, fits.loader())
    assert callback.masks.hold_for(module)
    saved = ConvModule()
    saved.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert callback.masks.hold_for(saved)


@pytest.mark.filterwarnings("ignore:.*swa:UserWarning", "ignore:Swapping scheduler:UserWarning")
def test_averaged_weights_are_sparse__swa(tmp_path: Path) -> None:
    """Also where the averaging began with the dense network."""
    module, callback = ConvModule(), fits.drive(bn_batches=2)
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fits.trainer(tmp_path, callback, averaging, max_epochs=5).fit(module, fits.loader())
    assert callback.masks.hold_for(module)
