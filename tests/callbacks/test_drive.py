"""The callback prunes once, at the right moment, to the exact count, and nothing brings a pruned weight back."""

import copy
import pickle
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import NUM_PRUNABLE, PRUNABLE, ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_drive import (
    DRIVE,
    DRIVEPruningCallback,
    IMPPruningCallback,
    Masks,
    PruningReport,
    SNIPPruningCallback,
    find_masks,
)
from lightning_drive.callbacks.hooks import Pruning


class Diary(pl.Callback):
    """Writes down how much of the network is zero in every hook."""

    def __init__(self) -> None:
        self.zeros: dict[str, list[float]] = {}

    def _write(self, hook: str, module: nn.Module) -> None:
        weights = [parameter for name, parameter in module.named_parameters() if name in PRUNABLE]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / NUM_PRUNABLE
        self.zeros.setdefault(hook, []).append(round(zeros, 3))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write("epoch_start", pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._write("batch_end", pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write("validation", pl_module)


def test_prunes_at_the_start_of_the_epoch(tmp_path: Path) -> None:
    """Epoch 1 is dense to the end, its validation too; epoch 2 is sparse from its first hook on."""
    callback = fits.drive()
    diary = Diary()
    fits.trainer(tmp_path, callback, diary).fit(ConvModule(), fits.loader())
    assert diary.zeros["epoch_start"] == [0.0, 0.0, 0.8, 0.8]
    assert diary.zeros["batch_end"] == [0.0] * 6 + [0.8] * 6
    assert diary.zeros["validation"] == [0.0, 0.0, 0.8, 0.8]
    assert callback.pruned
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.step) == (2, 6)


@pytest.mark.parametrize("warmup_epochs", [0, 1, 3])
def test_warmup_epochs(tmp_path: Path, warmup_epochs: int) -> None:
    callback = fits.drive(warmup_epochs=warmup_epochs)
    fits.trainer(tmp_path, callback).fit(ConvModule(), fits.loader())
    assert callback.report is not None
    assert callback.report.epoch == warmup_epochs
    assert callback.report.step == 3 * warmup_epochs


def test_masks_are_those_of_find_masks(tmp_path: Path) -> None:
    """The Trainer adds nothing: the engine, on the same weights and batches, finds the same masks."""
    batches = list(fits.loader())

    class Check(pl.Callback):
        expected: Masks

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                self.expected = find_masks(
                    pl_module,
                    DRIVE(rounds=5),
                    sparsity=0.8,
                    batches=batches,
                    loss_fn=fits.loss_fn,
                )

    check, callback = Check(), fits.drive()
    fits.trainer(tmp_path, check, callback).fit(ConvModule(dropout=0.5), fits.loader())
    assert callback.masks == check.expected


def test_loss_fn(tmp_path: Path) -> None:
    """A given loss is used instead of ``training_step``, with the module and the batch."""
    calls = []

    def loss_fn(module: pl.LightningModule, batch: list[Tensor]) -> Tensor:
        calls.append(len(batch[1]))
        return fits.loss_fn(module, batch)

    module = ConvModule()
    callback = fits.drive(loss_fn=loss_fn, bn_batches=0)
    fits.trainer(tmp_path, callback).fit(module, fits.loader())
    assert calls == [16] * 5
    assert len(module.calls) == 4 * 3


def test_batch_norm_is_re_estimated(tmp_path: Path) -> None:
    """After pruning, running statistics are the averages over the batches as the pruned network sees them."""
    batches = list(fits.loader())

    class Check(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 and batch_idx == 0:
                inputs = torch.stack([pl_module.features[0](images) for images, _ in batches]).detach()
                self.expected = inputs.mean((1, 3, 4)).mean(0)
                self.measured = pl_module.features[1].running_mean.clone()

    check, module = Check(), ConvModule()
    fits.trainer(tmp_path, fits.drive(bn_batches=3), check).fit(module, fits.loader())
    assert torch.allclose(check.measured, check.expected, atol=1e-6)
    assert module.features[1].momentum == 0.1


@pytest.mark.parametrize(("warmup_epochs", "bn_batches"), [(2, 0), (0, 20)], ids=["turned_off", "untrained"])
def test_batch_norm_is_re_estimated__not(tmp_path: Path, warmup_epochs: int, bn_batches: int) -> None:
    """With ``bn_batches=0``, or where no statistics were ever collected, they stay bit for bit."""

    class Check(pl.Callback):
        before: dict[str, Tensor]
        after: dict[str, Tensor]

        def __init__(self, moment: str) -> None:
            self.moment = moment

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == warmup_epochs:
                self.seen = {name: value.clone() for name, value in pl_module.named_buffers()}

    first, second = Check("before"), Check("after")
    callback = fits.drive(warmup_epochs=warmup_epochs, bn_batches=bn_batches)
    fits.trainer(tmp_path, first, callback, second).fit(ConvModule(), fits.loader())
    assert callback.pruned
    assert fits.equal_states(first.seen, second.seen)


def test_second_module_starts_afresh(tmp_path: Path) -> None:
    callback = fits.drive()
    fits.trainer(tmp_path, callback).fit(ConvModule(), fits.loader())
    first, report = callback.masks, callback.report
    second = ConvModule()
    nn.init.kaiming_normal_(second.head.weight, generator=torch.Generator().manual_seed(5))
    diary = Diary()
    fits.trainer(tmp_path, callback, diary).fit(second, fits.loader())
    assert diary.zeros["epoch_start"] == [0.0, 0.0, 0.8, 0.8]
    assert callback.masks != first
    assert callback.report is not report
    assert callback.masks.hold_for(second)


def test_same_module_goes_on(tmp_path: Path) -> None:
    """A second fit of the pruned module keeps it sparse from the first step, and does not prune again."""
    module, callback = ConvModule(), fits.drive()
    fits.trainer(tmp_path, callback).fit(module, fits.loader())
    masks = callback.masks
    diary = Diary()
    fits.trainer(tmp_path, callback, diary).fit(module, fits.loader())
    assert diary.zeros["epoch_start"] == [0.8] * 4
    assert callback.masks is masks


def test_same_module_goes_on__shorter_than_the_warmup(tmp_path: Path) -> None:
    """What is pruned already needs no warm-up, so one more epoch of it is no mistake."""
    module, callback = ConvModule(), fits.drive()
    fits.trainer(tmp_path, callback).fit(module, fits.loader())
    fits.trainer(tmp_path, callback, max_epochs=1).fit(module, fits.loader())
    assert callback.masks.hold_for(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies(tmp_path: Path, copied: Any) -> None:
    """A copy has the masks and lets go of the module, also in the middle of a fit."""

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.copy = copied(trainer.callbacks[0])  # type: ignore[attr-defined]

    callback, copying = fits.drive(), Copy()
    fits.trainer(tmp_path, callback, copying).fit(ConvModule(), fits.loader())
    assert copying.copy.masks == callback.masks
    assert copying.copy.report == callback.report
    assert copying.copy._fit.enforcement is None


def test_fast_dev_run(tmp_path: Path) -> None:
    """A quick check prunes at once, with few rounds, so that it checks pruning too."""
    module, callback = ConvModule(), fits.drive(warmup_epochs=5, rounds=100)
    fits.trainer(tmp_path, callback, fast_dev_run=True).fit(module, fits.loader())
    assert callback.masks.num_kept == round(NUM_PRUNABLE * 0.2)
    assert callback.report is not None
    assert "rounds=2" in callback.report.method


def test_training_that_stops_early_is_dense(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = True

    with pytest.warns(UserWarning, match="before the warm-up was over: the network is dense.* epoch 2 "):
        fits.trainer(tmp_path, fits.drive(), Stop()).fit(ConvModule(), fits.loader())


def test_interrupt_in_the_rounds_leaves_a_dense_run(tmp_path: Path) -> None:
    """Nothing is committed before all rounds are done; the same run can then be resumed and prunes."""
    uninterrupted = fits.drive()
    fits.trainer(tmp_path, uninterrupted).fit(ConvModule(), fits.loader())

    def fail_in_round_three(module: pl.LightningModule, batch: list[Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return fits.loss_fn(module, batch)

    calls: list[int] = []
    module, callback = ConvModule(), fits.drive(loss_fn=fail_in_round_three)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    with pytest.raises(RuntimeError, match="power cut"):
        fits.trainer(tmp_path, callback, checkpoint).fit(module, fits.loader())
    assert not callback.pruned
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert fits.equal_states(saved, fits.state_of(module))

    resumed, checkpoint = fits.drive(), pl.callbacks.ModelCheckpoint(tmp_path / "resumed", save_top_k=-1)
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        fits.trainer(tmp_path, resumed, checkpoint).fit(
            ConvModule(), fits.loader(), ckpt_path=tmp_path / "epoch=1.ckpt"
        )
    assert resumed.masks == uninterrupted.masks


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_from_a_checkpoint(tmp_path: Path, stage: str) -> None:
    callback = fits.drive()
    running = fits.trainer(tmp_path, callback)
    running.fit(ConvModule(), fits.loader())
    running.save_checkpoint(tmp_path / "sparse.ckpt")

    other, module = fits.drive(), ConvModule()
    module.test_step = module.validation_step  # type: ignore[method-assign]
    module.predict_step = lambda batch, batch_idx: module(batch[0])  # type: ignore[method-assign, assignment]
    getattr(fits.trainer(tmp_path, other), stage)(module, fits.loader(), ckpt_path=tmp_path / "sparse.ckpt")
    assert other.masks == callback.masks
    assert other.report == callback.report
    assert other.masks.hold_for(module)


def test_checkpoint_is_plain(tmp_path: Path) -> None:
    """It loads without unpickling anything, fits the plain dense module, is sparse already, and masks are bits."""
    module, callback = ConvModule(), fits.drive()
    running = fits.trainer(tmp_path, callback)
    running.fit(module, fits.loader())
    running.save_checkpoint(tmp_path / "sparse.ckpt")
    checkpoint = torch.load(tmp_path / "sparse.ckpt", weights_only=True)

    plain = ConvModule()
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    assert callback.masks.hold_for(plain)
    state = checkpoint["callbacks"]["DRIVEPruningCallback"]
    assert Masks.from_state_dict(state["masks"]) == callback.masks
    assert PruningReport.from_dict(state["report"]) == callback.report
    packed = sum(entry["bits"].numel() for entry in state["masks"]["masks"].values())
    assert packed == sum((mask.numel() + 7) // 8 for mask in callback.masks.values())
    assert fits.equal_states(
        fits.state_of(ConvModule.load_from_checkpoint(tmp_path / "sparse.ckpt")), fits.state_of(module)
    )


def test_checkpoint_made_without_the_callback(tmp_path: Path) -> None:
    """A dense checkpoint from beyond the warm-up is pruned at once."""
    running = fits.trainer(tmp_path, max_epochs=3)
    running.fit(ConvModule(), fits.loader())
    running.save_checkpoint(tmp_path / "dense.ckpt")
    callback = fits.drive(warmup_epochs=1)
    fits.trainer(tmp_path, callback).fit(ConvModule(), fits.loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert callback.report is not None
    assert callback.report.epoch == 3


def test_checkpoint_of_another_sparsity(tmp_path: Path) -> None:
    running = fits.trainer(tmp_path, fits.drive(sparsity=0.8), max_epochs=3)
    running.fit(ConvModule(), fits.loader())
    running.save_checkpoint(tmp_path / "sparse.ckpt")
    callback = fits.drive(sparsity=0.5)
    with pytest.warns(UserWarning, match=r"was pruned to a sparsity of 0\.7996 and stays so"):
        fits.trainer(tmp_path, callback).fit(ConvModule(), fits.loader(), ckpt_path=tmp_path / "sparse.ckpt")
    assert callback.masks.num_kept == round(NUM_PRUNABLE * 0.2)


def test_metrics_are_logged(tmp_path: Path) -> None:
    """Once at prune time at the current step, and the sparsity with every epoch from then on."""
    logger, folder = pl.loggers.CSVLogger(tmp_path), tmp_path / "checkpoints"
    checkpoint = pl.callbacks.ModelCheckpoint(
        folder, filename="{epoch}-{pruning/sparsity:.2f}", save_top_k=-1, auto_insert_metric_name=False
    )
    callback = fits.drive()
    fits.trainer(tmp_path, callback, checkpoint, logger=logger).fit(ConvModule(), fits.loader())
    header, *rows = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    values = [dict(zip(header, row, strict=True)) for row in rows]
    [pruning] = [row for row in values if row["pruning/density"]]
    assert callback.report is not None
    assert pruning["step"] == "6"
    assert float(pruning["pruning/sparsity"]) == pytest.approx(callback.report.sparsity)
    assert float(pruning["pruning/effective_sparsity"]) == pytest.approx(callback.report.effective_sparsity)
    assert float(pruning["pruning/seconds"]) == pytest.approx(callback.report.seconds)
    assert len([row for row in values if row["pruning/sparsity"] and row["epoch"] in ("2", "3")]) >= 2
    assert sorted(path.name for path in folder.glob("*.ckpt")) == [
        "0-0.00.ckpt", "1-0.00.ckpt", "2-0.80.ckpt", "3-0.80.ckpt"
    ]  # fmt: skip


def test_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The summary at prune time is the report, with effective sparsity measured by paths."""
    callback = fits.drive()
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fits.trainer(tmp_path, callback).fit(ConvModule(), fits.loader())
    report = callback.report
    assert report is not None
    assert str(report) in caplog.text
    assert [layer.name for layer in report.layers] == list(PRUNABLE)
    assert report.sparsity == callback.masks.sparsity
    assert report.digest == callback.masks.digest()
    assert report.effective_sparsity is not None
    assert report.effective_sparsity >= report.sparsity


class DictModule(ConvModule):
    """Takes its batch as a dictionary, whose first tensor is not what ``forward`` takes."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": F.cross_entropy(self(batch["image"]), batch["label"])}


class FunctionalModule(pl.LightningModule):
    """Trains without calling a module, so that it is not known what ``forward`` takes: not the batch's first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images.flatten(1)).relu())  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden = F.linear(batch["image"].flatten(1), self.first.weight, self.first.bias).relu()
        return F.cross_entropy(F.linear(hidden, self.last.weight), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def dict_loader() -> torch.utils.data.DataLoader[Any]:
    samples = [{"label": label, "image": image} for image, label in fits.dataset()]
    return torch.utils.data.DataLoader(samples, batch_size=16)  # type: ignore[arg-type]


def test_report__paths_cannot_be_followed(tmp_path: Path) -> None:
    """Then the report says so, and training goes on; ``example_input_array`` mends it."""
    for example, measured in ((None, False), (torch.zeros(1, 1, 8, 8), True)):
        module, callback = FunctionalModule(), fits.drive()
        module.example_input_array = example
        fits.trainer(tmp_path, callback).fit(module, dict_loader())
        assert callback.report is not None
        assert (callback.report.effective_sparsity is not None) == measured
        assert bool(callback.report.warnings) != measured
        if not measured:
            text = callback.report.warnings[0]
            assert text.startswith("Effective sparsity was not measured: paths could not be followed from the")
            assert text.endswith("Set `example_input_array` on the module to what `forward` takes.")


def test_collapse_is_warned_of(tmp_path: Path) -> None:
    """At three weights of a thousand the network is cut off; it is said aloud, and training goes on."""
    callback = fits.drive(sparsity=0.997, rounds=1)
    with (
        pytest.warns(UserWarning, match=r"Layer collapse: no weight is left in 'features\.4\.weight'"),
        pytest.warns(UserWarning, match="no path from its input to its output is left"),
    ):
        fits.trainer(tmp_path, callback).fit(ConvModule(), fits.loader())
    assert callback.masks.num_kept == round(NUM_PRUNABLE * 0.003)
    assert callback.report is not None
    assert callback.report.effective_sparsity == 1.0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sparsity": 90}, ValueError, r"`sparsity` .* in \[0, 1\), got 90. For 90 % pass 0.9"),
        ({"sparsity": 1.0}, ValueError, r"`sparsity` .* in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, r"`sparsity` .* got -0.1"),
        ({"sparsity": float("nan")}, ValueError, "`sparsity` .* got nan"),
        ({"sparsity": "0.9"}, TypeError, "`sparsity` .* must be a number"),
        ({"warmup_epochs": -1}, ValueError, "`warmup_epochs` must be a whole number of at least 0, got -1"),
        ({"warmup_epochs": 1.5}, ValueError, "`warmup_epochs` must be a whole number"),
        ({"rounds": 0}, ValueError, "`rounds` must be a whole number of at least 1, got 0"),
        ({"rounds": True}, ValueError, "`rounds` must be a whole number"),
        ({"batches_per_round": 0}, ValueError, "`batches_per_round` must be a whole number of at least 1"),
        (
            {"schedule": "square"},
            ValueError,
            "`schedule` must be one of .* 'linear', 'cubic', or a function, got 'square'",
        ),
        ({"scope": "local"}, ValueError, "`scope` must be one of 'global', 'layerwise', 'erk', got 'local'"),
        ({"mode": "test"}, ValueError, "`mode` must be one of 'train', 'eval', got 'test'"),
        ({"include": "head"}, TypeError, "`include` must be a list of glob patterns"),
        ({"exclude": [1]}, TypeError, "`exclude` must be a list of glob patterns"),
        ({"loss_fn": "loss"}, TypeError, "`loss_fn` must be a function"),
        ({"bn_batches": -1}, ValueError, "`bn_batches` must be a whole number of at least 0, got -1"),
        ({"reset_best": "yes"}, TypeError, "`reset_best` must be True or False, got 'yes'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings__error(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fits.drive(**settings)


def test_settings__keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        DRIVEPruningCallback(0.9)  # type: ignore[misc]


pytestmark = pytest.mark.filterwarnings(
    "ignore:You are using the `dataloader_iter` step flavor",
)


class IteratorModule(ConvModule):
    def training_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        raise AssertionError("must be refused before")


class SilentModule(ConvModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if self.trainer.current_epoch < 1 else {"log": loss}


def frozen_module() -> ConvModule:
    module = ConvModule()
    for name in PRUNABLE:
        module.get_parameter(name).requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("module", "settings", "trainer", "error", "message"),
    [
        (ConvModule, {"warmup_epochs": 4}, {}, MisconfigurationException, "max_epochs=4 .*never prune.* `max_epochs`"),
        (ConvModule, {}, {"max_epochs": -1, "max_steps": 6}, MisconfigurationException, "after 6 steps.*max_steps=6"),
        (ConvModule, {"include": ["heads.*"]}, {}, ValueError, "`include` pattern 'heads.*' matches no parameter"),
        (ConvModule, {"exclude": ["*.weigth"]}, {}, ValueError, "`exclude` pattern .* matches no parameter"),
        (ConvModule, {"exclude": ["*"]}, {}, ValueError, "no trainable parameter to prune"),
        (frozen_module, {}, {}, ValueError, r"features.0.weight, .* matched, but `requires_grad` is False"),
        (fits.Manual, {}, {}, MisconfigurationException, "manual optimization .* Pass `loss_fn`"),
        (IteratorModule, {}, {}, MisconfigurationException, "takes `dataloader_iter`.* Pass `loss_fn`"),
    ],
    ids=[
        "max_epochs", "max_steps", "include", "exclude", "all_excluded", "frozen", "manual", "dataloader_iter"
    ],
)  # fmt: skip
def test_fit__error(
    tmp_path: Path, module: Any, settings: Any, trainer: Any, error: type[Exception], message: str
) -> None:
    """Refused before the first optimizer step, with what must hold, what was given and what to do."""
    steps: list[int] = []

    class Steps(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    with pytest.raises(error, match=message):
        fits.trainer(tmp_path, fits.drive(**settings), Steps(), **trainer).fit(module(), fits.loader())
    assert steps == []


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda module, batch: torch.tensor(float("nan"), requires_grad=True), "The loss must be finite, got nan"),
        (lambda module, batch: module(batch[0]), r"must be a scalar tensor, got a tensor of shape \(16, 4\)"),
        (lambda module, batch: 1.0, "must be a scalar tensor, got 1.0"),
        (lambda module, batch: torch.tensor(1.0), "The loss has no gradient"),
        (lambda module, batch: module.head.bias.sum(), "does not depend on any prunable parameter"),
        (lambda module, batch: 0 * module(batch[0]).sum(), "Every score is zero"),
        (lambda module, batch: torch.sqrt(0 * module(batch[0])).sum(), r"scores of '.*' contain nan or inf"),
    ],
    ids=["nan", "shape", "type", "no_gradient", "no_dependence", "zero", "nan_score"],
)
def test_scoring__error(tmp_path: Path, break_it: Any, message: str) -> None:
    """What goes wrong while scoring leaves the module dense, as it was."""
    module = ConvModule()
    before = fits.state_of(module)
    with pytest.raises(ValueError, match=message):
        fits.trainer(tmp_path, fits.drive(warmup_epochs=0, loss_fn=break_it)).fit(module, fits.loader())
    assert fits.equal_states(before, fits.state_of(module))


def test_scoring__training_step_without_loss(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"`training_step` must return the loss .* or pass `loss_fn`"):
        fits.trainer(tmp_path, fits.drive(warmup_epochs=1)).fit(SilentModule(), fits.loader())


def test_load_state_dict__error(tmp_path: Path) -> None:
    """Masks of another module are refused by name, before the first step."""
    callback = fits.drive()
    with pytest.raises(ValueError, match="state has version 99, but this lightning_drive reads version 1"):
        callback.load_state_dict({"version": 99})

    masks = Masks({"encoder.weight": torch.ones(2, 2, dtype=torch.bool)})
    report = PruningReport.of(masks, None, method="", seconds=0.0, epoch=0, step=0, warnings=())
    callback._pruning = Pruning(masks, report)
    running = fits.trainer(tmp_path, callback)
    running.strategy.connect(ConvModule())
    running.save_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"hold 'encoder\.weight', but the module has no parameter of that name"):
        fits.trainer(tmp_path, fits.drive()).fit(ConvModule(), fits.loader(), ckpt_path=tmp_path / "foreign.ckpt")


class Renamed(SNIPPruningCallback):
    """A callback under another name."""


class RenamedIMP(IMPPruningCallback):
    """IMP under another name."""


def imp(kind: type[IMPPruningCallback] = IMPPruningCallback) -> IMPPruningCallback:
    return kind(sparsity=0.8, cycles=2, epochs_per_cycle=1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: SNIPPruningCallback(sparsity=0.8), lambda: Renamed(sparsity=0.8)),
        (lambda: Renamed(sparsity=0.8), fits.drive),
        (lambda: imp(RenamedIMP), imp),
    ],
)
def test_checkpoint_of_another_callback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: Any, second: Any
) -> None:
    """Masks under another name are taken over, in one line; nothing is pruned again."""
    before, after, module = first(), second(), ConvModule()
    run = fits.trainer(tmp_path, before, max_epochs=3)
    run.fit(ConvModule(), fits.loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="Please add the following callbacks"), caplog.at_level("INFO"):
        fits.trainer(tmp_path, after, max_epochs=4).fit(module, fits.loader(), ckpt_path=tmp_path / "last.ckpt")
    line = f"{type(after).__name__} takes over the masks of {type(before).__name__} in the checkpoint."
    assert sum(line in record.getMessage() for record in caplog.records) == 1
    assert after.masks.digest() == before.masks.digest()
    assert after.masks.hold_for(module)


@pytest.mark.parametrize(
    ("first", "second"),
    [(lambda: SNIPPruningCallback(sparsity=0.8), imp), (imp, lambda: SNIPPruningCallback(sparsity=0.8))],
)
def test_checkpoint_of_another_callback__error(tmp_path: Path, first: Any, second: Any) -> None:
    before, after = first(), second()
    run = fits.trainer(tmp_path, before, max_epochs=3)
    run.fit(ConvModule(), fits.loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    with (
        pytest.warns(UserWarning, match="Please add the following callbacks"),
        pytest.raises(
            ValueError, match=f"{type(after).__name__} can only take over .* pruned by {type(before).__name__}"
        ),
    ):
        fits.trainer(tmp_path, after, max_epochs=4).fit(ConvModule(), fits.loader(), ckpt_path=tmp_path / "last.ckpt")


def test_checkpoint_of_another_callback__beside_its_own_error(tmp_path: Path) -> None:
    """A state of its own that is not pruned does not have it prune what another one has pruned."""
    run = fits.trainer(tmp_path, Renamed(sparsity=0.8), max_epochs=2)
    run.fit(ConvModule(), fits.loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    after = fits.drive()
    saved["callbacks"][after.state_key] = after.state_dict()
    torch.save(saved, tmp_path / "both.ckpt")
    with (
        pytest.warns(UserWarning, match="Please add the following callbacks"),
        pytest.raises(ValueError, match=r"DRIVEPruningCallback can only take over .* pruned by Renamed"),
    ):
        fits.trainer(tmp_path, after, max_epochs=4).fit(ConvModule(), fits.loader(), ckpt_path=tmp_path / "both.ckpt")
