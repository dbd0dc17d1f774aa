"""Lightning still has the private names and stored forms of ``lightning_internals``; nothing of it is imitated here.

A failure names the function of ``lightning_internals`` and the versions of Lightning in which it was right.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

import fits
import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader

import lightning_drive
from lightning_drive.trainer import lightning_internals

TESTED: dict[str, str] = {}
"""Name in ``lightning_internals`` to the versions of Lightning in which it was seen to be right."""


def seen_in(versions: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Name these versions of Lightning where a test fails."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        TESTED[test.__name__.removeprefix("test_")] = versions

        @functools.wraps(test)
        def checked(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                what = f"`lightning_internals.{test.__name__.removeprefix('test_')}` was right in Lightning {versions}"
                raise AssertionError(f"{what}, and is not in {lightning.__version__}.") from error

        return checked

    return decorate


def calling(hook: str, function: Callable[[pl.Trainer, Any], object]) -> pl.Callback:
    """Return a callback that calls a function in one hook."""
    kind = type("Calling", (pl.Callback,), {hook: lambda self, trainer, pl_module, *args: function(trainer, pl_module)})
    return kind()


def fit(tmp_path: Path, *callbacks: pl.Callback, module: Any = None, data: Any = None, **settings: Any) -> Any:
    """Train for two epochs of three batches and return the module."""
    module = fits.ConvModule() if module is None else module
    loader = {} if data is not None else {"train_dataloaders": fits.loader()}
    trainer = fits.trainer(tmp_path, *callbacks, **{"max_epochs": 2, "limit_val_batches": 0, **settings})
    trainer.fit(module, datamodule=data, **loader)
    return module


# The Trainer and its module.


@seen_in("2.5.0 and 2.6.6")
def test_HOLDERS() -> None:  # noqa: N802
    assert {"_fabric", "_fabric_optimizers", "_trainer"} <= vars(pl.LightningModule()).keys()
    assert "_average_model" in vars(StochasticWeightAveraging(0.1))
    assert set(lightning_internals.HOLDERS) == {"_average_model", "_fabric", "_fabric_optimizers", "_trainer"}


@seen_in("2.5.0 and 2.6.6")
def test_trainer_of(tmp_path: Path) -> None:
    seen: list[Any] = []
    module = fit(tmp_path, calling("on_fit_start", lambda trainer, pl_module: seen.append(trainer)))
    assert lightning_internals.trainer_of(module) is seen[0]
    assert vars(module)["_trainer"] is seen[0]  # where `compaction` leaves it out of copies
    assert lightning_internals.trainer_of(fits.ConvModule()) is None
    assert lightning_internals.trainer_of(nn.Linear(1, 1)) is None


@seen_in("2.5.0 and 2.6.6")
def test_set_strategy(tmp_path: Path) -> None:
    trainer = fits.trainer(tmp_path)
    strategy, twin, other = trainer.strategy, copy.copy(trainer), SingleDeviceStrategy()
    lightning_internals.set_strategy(twin, other)
    assert twin.strategy is other
    assert trainer.strategy is strategy


class Scheduled(fits.ConvModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2}}


@seen_in("2.5.0 and 2.6.6")
def test_new_optimizers(tmp_path: Path) -> None:
    made: list[Any] = []

    def make(trainer: Any, pl_module: Any) -> None:
        made.extend((*lightning_internals.new_optimizers(pl_module), trainer.optimizers, trainer.lr_scheduler_configs))

    fit(tmp_path, calling("on_train_start", make), module=Scheduled())
    [optimizer], [config], [old], [old_config] = made
    assert type(optimizer) is type(old)
    assert optimizer is not old
    assert config.scheduler.optimizer is optimizer
    assert replace(config, scheduler=old_config.scheduler) == old_config


# Batches and steps.


@seen_in("2.5.0 and 2.6.6")
def test_combined_loader(tmp_path: Path) -> None:
    loaders: list[Any] = []

    def look(trainer: Any, pl_module: Any) -> None:
        loaders.extend(
            (lightning_internals.combined_loader(trainer), trainer.train_dataloader, trainer.num_training_batches)
        )

    fit(tmp_path, calling("on_train_start", look), limit_train_batches=2)
    combined, loader, length = loaders
    assert combined.flattened == [loader]
    assert [*combined.limits] == [length] == [2]


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
@seen_in("2.5.0 and 2.6.6")
def test_like(mode: Any) -> None:
    loader = CombinedLoader({"a": [1, 2, 3], "b": [4, 5]}, mode)
    iter(loader)
    loader.limits = [3, 1]
    assert [*lightning_internals.like(loader, loader.flattened)] == [*loader]
    loader.limits = None
    assert [*lightning_internals.like(loader, [[1, 2], [3]])] == [*CombinedLoader({"a": [1, 2], "b": [3]}, mode)]


class Doubling(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return fits.loader()

    val_dataloader = train_dataloader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]


class Adding(fits.ConvModule):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]


@pytest.mark.parametrize("data", [None, Doubling()], ids=["module", "datamodule"])
@seen_in("2.5.0 and 2.6.6")
def test_before_batch_transfer(data: Any, tmp_path: Path) -> None:
    batch = next(iter(fits.loader()))
    expected = batch[0] + 1 if data is None else 2 * batch[0]
    seen: list[Any] = []

    def look(trainer: Any, pl_module: Any) -> None:
        seen.append(lightning_internals.before_batch_transfer(pl_module, batch)[0])

    module = fit(tmp_path, calling("on_train_start", look), module=Adding() if data is None else None, data=data)
    assert torch.equal(seen[0], expected)
    assert torch.equal(module.calls[0], expected[:, 0, 0, 0])  # what training itself reads


class OfBatch(fits.ConvModule):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return super().training_step(batch, 0)


@pytest.mark.parametrize(("make", "expected"), [(fits.ConvModule, ["batch", 7]), (OfBatch, ["batch"])])
@seen_in("2.5.0 and 2.6.6")
def test_step_arguments(make: type[pl.LightningModule], expected: list[Any], tmp_path: Path) -> None:
    arguments: list[Any] = []

    def look(trainer: Any, pl_module: Any) -> None:
        arguments.append(lightning_internals.step_arguments(trainer, "batch", 7))

    fit(tmp_path, calling("on_train_epoch_start", look), module=make())
    assert arguments == [expected] * 2


class Steps(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any) -> None:
        self.steps += [step] if "train_loss_step" in metrics else []


@seen_in("2.5.0 and 2.6.6")
def test_logged_step(tmp_path: Path) -> None:
    logger, steps = Steps(), set[int]()

    def look(trainer: Any, pl_module: Any) -> None:
        steps.add(lightning_internals.logged_step(trainer))

    fit(tmp_path, calling("on_train_batch_end", look), logger=logger, accumulate_grad_batches=2)
    assert sorted(steps) == logger.steps == [0, 1, 2, 3]


# Counts of epochs and batches.


def numbers(part: dict[str, int]) -> tuple[int, ...]:
    assert set(part) == {"ready", "started", "processed", "completed"}
    return part["ready"], part["started"], part["processed"], part["completed"]


@seen_in("2.5.0 and 2.6.6")
def test_counts(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {"on_train_epoch_start": [], "on_train_batch_start": []}
    callbacks = [
        calling(hook, lambda trainer, _, counts=counts: counts.append(lightning_internals.counts(trainer)))
        for hook, counts in seen.items()
    ]
    fit(tmp_path, *callbacks)
    epoch, batch = seen["on_train_epoch_start"][1], seen["on_train_batch_start"][4]
    assert numbers(epoch.epochs["total"]) == (2, 1, 1, 1)
    assert numbers(epoch.batches["current"]) == (3, 3, 3, 3)  # still those of the epoch before
    assert numbers(batch.batches["current"]) == (2, 1, 1, 1)
    assert numbers(batch.batches["total"]) == (5, 4, 4, 4)
    assert [counts.batches["is_last_batch"] for counts in seen["on_train_batch_start"]] == [False, False, True] * 2


@seen_in("2.5.0 and 2.6.6")
def test_set_counts(tmp_path: Path) -> None:
    trainer = fits.trainer(tmp_path)
    counts = lightning_internals.counts(trainer)
    counts.epochs["total"]["ready"] = counts.batches["current"]["started"] = 3
    counts.batches["is_last_batch"] = True
    assert lightning_internals.counts(trainer) != counts  # a copy
    lightning_internals.set_counts(trainer, counts)
    assert lightning_internals.counts(trainer) == counts
    assert trainer.current_epoch == lightning_internals.counts(trainer).epochs["current"]["completed"] == 0


class Saving(pl.Callback):
    def __init__(self) -> None:
        self.equal: list[bool] = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.equal.append(lightning_internals.counts_in(checkpoint) == lightning_internals.counts(trainer))
        lightning_internals.counts_in(checkpoint).batches["total"]["ready"] = 77


@seen_in("2.5.0 and 2.6.6")
def test_counts_in(tmp_path: Path) -> None:
    saving = Saving()
    fit(tmp_path, saving, ModelCheckpoint(tmp_path, filename="last"), max_epochs=1)
    assert saving.equal == [True]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert lightning_internals.counts_in(checkpoint).batches["total"]["ready"] == 77


# Gradients of mixed precision.


@seen_in("2.5.0 and 2.6.6")
def test_scaler(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu")
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    assert lightning_internals.scaler(fits.trainer(tmp_path, plugins=plugin)) is scaler
    assert lightning_internals.scaler(fits.trainer(tmp_path, precision="bf16-mixed")) is None
    assert lightning_internals.scaler(fits.trainer(tmp_path)) is None


@seen_in("2.5.0 and 2.6.6")
def test_unscales_in_step(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    scaled = fits.trainer(tmp_path, plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")))
    plain, fused = (torch.optim.AdamW(parameters, fused=fused) for fused in (False, True))
    assert lightning_internals.unscales_in_step(scaled, fused)
    assert not lightning_internals.unscales_in_step(scaled, plain)
    assert not lightning_internals.unscales_in_step(fits.trainer(tmp_path), fused)


# Lightning's callbacks.


@seen_in("2.5.0 and 2.6.6")
def test_legacy_state_key() -> None:
    assert lightning_internals.legacy_state_key(fits.drive()) is lightning_drive.DRIVEPruningCallback


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.05, swa_epoch_start=1)


NEW = [getattr(pl.callbacks, name) for name in ("WeightAveraging", "EMAWeightAveraging") if hasattr(pl.callbacks, name)]


@pytest.mark.parametrize("make", [swa, *NEW])
@pytest.mark.filterwarnings("ignore:.*multinomial:UserWarning", "ignore:Swapping scheduler:UserWarning")
@seen_in("2.5.0 and 2.6.6, WeightAveraging in 2.6.6")
def test_average_of(make: Callable[[], pl.Callback], tmp_path: Path) -> None:
    callback, seen = make(), []
    assert lightning_internals.average_of(callback) is None

    def look(trainer: Any, pl_module: Any) -> None:
        average = lightning_internals.average_of(callback)
        assert average is not None
        seen.append((average.holder.n_averaged, [name for name, _ in average.module.named_parameters()]))

    module = fit(tmp_path, callback, calling("on_train_epoch_end", look), max_epochs=3)
    assert len(seen) >= 3
    assert all(names == [name for name, _ in module.named_parameters()] for _, names in seen)
    assert 0 < int(seen[-1][0]) <= 9
    assert lightning_internals.average_of(fits.drive()) is None


@pytest.mark.parametrize("epochs", [[], [2], [1, 2]])
@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
@seen_in("2.5.0 and 2.6.6")
def test_count_as_averaged(epochs: list[int], tmp_path: Path) -> None:
    callback, averaged = swa(), []

    def count(trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in epochs:
            lightning_internals.count_as_averaged(callback, trainer.current_epoch)

    def look(trainer: Any, pl_module: Any) -> None:
        average = lightning_internals.average_of(callback)
        averaged.append(int(average.holder.n_averaged or 0))  # type: ignore[union-attr]

    fit(tmp_path, calling("on_train_epoch_start", count), callback, calling("on_train_batch_end", look), max_epochs=4)
    assert averaged[-1] == 4 - len(epochs)  # SWA adds an epoch for BatchNorm


@pytest.mark.parametrize(("given", "interval", "expected"), [(True, 0.5, True), (None, 1.0, True), (None, 0.5, False)])
@seen_in("2.5.0 and 2.6.6")
def test_checks_on_train_epoch_end(given: bool | None, interval: float, expected: bool, tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", check_on_train_epoch_end=given)
    assert lightning_internals.checks_on_train_epoch_end(stopping) is given
    stopping.setup(fits.trainer(tmp_path, val_check_interval=interval), fits.ConvModule(), "fit")
    assert lightning_internals.checks_on_train_epoch_end(stopping) is expected


class OwnHooks(EarlyStopping):
    """Looks at its metric at other times than its base."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._run_early_stopping_check(trainer)


@pytest.mark.parametrize("kind", [EarlyStopping, OwnHooks])
@pytest.mark.parametrize(("switches", "epochs"), [([], 1), ([True], 3), ([True, False], 1), ([True, True, False], 1)])
@seen_in("2.5.0 and 2.6.6")
def test_hold_off(kind: type[EarlyStopping], switches: list[bool], epochs: int, tmp_path: Path) -> None:
    stopping, ended = kind("train_loss_epoch", divergence_threshold=-1.0), []
    for on in switches:
        lightning_internals.hold_off(stopping, on)
    count = calling("on_train_epoch_end", lambda trainer, _: ended.append(trainer.current_epoch))
    fit(tmp_path, count, stopping, max_epochs=3)
    assert len(ended) == epochs


# Processes.


@seen_in("2.5.0 and 2.6.6")
def test_add_result(tmp_path: Path) -> None:
    trainer = fits.trainer(tmp_path, strategy="ddp_fork", devices=1)
    launcher: Any = trainer.strategy.launcher
    values = iter([1, 2])
    lightning_internals.add_result(launcher, "ours", lambda: next(values))
    lightning_internals.add_result(launcher, "another", lambda: 3)
    trainer.strategy.connect(fits.ConvModule())
    extra = launcher._collect_rank_zero_results(trainer, None).extra
    assert (extra["ours"], extra["another"]) == (1, 3)
    launcher.update_main_process_results(trainer, extra)  # which does not mind


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_add_result__other_launchers(strategy: str, tmp_path: Path) -> None:
    """There is no launcher in a single process, and that of scripts returns nothing."""
    launcher = fits.trainer(tmp_path, strategy=strategy, devices=1).strategy.launcher
    before = vars(launcher).copy() if launcher else {}
    lightning_internals.add_result(launcher, "ours", lambda: 1)
    assert (vars(launcher) if launcher else {}) == before


# Nothing is left out.


def test_lightning_internals__have_tests() -> None:
    own = [
        name for name, value in vars(lightning_internals).items() if isinstance(value, FunctionType) and name[0] != "_"
    ]
    own = [name for name in own if getattr(lightning_internals, name).__module__ == lightning_internals.__name__]
    assert sorted(TESTED) == sorted([*own, "HOLDERS"])


def test_seen_in__names_versions() -> None:
    @seen_in("1.0")
    def test_it() -> None:
        raise AttributeError

    TESTED.pop("it")
    with pytest.raises(AssertionError, match=r"`lightning_internals.it` was right in Lightning 1.0, and is not in \d"):
        test_it()
