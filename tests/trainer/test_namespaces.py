"""`pip install lightning` also brings `pytorch_lightning`: its classes are refused before training, by name.

The callbacks look for Lightning's classes (strategies, ModelCheckpoint, EarlyStopping, ...), and those of
`pytorch_lightning` are others: training with them would run, but a dense epoch could win "best", say.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fits
import lightning as L
import lightning.pytorch as pl
import pytest
import pytorch_lightning as old
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback, SNIPPruningCallback, SynFlowPruningCallback

REMEDY = "Write `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`"
CALLBACKS = {
    "DRIVE": lambda: DRIVEPruningCallback(sparsity=0.8, warmup_epochs=1, rounds=2),
    "SNIP": lambda: SNIPPruningCallback(sparsity=0.8),
    "SynFlow": lambda: SynFlowPruningCallback(sparsity=0.8, rounds=2),
    "IMP": lambda: IMPPruningCallback(sparsity=0.8, cycles=1, epochs_per_cycle=1),
}

# Before 2.6, Lightning itself refuses them when the Trainer is made, with a TypeError or a ValueError.
checked_by_us = pytest.mark.skipif(
    not hasattr(pl.callbacks, "WeightAveraging"), reason="Lightning takes callbacks of any class from 2.6 on"
)


class OldModule(old.LightningModule):
    """A module of the other namespace, which counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.steps = nn.Sequential(nn.Flatten(), nn.Linear(64, fits.NUM_CLASSES)), 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.steps += 1

    def val_dataloader(self) -> Any:
        return fits.loader()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OldSubclass(old.callbacks.ModelCheckpoint):
    """What somebody made of the other namespace's ModelCheckpoint."""


class ThirdParty(old.Callback):
    """A callback of somebody who writes for `pytorch_lightning`; any Trainer takes it."""

    epochs = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs += 1


def old_trainer(tmp_path: Path, *callbacks: Any) -> old.Trainer:
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = dict.fromkeys(switches, False)
    return old.Trainer(
        callbacks=list(callbacks), accelerator="cpu", max_epochs=3, default_root_dir=tmp_path, **settings
    )


@pytest.mark.skipif(
    not hasattr(old.callbacks, "WeightAveraging"), reason="pytorch_lightning takes callbacks of any class from 2.6 on"
)
@pytest.mark.parametrize("call", ["fit", "validate"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_trainer__error(tmp_path: Path, name: str, call: str) -> None:
    module = OldModule()
    trainer = old_trainer(tmp_path, CALLBACKS[name]())
    with pytest.raises(
        MisconfigurationException, match=f"{name}PruningCallback .* got the Trainer of `pytorch_l.*{REMEDY}"
    ):
        getattr(trainer, call)(module, fits.loader())
    assert module.steps == 0


class Library:
    """Imitates a library that makes classes of `pytorch_lightning` its own, as somebody has installed it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, in_folder: str) -> None:
        place = folder / in_folder
        place.mkdir(parents=True)
        (place / "forecasts.py").write_text(
            "import pytorch_lightning as pl\n"
            "class Trainer(pl.Trainer): pass\n"
            "class Forecaster(pl.LightningModule): pass\n"
            "class Saves(pl.callbacks.ModelCheckpoint): pass\n"
        )
        monkeypatch.syspath_prepend(place)
        monkeypatch.delitem(sys.modules, "forecasts", raising=False)
        self.module = importlib.import_module("forecasts")


@pytest.fixture(params=["lib/site-packages", "elsewhere"])
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    yield Library(tmp_path, monkeypatch, request.param).module
    sys.modules.pop("forecasts", None)


def refused(name: str, trainer: Any, module: Any, *others: Any) -> str:
    """Return what the callback says when such a Trainer sets it up."""
    pruning = CALLBACKS[name]()
    stand_in = SimpleTrainer(trainer, pruning, *others)
    with pytest.raises(MisconfigurationException) as caught:
        pruning.setup(stand_in, module, "fit")  # type: ignore[arg-type]
    return str(caught.value)


def SimpleTrainer(kind: Any, *callbacks: Any) -> Any:  # noqa: N802
    """Make a Trainer that any Lightning would let have any callbacks."""
    trainer = kind(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.callbacks = list(callbacks)
    return trainer


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("which", ["Trainer", "Forecaster", "Saves"])
def test_library__error(name: str, which: str, library: Any) -> None:
    """Users of a library are told that the import is not theirs, whichever class of it they meet."""
    if which == "Trainer":
        text = refused(name, library.Trainer, OldModule())
    elif which == "Forecaster":
        text = refused(name, old.Trainer, library.Forecaster())
    else:
        text = refused(name, pl.Trainer, fits.ConvModule(), library.Saves(monitor="val_loss"))
    assert f"{name}PruningCallback needs the classes of `lightning.pytorch`, got `forecasts`, whose {which}" in text
    assert "an import of `forecasts`, not of yours" in text
    assert "find_masks" in text
    assert "Write `import" not in text


def test_library__error_of_a_subclass_of_ones_own(library: Any) -> None:
    """What is the user's own of a library's class has the library's import."""
    own = type("Own", (library.Forecaster,), {"__module__": "__main__"})
    assert "`forecasts`, whose Forecaster" in refused("DRIVE", old.Trainer, own())


def test_own_package__error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the user's own, beside what runs, can be changed."""
    monkeypatch.chdir(tmp_path)
    own = Library(tmp_path, monkeypatch, "src").module
    assert "Write `import lightning.pytorch as pl` in place of" in refused("DRIVE", old.Trainer, own.Forecaster())
    sys.modules.pop("forecasts")


@checked_by_us
@pytest.mark.parametrize("kind", [old.callbacks.ModelCheckpoint, old.callbacks.EarlyStopping, OldSubclass])
@pytest.mark.parametrize("is_first", [True, False])
def test_callback__error(tmp_path: Path, kind: Any, is_first: bool) -> None:
    """Best-model tracking would not start again, so that a dense epoch could win."""
    module, other = fits.ConvModule(), kind(monitor="val_loss")
    callbacks = [other, fits.drive()] if is_first else [fits.drive(), other]
    with pytest.raises(MisconfigurationException, match=f"got the {kind.__name__} of `pytorch_lightning`.*{REMEDY}"):
        fits.trainer(tmp_path, *callbacks).fit(module, fits.loader())
    assert not module.calls


def test_module__error(tmp_path: Path) -> None:
    """Lightning itself refuses such a module, before any callback could say which import to change."""
    module = OldModule()
    with pytest.raises(TypeError, match=r"must be a `LightningModule`.* got `OldModule`"):
        fits.trainer(tmp_path, fits.drive()).fit(module, fits.loader())
    assert module.steps == 0


@checked_by_us
def test_third_party_callback(tmp_path: Path) -> None:
    """The bare `Callback` as a base is no reason to refuse: nothing in it is looked for. Loggers do no harm either."""
    pruning, other = fits.drive(), ThirdParty()
    fits.trainer(tmp_path, pruning, other, logger=CSVLogger(tmp_path)).fit(fits.ConvModule(), fits.loader())
    assert other.epochs == 4
    assert pruning.masks.num_kept == 200  # of 998
    assert "pruning/effective_sparsity" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_short_name() -> None:
    """`import lightning as L` is the same namespace as `lightning.pytorch`."""
    assert L.Trainer is pl.Trainer
    assert issubclass(DRIVEPruningCallback, L.Callback)


def test_fabric__error() -> None:
    """Fabric calls no hook of a training loop: the network would stay dense without a word."""
    fabric = L.Fabric(accelerator="cpu", callbacks=[fits.drive()])
    with pytest.raises(MisconfigurationException, match=r"got a `Fabric`.* Call `lightning_drive.find_masks`"):
        fabric.setup(nn.Linear(2, 2))
