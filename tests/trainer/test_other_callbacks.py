"""Callbacks beside the pruning one: the best model is sparse, searches prune nothing, and the rest agrees."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import CALLBACKS, LAST_CUT, NUM_KEPT, NUM_KEPT_IN, NUM_PRUNABLE, ConvModule, assert_pruned, num_zeros
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_drive import Masks, SNIPPruningCallback

each_method = pytest.mark.parametrize("method", CALLBACKS)


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


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
@pytest.mark.parametrize(("reset_best", "last_epoch"), [(True, 5), (False, 2)])
def test_early_stopping_waits_for_the_sparse_network(
    tmp_path: Path, reset_best: bool, last_epoch: int, on_train_epoch_end: bool
) -> None:
    """Dense epochs neither set the bar nor use up the patience."""
    stopping = EarlyStopping("val_loss", patience=2, check_on_train_epoch_end=on_train_epoch_end)
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


# Checkpoints.


@each_method
def test_every_checkpoint_is_consistent(tmp_path: Path, method: str) -> None:
    """By steps, by time or by epochs, whole or weights only: weights, masks and the step go together in each file."""
    callback, module = CALLBACKS[method](), ConvModule()
    savings = {
        "step": ModelCheckpoint(tmp_path / "step", filename="{step}", every_n_train_steps=2, save_top_k=-1),
        "time": ModelCheckpoint(tmp_path / "time", train_time_interval=timedelta(microseconds=1), save_top_k=-1),
        "light": ModelCheckpoint(tmp_path / "light", save_weights_only=True, every_n_epochs=1, save_top_k=-1),
    }
    fits.trainer(tmp_path, callback, *savings.values()).fit(module, fits.loader())
    assert_pruned(callback, module)
    saved = {name: [torch.load(path, weights_only=True) for path in (tmp_path / name).iterdir()] for name in savings}
    assert {name: len(each) for name, each in saved.items()} == {"step": 6, "time": 12, "light": 4}
    for name, each in saved.items():
        for checkpoint in each:
            kept = NUM_KEPT_IN[method][(checkpoint["global_step"] - 1) // 3]
            assert num_zeros(checkpoint["state_dict"]) == NUM_PRUNABLE - kept
            if name == "light":
                assert "callbacks" not in checkpoint
                continue
            masks = Masks.from_state_dict(checkpoint["callbacks"][type(callback).__name__]["masks"])
            assert masks.num_kept == (kept if kept < NUM_PRUNABLE else 0)
            assert all(not checkpoint["state_dict"][key][~mask].any() for key, mask in masks.items())


@pytest.mark.parametrize("with_names", [True, False])
@each_method
def test_checkpoint_names(tmp_path: Path, method: str, with_names: bool) -> None:
    """The sparsity of each epoch can be part of a file's name, though its key has a slash."""
    naming = ModelCheckpoint(
        tmp_path,
        filename="{epoch}-{pruning/sparsity:.2f}",
        auto_insert_metric_name=with_names,
        save_top_k=-1,
    )
    fits.trainer(tmp_path, CALLBACKS[method](), naming).fit(ConvModule(), fits.loader())
    sparsities = [1 - kept / NUM_PRUNABLE for kept in NUM_KEPT_IN[method]]
    template = "epoch={}-pruning/sparsity={:.2f}.ckpt" if with_names else "{}-{:.2f}.ckpt"
    expected = {template.format(epoch, sparsity) for epoch, sparsity in enumerate(sparsities)}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ckpt")} == expected


@pytest.mark.parametrize("save_last", [True, "link"])
@each_method
def test_last_checkpoint(tmp_path: Path, method: str, save_last: Any) -> None:
    """The last one is the last one, also when the best was forgotten in between."""
    callback, module = CALLBACKS[method](), Scripted()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=1, save_last=save_last)
    fits.trainer(tmp_path, callback, saving).fit(module, fits.loader())
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    assert last["epoch"] == 3
    assert num_zeros(last["state_dict"]) == NUM_PRUNABLE - NUM_KEPT
    assert Path(saving.best_model_path).name == "epoch=3.ckpt"


SWA_WARNINGS = ("ignore:.*swa:UserWarning", "ignore:Swapping scheduler:UserWarning")


@pytest.mark.filterwarnings(*SWA_WARNINGS)
@pytest.mark.parametrize("pruning_first", [True, False])
@each_method
def test_swa_does_not_make_training_longer(tmp_path: Path, method: str, pruning_first: bool) -> None:
    """It adds an epoch for BatchNorm's statistics, which is none to prune in."""
    callbacks = [CALLBACKS[method](), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)]
    running = fits.trainer(tmp_path, *callbacks[:: 1 if pruning_first else -1], max_epochs=LAST_CUT)
    with pytest.raises(MisconfigurationException, match=f"training ends after max_epochs={LAST_CUT} epochs"):
        running.fit(ConvModule(), fits.loader())


# Searches for a learning rate or a batch size.


class Searched(ConvModule):
    """Has a batch size to be found, and notes how many zeros there are at each step, also when a search takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 8
        self.zeros: list[int] = []

    def train_dataloader(self) -> DataLoader[Any]:
        return fits.loader(48, batch_size=self.batch_size)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.zeros.append(num_zeros(dict(self.named_parameters())))


def search(tuner: Tuner, module: Searched, what: str) -> None:
    if what == "lr":
        tuner.lr_find(module, num_training=20, update_attr=True)
    else:
        tuner.scale_batch_size(module, max_trials=2, steps_per_trial=1, init_val=8)


@pytest.mark.parametrize(("method", "what"), [("DRIVE", "lr"), ("DRIVE", "batch_size"), ("IMP", "lr")])
def test_search__tuner(tmp_path: Path, method: str, what: str) -> None:
    """Nothing is pruned while the Tuner searches; training then prunes as ever, and the next search changes nothing."""
    callback, module = CALLBACKS[method](), Searched()
    running = fits.trainer(tmp_path, callback)
    before, weights = getattr(module, what), fits.state_of(module)
    search(Tuner(running), module, what)
    assert getattr(module, what) != before
    assert set(module.zeros) == {0}
    assert not callback.pruned
    assert fits.equal_states(fits.state_of(module), weights)

    running.fit(module)
    assert_pruned(callback, module)
    masks, weights = callback.masks, fits.state_of(module)
    search(Tuner(fits.trainer(tmp_path, callback, max_epochs=6)), module, what)
    assert callback.masks == masks
    assert fits.equal_states(fits.state_of(module), weights)


SEARCHES: dict[str, Callable[[], Callback]] = {
    "lr": lambda: LearningRateFinder(num_training_steps=20),
    "batch_size": lambda: BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=8),
}


@pytest.mark.parametrize(("method", "what"), [("DRIVE", "lr"), ("DRIVE", "batch_size"), ("IMP", "lr")])
def test_search__callback(tmp_path: Path, method: str, what: str) -> None:
    """A search at the start of training does not prune, and is no resume: another module still starts afresh."""
    callback, module = CALLBACKS[method](), Searched()
    fits.trainer(tmp_path, callback, SEARCHES[what]()).fit(module)
    assert_pruned(callback, module)
    masks = callback.masks

    other = Searched()
    nn.init.kaiming_normal_(other.head.weight, generator=torch.Generator().manual_seed(5))
    fits.trainer(tmp_path, callback, SEARCHES[what]()).fit(other)
    assert_pruned(callback, other)
    assert callback.masks != masks
    assert other.zeros[0] == 0
    assert sorted({*other.zeros}) == sorted({NUM_PRUNABLE - kept for kept in NUM_KEPT_IN[method]})


@each_method
def test_search__during_training(tmp_path: Path, method: str) -> None:
    """Searches for a new learning rate at later epochs, as Lightning's documentation shows: zeros come through."""

    class AtEpochs(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch in (1, 3):
                self.lr_find(trainer, pl_module)
                searched.append(trainer.current_epoch)

    searched: list[int] = []
    callback, module = CALLBACKS[method](), Searched()
    fits.trainer(tmp_path, callback, AtEpochs(num_training_steps=20), max_epochs=5).fit(module)
    assert searched == [1, 3]
    assert_pruned(callback, module)
    first = module.zeros.index(NUM_PRUNABLE - NUM_KEPT)
    assert set(module.zeros[first:]) == {NUM_PRUNABLE - NUM_KEPT}


# Other callbacks that change training.


@pytest.mark.parametrize(("max_steps", "is_enough"), [(3, False), (4, True)])
def test_accumulation_schedule(tmp_path: Path, max_steps: int, is_enough: bool) -> None:
    """Steps before pruning are counted as they will be: here 1 in the first epoch, and 2 in the second."""
    callback, module = fits.drive(), ConvModule()
    scheduling = GradientAccumulationScheduler({0: 3, 1: 2})
    running = fits.trainer(tmp_path, callback, scheduling, max_steps=max_steps, max_epochs=9)
    if is_enough:
        running.fit(module, fits.loader())
        assert_pruned(callback, module)
        assert running.global_step == max_steps
    else:
        with pytest.raises(MisconfigurationException, match=r"prunes after 3 steps, .* max_steps=3, .* never prune"):
            running.fit(module, fits.loader())


def test_accumulation_schedule__imp(tmp_path: Path) -> None:
    """One that never changes is no schedule; one that does would make the cycles different trainings."""
    callback, module = CALLBACKS["IMP"](), ConvModule()
    running = fits.trainer(tmp_path, callback, GradientAccumulationScheduler({0: 3}), max_steps=3, max_epochs=9)
    running.fit(module, fits.loader())
    assert_pruned(callback, module)
    running = fits.trainer(tmp_path, CALLBACKS["IMP"](), GradientAccumulationScheduler({0: 3, 1: 2}))
    with pytest.raises(MisconfigurationException, match=r"scheduling=\{0: 3, 1: 2\}\) changes it at epochs counted"):
        running.fit(ConvModule(), fits.loader())


class WithBackbone(ConvModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.features
        del self.features

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.backbone(images))).flatten(1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


EQUAL_VALUES = "ignore:The provided params to be frozen already exist:UserWarning"  # two norms are all ones


@pytest.mark.filterwarnings(EQUAL_VALUES)
def test_finetuning__unfrozen_before_pruning(tmp_path: Path) -> None:
    """What is unfrozen by then is pruned with the rest, and its zeros stay in the parameter group it was given."""
    callback, module = fits.drive(), WithBackbone()
    fits.trainer(tmp_path, callback, BackboneFinetuning(1), max_epochs=5).fit(module, fits.loader())
    assert_pruned(callback, module)
    assert set(callback.masks) == {"backbone.0.weight", "backbone.4.weight", "head.weight"}


@pytest.mark.filterwarnings(EQUAL_VALUES)
@pytest.mark.parametrize(("unfreeze", "finetuning_first"), [(3, True), (2, False)])
def test_finetuning__unfrozen_after_pruning(tmp_path: Path, unfreeze: int, finetuning_first: bool) -> None:
    """What is frozen then is not pruned: a warning names it and says what to do, and `exclude` says it is meant so."""
    for settings in ({}, {"exclude": ["backbone.*"]}):
        callback, module = fits.drive(**settings), WithBackbone()
        callbacks: list[Callback] = [BackboneFinetuning(unfreeze), callback]
        running = fits.trainer(tmp_path, *callbacks[:: 1 if finetuning_first else -1])
        if settings:
            running.fit(module, fits.loader())
        else:
            with pytest.warns(UserWarning, match=r"'backbone\.4\.weight' were not pruned, since"):
                running.fit(module, fits.loader())
            assert any("BackboneFinetuning froze them" in text for text in callback.report.warnings)
        assert list(callback.masks) == ["head.weight"]
        assert callback.masks.num_kept == round(512 * 0.2)
        assert callback.masks.hold_for(module)


@pytest.mark.parametrize("make", [CALLBACKS["IMP"], lambda: fits.drive(control="reinit")], ids=["IMP", "reinit"])
def test_finetuning__cannot_return_error(tmp_path: Path, make: Any) -> None:
    """What returns to an earlier optimizer cannot go with what adds to it."""
    running = fits.trainer(tmp_path, make(), BackboneFinetuning(1), max_epochs=5)
    with pytest.raises(MisconfigurationException, match="to one before BackboneFinetuning unfroze layers"):
        running.fit(WithBackbone(), fits.loader())


@pytest.mark.parametrize("others_first", [True, False])
@pytest.mark.parametrize(
    "make_other",
    [
        lambda: SNIPPruningCallback(sparsity=0.5, include=["head.*"]),
        lambda: ModelPruning("l1_unstructured", amount=0.5),
    ],
    ids=["SNIPPruningCallback", "ModelPruning"],
)
@each_method
def test_two_that_prune_error(tmp_path: Path, method: str, make_other: Any, others_first: bool) -> None:
    """Refused by name before anything is trained or reparametrised, in any order, whatever each would cover."""
    callbacks = [CALLBACKS[method](exclude=["head.*"]), make_other()]
    module = ConvModule()
    before = fits.state_of(module)
    with pytest.raises(
        MisconfigurationException, match=r"Only one callback of a Trainer can prune, got .* and "
    ) as info:
        fits.trainer(tmp_path, *callbacks[:: -1 if others_first else 1]).fit(module, fits.loader())
    assert all(type(callback).__name__ in str(info.value) for callback in callbacks)
    assert fits.equal_states(fits.state_of(module), before)


def test_two_that_prune_error__same_kind(tmp_path: Path) -> None:
    """Lightning itself refuses two of a kind, since their states in a checkpoint would have the same name."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DRIVEPruningCallback`"):
        fits.trainer(tmp_path, fits.drive(include=["head.*"]), fits.drive(exclude=["head.*"]))


@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`:UserWarning")
@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
@each_method
def test_onlookers(tmp_path: Path, method: str, bar: type[Callback]) -> None:
    """Callbacks that only look on see the run, and change nothing about it."""
    callback, module, alone, plain = CALLBACKS[method](), ConvModule(), CALLBACKS[method](), ConvModule()
    logger = pl.loggers.CSVLogger(tmp_path)
    onlookers = [
        LearningRateMonitor("step"),
        Timer("00:01:00:00"),
        ModelSummary(max_depth=2),
        ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2),
        bar(),
    ]
    fits.trainer(
        tmp_path, *onlookers, callback, logger=logger, enable_progress_bar=True, enable_model_summary=True
    ).fit(module, fits.loader())
    fits.trainer(tmp_path, alone).fit(plain, fits.loader())
    assert_pruned(callback, module)
    assert fits.equal_states(fits.state_of(module), fits.state_of(plain))
    assert "lr-SGD" in Path(logger.log_dir, "metrics.csv").read_text()
