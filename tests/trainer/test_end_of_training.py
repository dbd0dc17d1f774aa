"""Training that would end before the network is pruned is held off, refused or warned of; the reason is named after."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback, SNIPPruningCallback, SynFlowPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback

STEPS = 3  # per epoch
LAST_CUT = 3  # epoch
STEP_OF = [0]  # the run
CALLBACKS: dict[str, Callable[..., PruningCallback]] = {
    "DRIVE": lambda **settings: DRIVEPruningCallback(sparsity=0.8, warmup_epochs=LAST_CUT, rounds=2, **settings),
    "SNIP": lambda **settings: SNIPPruningCallback(sparsity=0.5, warmup_epochs=LAST_CUT, **settings),
    "SynFlow": lambda **settings: SynFlowPruningCallback(sparsity=0.8, warmup_epochs=LAST_CUT, rounds=2, **settings),
    "steps": lambda **settings: DRIVEPruningCallback(sparsity=0.8, warmup_steps=LAST_CUT * STEPS, rounds=2, **settings),
    "IMP": lambda **settings: IMPPruningCallback(sparsity=0.8, cycles=LAST_CUT, epochs_per_cycle=1, **settings),
}
by_epochs_steps_and_cycles = pytest.mark.parametrize("name", ["DRIVE", "steps", "IMP"])
"""The ways to count; SNIP and SynFlow have that of DRIVE from the same base class."""


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for every step."""
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: STEP_OF[0])


class Worse(ConvModule):
    """Its validation score gets worse with every step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(self.global_step))


class OwnHook(EarlyStopping):
    """As Lightning's documentation has it: at the end of the training epoch, in place of validation."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run_early_stopping_check(trainer)


class OwnCriterion(EarlyStopping):
    """Another rule of when to stop."""

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        return True, "enough"


class Begun(pl.Callback):
    """Notes the warnings before the first batch."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self.caught, self.before = caught, list[str]()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        STEP_OF[0] = trainer.global_step + 1
        if trainer.global_step == 0:
            self.before = [str(each.message) for each in self.caught]


def warned(tmp_path: Path, *callbacks: pl.Callback, module: Any = None, data: Any = None, **settings: Any) -> Any:
    """Train; return the warnings before the first batch, and those after it."""
    STEP_OF[0] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begun = Begun(caught)
        trainer = fits.trainer(tmp_path, *callbacks, begun, **({"max_epochs": 6} | settings))
        trainer.fit(module or ConvModule(), fits.loader() if data is None else data)
    before = [text for text in begun.before if is_ours(text)]
    return before, [text for each in caught if is_ours(text := str(each.message)) and text not in before]


def is_ours(text: str) -> bool:
    starts = "Training ended", "Training is likely to end", "EarlyStopping(", "The training data have no known length"
    return text.startswith(starts)


# EarlyStopping.


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, EarlyStopping) for name in CALLBACKS), ("DRIVE", OwnHook), ("IMP", OwnHook), ("DRIVE", OwnCriterion)],
)
def test_early_stopping_is_held_off(tmp_path: Path, name: str, kind: type[EarlyStopping]) -> None:
    """Until the last cut, for all callbacks and subclasses; then its patience begins anew."""
    callback, stopping = CALLBACKS[name](), kind("val_loss", patience=1)
    trainer = fits.trainer(tmp_path, callback, stopping, max_epochs=8)
    trainer.fit(Worse(), fits.loader())
    assert callback._finished
    assert trainer.current_epoch == LAST_CUT + (1 if kind is OwnCriterion else 2)
    assert not {"_should_skip_check", "_run_early_stopping_check"} & set(vars(stopping))


@by_epochs_steps_and_cycles
def test_early_stopping_is_held_off__within_epochs(tmp_path: Path, name: str) -> None:
    """Also where validation comes more often than pruning."""
    callback = CALLBACKS[name]()
    stopping = EarlyStopping("val_loss", patience=1)
    trainer = fits.trainer(tmp_path, callback, stopping, max_epochs=8, val_check_interval=0.34)
    trainer.fit(Worse(), fits.loader())
    assert callback._finished
    assert trainer.global_step == LAST_CUT * STEPS + 2


@pytest.mark.filterwarnings("ignore:You're resuming")
@by_epochs_steps_and_cycles
@pytest.mark.parametrize("moment", ["on_train_epoch_end", "on_train_batch_end", "on_validation_end"])
def test_early_stopping_is_held_off__resumed(tmp_path: Path, name: str, moment: str) -> None:
    class Save(pl.Callback):
        pass

    def save(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    saving = Save()
    setattr(saving, moment, save)
    ends = []
    for ckpt_path in (None, tmp_path / "a.ckpt"):
        callback, stopping = CALLBACKS[name](), EarlyStopping("val_loss", patience=1)
        others = [saving] if ckpt_path is None else []
        trainer = fits.trainer(tmp_path, callback, stopping, *others, max_epochs=8)
        trainer.fit(Worse(), fits.loader(), ckpt_path=ckpt_path)
        assert callback._finished
        ends.append((trainer.current_epoch, stopping.wait_count, callback.masks.digest()))
    assert ends[0] == ends[1]


@by_epochs_steps_and_cycles
def test_early_stopping_is_held_off__and_is_then_as_ever(tmp_path: Path, name: str) -> None:
    """After an error in the warm-up, the same EarlyStopping stops another run that is not pruned."""

    class Fail(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == STEPS + 1:
                raise RuntimeError("power cut")

    stopping = EarlyStopping("val_loss", patience=1)
    with pytest.raises(RuntimeError, match="power cut"):
        fits.trainer(tmp_path, CALLBACKS[name](), stopping, Fail()).fit(Worse(), fits.loader())
    trainer = fits.trainer(tmp_path, stopping)
    trainer.fit(Worse(), fits.loader())
    assert trainer.current_epoch == 2


@by_epochs_steps_and_cycles
def test_early_stopping_is_held_off__no_longer_than_to_the_cut(tmp_path: Path, name: str) -> None:
    """`min_epochs` is as ever, before and after the cut."""
    stopping = EarlyStopping("val_loss", patience=1)
    trainer = fits.trainer(tmp_path, CALLBACKS[name](), stopping, max_epochs=9, min_epochs=LAST_CUT + 4)
    trainer.fit(Worse(), fits.loader())
    assert trainer.current_epoch == LAST_CUT + 4


@by_epochs_steps_and_cycles
def test_early_stopping_without_reset_best(tmp_path: Path, name: str) -> None:
    """A patience that may not last until the cut is named before the first step, and the reason at the end."""
    stopping = EarlyStopping("val_loss", patience=2)
    before, after = warned(tmp_path, CALLBACKS[name](reset_best=False), stopping, module=Worse())
    assert len(before) == len(after) == 1
    assert "patience=2) may end training after 3 checks, but there are 3 before the network is pruned" in before[0]
    assert "Set `reset_best=True`, or a `patience` of 3 or more" in before[0]
    assert "by EarlyStopping(monitor='val_loss', patience=2)" in after[0]


@by_epochs_steps_and_cycles
@pytest.mark.parametrize(
    ("settings", "trainer"),
    [({"patience": 3}, {}), ({"patience": 1}, {"min_epochs": 4}), ({"patience": 2}, {"check_val_every_n_epoch": 2})],
    ids=str,
)
def test_early_stopping_without_reset_best__in_time(tmp_path: Path, name: str, settings: Any, trainer: Any) -> None:
    """Not where it lasts."""
    callback = CALLBACKS[name](reset_best=False)
    assert warned(tmp_path, callback, EarlyStopping("val_loss", **settings), module=Worse(), **trainer) == ([], [])
    assert callback._finished


def test_early_stopping_without_reset_best__within_epochs(tmp_path: Path) -> None:
    """Every check counts, and a resumed one has used up some of its patience."""
    stopping = EarlyStopping("val_loss", patience=4)
    callback = CALLBACKS["DRIVE"](reset_best=False)
    before, _ = warned(tmp_path, callback, stopping, module=Worse(), val_check_interval=0.34)
    assert "after 5 checks, but there are 9" in before[0]


# Data of unknown length.


class Stream(IterableDataset[Any]):
    """Batches without an end, or without a length."""

    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        index = 0
        while self.length is None or index < self.length:
            yield fits.dataset()[index % 48]
            index += 1


def stream(length: int | None = None) -> DataLoader[Any]:
    return DataLoader(Stream(length), batch_size=8)


@by_epochs_steps_and_cycles
@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"max_steps": 12, "max_epochs": -1}, list),
        ({"max_steps": 12}, list),
        ({"max_epochs": -1, "max_time": {"seconds": 4}}, list),
        ({"max_epochs": 99, "max_time": {"seconds": 4}}, list),
        ({"max_steps": 12, "max_epochs": -1, "val_check_interval": 4}, lambda: [EarlyStopping("val_loss")]),
    ],
)
def test_unknown_length(tmp_path: Path, name: str, settings: dict[str, Any], others: Any) -> None:
    """Named before the first step, with what to set; not where steps are counted, which then are enough."""
    callback = CALLBACKS[name]()
    before, after = warned(tmp_path, callback, *others(), module=Worse(), data=stream(), **settings)
    if name == "steps":
        assert before == []
        assert callback.pruned is ("max_time" not in settings)
        return
    assert len(before) == 1
    assert f"pruned at the start of epoch {LAST_CUT} (counted from 0), which never comes if" in before[0]
    assert ("Set `warmup_steps` in place" in before[0]) is (name != "IMP")
    assert "`limit_train_batches`" in before[0]
    assert len(after) == 1
    assert (f"by max_steps={settings.get('max_steps')}" in after[0]) is ("max_time" not in settings)


@by_epochs_steps_and_cycles
@pytest.mark.parametrize(
    ("settings", "length"),
    [({"max_epochs": 5}, 24), ({"max_epochs": -1, "max_steps": 15, "limit_train_batches": 3}, None)],
)
def test_unknown_length__no_warning(tmp_path: Path, name: str, settings: dict[str, Any], length: Any) -> None:
    """Epochs that end, as far as anyone can know."""
    callback = CALLBACKS[name]()
    assert warned(tmp_path, callback, data=stream(length), **settings) == ([], [])
    assert callback._finished


@by_epochs_steps_and_cycles
def test_known_length__refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"Raise `max_steps`"):
        fits.trainer(tmp_path, CALLBACKS[name](), max_epochs=-1, max_steps=9).fit(ConvModule(), fits.loader())


class TwoOptimizers(ConvModule):
    """Takes two steps for every batch, or one in two batches."""

    def __init__(self, accumulate: bool = False) -> None:
        super().__init__()
        self.automatic_optimization, self.accumulate = False, accumulate

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = F.cross_entropy(self(batch[0]), batch[1])
        optimizers: Any = self.optimizers()
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            if not self.accumulate or batch_idx == 2:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parts = [self.parameters()] if self.accumulate else [self.features.parameters(), self.head.parameters()]
        return [torch.optim.SGD(each, 0.05) for each in parts]


def loss_fn(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


MANUAL: dict[str, Callable[[], PruningCallback]] = {
    "DRIVE": lambda: DRIVEPruningCallback(sparsity=0.5, rounds=2, warmup_epochs=2, loss_fn=loss_fn),
    "SNIP": lambda: SNIPPruningCallback(sparsity=0.5, warmup_epochs=2, loss_fn=loss_fn),
    "IMP": lambda: IMPPruningCallback(sparsity=0.5, cycles=2, epochs_per_cycle=1),
    "steps": lambda: SNIPPruningCallback(sparsity=0.5, warmup_steps=12, loss_fn=loss_fn),
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"max_steps": 12, "max_epochs": 9}) for name in ("DRIVE", "SNIP", "IMP")),
        ("steps", {"max_epochs": 2}),
    ],
)
def test_manual_optimization(tmp_path: Path, name: str, settings: Any) -> None:
    """Steps are counted by optimizers: training is likely to end before, which is said before the first step."""
    before, after = warned(tmp_path, MANUAL[name](), module=TwoOptimizers(), **settings)
    assert len(before) == len(after) == 1
    assert "Training is likely to end before the network is pruned " in before[0]
    assert "6 steps in an epoch (one of each of its 2 optimizers for every batch)" in before[0]
    assert f"Raise `{next(iter(settings))}`" in before[0]


@pytest.mark.parametrize("name", MANUAL)
def test_manual_optimization__in_time(tmp_path: Path, name: str) -> None:
    settings = {"max_epochs": 4, **({} if name == "steps" else {"max_steps": 14})}
    callback = MANUAL[name]()
    assert warned(tmp_path, callback, module=TwoOptimizers(), **settings) == ([], [])
    assert callback._finished


@pytest.mark.parametrize("name", ["DRIVE", "SNIP", "IMP"])
def test_manual_optimization__that_accumulates(tmp_path: Path, name: str) -> None:
    """It takes fewer steps than there are batches, so `max_steps` may well be enough: no reason to refuse it."""
    callback = MANUAL[name]()
    before, after = warned(tmp_path, callback, module=TwoOptimizers(True), max_epochs=4, max_steps=6)
    assert callback._finished
    assert len(before) == 1
    assert after == []


# Warnings at the end.


class StopAt(pl.Callback):
    def __init__(self, hook: str = "on_train_epoch_end") -> None:
        setattr(self, hook, self._stop)

    def _stop(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


class StopsItself(ConvModule):
    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.should_stop = self.global_step == 4


@by_epochs_steps_and_cycles
@pytest.mark.parametrize(
    ("module", "callbacks", "settings", "reason"),
    [
        (ConvModule, lambda: [StopAt()], {}, ", since `trainer.should_stop` was set,"),
        (ConvModule, lambda: [StopAt("on_train_batch_end")], {}, ", since `trainer.should_stop` was set,"),
        (StopsItself, list, {}, ", since `trainer.should_stop` was set,"),
        (ConvModule, lambda: [Timer({"seconds": 4})], {"max_epochs": -1}, " by Timer (or `max_time`),"),
        (ConvModule, lambda: [Timer({"seconds": 4}, interval="epoch")], {}, " by Timer (or `max_time`),"),
        (ConvModule, list, {"max_time": {"seconds": 4}, "max_epochs": -1}, " by Timer (or `max_time`),"),
    ],
)
def test_reason(
    tmp_path: Path,
    name: str,
    module: Any,
    callbacks: Any,
    settings: Any,
    reason: str,
) -> None:
    """Nothing is known beforehand; at the end, the reason, when it would have pruned, and what to set."""
    callback = CALLBACKS[name]()
    before, after = warned(tmp_path, callback, *callbacks(), module=module(), **settings)
    assert before == []
    assert len(after) == 1
    assert reason in after[0]
    when = {"steps": "pruned before step 9", "IMP": "The next cut would have been at the start of epoch"}
    assert when.get(name, "pruned at the start of epoch 3 (counted from 0)") in after[0]
    assert {"steps": "Lower `warmup_steps`", "IMP": "lower `cycles`"}.get(name, "Lower `warmup_epochs`") in after[0]


@pytest.mark.parametrize("name", ["DRIVE", "steps"])
def test_best_and_last__as_before(tmp_path: Path, name: str) -> None:
    """Checkpoints go on being saved while EarlyStopping is held off."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=-1)
    stopping = EarlyStopping("val_loss", patience=1)
    fits.trainer(tmp_path, CALLBACKS[name](), stopping, checkpoint, max_epochs=8).fit(Worse(), fits.loader())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"epoch={epoch}.ckpt" for epoch in range(5)]
