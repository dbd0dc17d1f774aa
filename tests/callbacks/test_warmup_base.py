"""Pruning before a global step, in the middle of an epoch or not."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from disturbed import Calls, Interrupt, Run, interrupt, places
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_drive import DRIVEPruningCallback, SNIPPruningCallback, SynFlowPruningCallback
from lightning_drive.callbacks.warmup_base import WarmupPruningCallback

STEPS = 3  # per epoch
MAKE: dict[str, Callable[..., WarmupPruningCallback]] = {
    "DRIVE": lambda **settings: DRIVEPruningCallback(**{"sparsity": 0.8, "rounds": 3, **settings}),
    "SNIP": lambda **settings: SNIPPruningCallback(**{"sparsity": 0.5, **settings}),
    "SynFlow": lambda **settings: SynFlowPruningCallback(**{"sparsity": 0.8, "rounds": 3, **settings}),
}
every_callback = pytest.mark.parametrize("name", MAKE)
resumed = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Zeros(pl.Callback):
    """Writes down the share of zeros in the first layer before every batch, after the pruning callback."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.by_step.setdefault(trainer.global_step, float((pl_module.features[0].weight == 0).float().mean()))


@every_callback
@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 8])
def test_step(tmp_path: Path, name: str, step: int) -> None:
    """Dense before that step, sparse from it on, and the report has it."""
    callback, zeros = MAKE[name](warmup_steps=step), Zeros()
    module = ConvModule()
    fits.fit(tmp_path, module, callback, zeros)
    assert [at for at, share in zeros.by_step.items() if share == 0] == list(range(step))
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.step) == (step // STEPS, step)
    assert callback.masks.hold_for(module)


@every_callback
@pytest.mark.parametrize(
    ("settings", "per_epoch"), [({}, 3), ({"accumulate_grad_batches": 2}, 2), ({"limit_train_batches": 2}, 2)], ids=str
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_step__equals_epoch(
    tmp_path: Path, name: str, settings: dict[str, Any], per_epoch: int, optimizer: str
) -> None:
    """At the step with which an epoch begins it is the same run, to the bit."""
    ends = []
    for when in ({"warmup_epochs": 2}, {"warmup_steps": 2 * per_epoch}):
        callback = MAKE[name](**when)
        module = ConvModule(optimizer)
        fits.fit(tmp_path, module, callback, **settings)
        ends.append((fits.state_of(module), callback.masks.digest()))
    assert fits.equal_states(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@every_callback
@pytest.mark.parametrize("accumulate", [2, 3])
def test_step__accumulated(tmp_path: Path, name: str, accumulate: int) -> None:
    """Only where no gradients wait for a step."""
    seen: list[tuple[int, int, bool]] = []

    class Look(pl.Callback):
        was_pruned = False

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if callback.pruned and not self.was_pruned:
                seen.append((trainer.global_step, batch_idx, trainer.current_epoch == 0))
            self.was_pruned = callback.pruned

    callback = MAKE[name](warmup_steps=1)
    trainer = fits.trainer(tmp_path, callback, Look(), max_epochs=2, accumulate_grad_batches=accumulate)
    trainer.fit(ConvModule(), fits.loader(batch_size=8))
    assert seen == [(1, accumulate, True)]


def test_step__accumulated_by_epoch(tmp_path: Path) -> None:
    """As many batches as the epoch of that step gathers."""
    callback = MAKE["DRIVE"](warmup_steps=4)
    fits.fit(tmp_path, ConvModule(), callback, GradientAccumulationScheduler({0: 1, 1: 2}), max_epochs=3)
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.step) == (1, 4)


@resumed
@every_callback
@pytest.mark.parametrize("at", [1, 4, 5, 7])
def test_resume(tmp_path: Path, name: str, at: int) -> None:
    """From before and after the cut, in the middle of epochs, to the same end to the bit."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == at:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def run(ckpt_path: Path | None) -> Any:
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(16, 1, 8, 8, generator=generator)
        same = torch.utils.data.TensorDataset(images.repeat(3, 1, 1, 1), images.flatten(1)[:, :4].argmax(1).repeat(3))
        callback, module = MAKE[name](warmup_steps=5), ConvModule()
        others = [Save()] if ckpt_path is None else []
        trainer = fits.trainer(tmp_path, callback, *others)
        trainer.fit(module, DataLoader(same, batch_size=16), ckpt_path=ckpt_path)
        assert callback.report is not None
        return fits.state_of(module), callback.masks.digest(), callback.report.step, trainer.global_step

    whole, again = run(None), run(tmp_path / "a.ckpt")
    assert fits.equal_states(whole[0], again[0])
    assert whole[1:] == again[1:]
    assert whole[2:] == (5, 12)


SAVED: dict[str, Callable[[], Any]] = {
    "DRIVE": lambda: DRIVEPruningCallback(sparsity=0.8, warmup_steps=3, rounds=3, bn_batches=2),
    "DRIVE_reinit": lambda: DRIVEPruningCallback(sparsity=0.8, warmup_steps=5, rounds=2, control="reinit"),
    "SynFlow": lambda: SynFlowPruningCallback(sparsity=0.8, warmup_steps=3, rounds=3, bn_batches=2),
    "middle": lambda: SNIPPruningCallback(sparsity=0.5, warmup_steps=4, rounds=2, bn_batches=2),
}


@resumed
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("name", "num_batches", "number"),
    [
        *(("DRIVE", 2, 4), ("DRIVE_reinit", 3, 4), ("SynFlow", 3, 4), ("middle", 2, 4)),
        *(pytest.param(name, num_batches, 14, marks=pytest.mark.extended) for name in SAVED for num_batches in (2, 3)),
    ],
)
def test_saves_and_interrupts(name: str, num_batches: int, number: int, tmp_path: Path) -> None:
    """A run that is saved or stopped while it prunes before a batch goes on with that batch, to the same end.

    With two batches an epoch, pruning may come before the last one.
    """
    run = partial(Run, num_batches=num_batches)
    run(SAVED[name](), tmp_path, Calls())  # what is imported or cached only once
    expected = run(SAVED[name](), tmp_path, Calls())
    wrong = []
    for place in places(expected.calls, number):
        saved = tmp_path / f"{place}.ckpt"
        saving = run(SAVED[name](), tmp_path, Calls(place, lambda trainer, path=saved: trainer.save_checkpoint(path)))
        again = [saving, run(SAVED[name](), tmp_path, Calls(), saved)]
        folder = tmp_path / str(place)
        with suppress(Interrupt):
            run(SAVED[name](), folder, Calls(place, interrupt))
        if (folder / "exception.ckpt").exists():
            again.append(run(SAVED[name](), folder, Calls(), folder / "exception.ckpt"))
        for other in again:
            steps = other.trainer.global_step, other.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
            wanted = expected.trainer.global_step, expected.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
            wrong.append((place, expected.calls.names[place], other.differences(expected), steps == wanted))
    assert len(wrong) >= 3 * number - 6
    assert [failure for failure in wrong if failure[2] or not failure[3]] == []


# Endless streams, several optimizers, loggers.


class Stream(IterableDataset[Any]):
    """Batches without an end."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from fits.dataset()


@every_callback
def test_stream(tmp_path: Path, name: str) -> None:
    """Whose one epoch never ends."""
    callback, module = MAKE[name](warmup_steps=6), ConvModule()
    trainer = fits.trainer(tmp_path, callback, max_epochs=-1, max_steps=10, val_check_interval=4)
    trainer.fit(module, DataLoader(Stream(), batch_size=16))
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.step) == (0, 6)
    assert callback.masks.hold_for(module)


class Adversaries(pl.LightningModule):
    """Two optimizers, each of which counts in `global_step`."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1))))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), 0.05, momentum=0.9) for layer in (self.first, self.second)]


@every_callback
@pytest.mark.parametrize(("step", "pruned_at"), [(4, 4), (5, 6), (8, 8)])
def test_manual_optimization(tmp_path: Path, name: str, step: int, pruned_at: int) -> None:
    """Before the batch by which `global_step` has come so far."""
    loss_fn = {} if name == "SynFlow" else {"loss_fn": fits.loss_fn}
    callback, module = MAKE[name](warmup_steps=step, **loss_fn), Adversaries()
    trainer = fits.trainer(tmp_path, callback, max_epochs=2, limit_val_batches=0)
    trainer.fit(module, fits.loader())
    assert callback.report is not None
    assert callback.report.step == pruned_at
    assert trainer.global_step == 12
    assert callback.masks.hold_for(module)


@every_callback
def test_log(tmp_path: Path, name: str) -> None:
    """What is logged is there in the epoch of the cut, and in those after it."""
    logger, callback = CSVLogger(tmp_path), MAKE[name](warmup_steps=4)
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics.get("pruning/sparsity", -1)))

    fits.fit(tmp_path, ConvModule(), callback, Look(), logger=logger)
    assert seen == pytest.approx([-1, *[callback.masks.sparsity] * 3])
    rows = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "pruning/density" in rows


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_progress_bar(tmp_path: Path, bar: str) -> None:
    bars = {"tqdm": pl.callbacks.TQDMProgressBar, "rich": pl.callbacks.RichProgressBar}
    callback = MAKE["DRIVE"](warmup_steps=4)
    fits.fit(tmp_path, ConvModule(), callback, bars[bar](), enable_progress_bar=True)
    assert callback.pruned


def test_fast_dev_run(tmp_path: Path) -> None:
    callback = MAKE["DRIVE"](warmup_steps=1000)
    fits.fit(tmp_path, ConvModule(), callback, fast_dev_run=True)
    assert callback.pruned


# Plans and settings.


@every_callback
def test_plan(name: str) -> None:
    callback = MAKE[name](warmup_steps=1000)
    plan = callback.plan(nn.Linear(4, 4))
    assert (plan.first_step, plan.first_epoch, plan.last_epoch) == (1000, None, None)
    assert "when: before step 1000, in " in str(plan)
    plan = callback.plan(nn.Linear(4, 4), max_epochs=9, steps_per_epoch=300)
    assert (plan.first_step, plan.first_epoch, plan.last_epoch) == (1000, 3, 3)
    assert "epochs of training before" not in str(plan)


@every_callback
@pytest.mark.parametrize("epochs", [1, 2])
def test_both__error(name: str, epochs: int) -> None:
    message = (
        rf"`warmup_steps` sets when to prune in place of `warmup_epochs`.*warmup_steps=5 and warmup_epochs={epochs}"
    )
    with pytest.raises(ValueError, match=message):
        MAKE[name](warmup_steps=5, warmup_epochs=epochs)


class Own(DRIVEPruningCallback):
    """With another default."""

    def __init__(self, *, sparsity: float, warmup_epochs: int = 7, warmup_steps: int | None = None) -> None:
        super().__init__(sparsity=sparsity, warmup_epochs=warmup_epochs, warmup_steps=warmup_steps)


class Passing(SNIPPruningCallback):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)


@pytest.mark.parametrize(
    ("kind", "epochs"), [(DRIVEPruningCallback, 5), (SNIPPruningCallback, 0), (Own, 7), (Passing, 0)]
)
def test_both__default(kind: Any, epochs: int) -> None:
    """A file of settings has the defaults in it."""
    assert kind(sparsity=0.5, warmup_steps=5, warmup_epochs=epochs).warmup_steps == 5
    assert kind(sparsity=0.5, warmup_steps=5).warmup_steps == 5
    with pytest.raises(ValueError, match="Set only one of them"):
        kind(sparsity=0.5, warmup_steps=5, warmup_epochs=epochs + 1)


@every_callback
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (1.5, ValueError), (True, ValueError)])
def test_settings__error(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`warmup_steps` must be a whole number of at least 0"):
        MAKE[name](warmup_steps=value)


@every_callback
@pytest.mark.parametrize(
    ("step", "settings", "message"),
    [
        (12, {"max_epochs": 4}, r"warmup_steps=12\) prunes before step 12 .* with max_epochs=4 training ends after 12"),
        (99, {"max_epochs": 4, "accumulate_grad_batches": 2}, r"with max_epochs=4 training ends after 8 steps"),
        (6, {"max_epochs": -1, "max_steps": 6}, r"with max_steps=6 .* Raise `max_steps` or lower `warmup_steps`"),
        (12, {"max_epochs": 4, "max_steps": 100}, r"with max_epochs=4 training ends after 12 steps"),
    ],
)
def test_fit__error(tmp_path: Path, name: str, step: int, settings: dict[str, Any], message: str) -> None:
    """Refused before the first step."""
    callback, zeros = MAKE[name](warmup_steps=step), Zeros()
    with pytest.raises(MisconfigurationException, match=message):
        fits.fit(tmp_path, ConvModule(), callback, zeros, **settings)
    assert zeros.by_step == {}
