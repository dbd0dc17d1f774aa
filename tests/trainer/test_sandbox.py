"""Scoring takes batches and losses from a running Trainer, and the run never notices."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from fits import ConvModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall

from lightning_drive.trainer.training_step import free_gradients


class Recorder(ConvModule):
    """Counts everything that scoring could leave behind: metrics with shared and list states, logs of all kinds."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.metrics = MetricCollection(
            {"precision": MulticlassPrecision(fits.NUM_CLASSES), "recall": MulticlassRecall(fits.NUM_CLASSES)}
        )
        self.auroc = MulticlassAUROC(fits.NUM_CLASSES)
        self.trained: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        logits = self(batch[0])
        self.metrics.update(logits, batch[1])
        self.auroc.update(logits, batch[1])
        self.log_dict({"batch": float(batch_idx), "logit": logits.mean()})
        if self.logger is not None:
            self.logger.log_metrics({"direct": batch_idx}, step=batch_idx)
        return loss

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.trained.append(batch[0][:, 0, 0, 0].clone())

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute())
        self.log("auroc", self.auroc.compute())
        self.metrics.reset()
        self.auroc.reset()


@pytest.mark.parametrize("warmup_epochs", [0, 1])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_fit_is_bitwise_the_same(tmp_path: Path, warmup_epochs: int, num_workers: int) -> None:
    """Up to the pruning itself (here: none, sparsity 0) a fit with scoring is bit for bit the one without it.

    Shuffled loader with a generator of its own, persistent workers, Dropout, BatchNorm, metrics, momentum.
    """
    states, batches, logs = [], [], []
    for callbacks in ([], [fits.drive(sparsity=0.0, warmup_epochs=warmup_epochs, rounds=7, bn_batches=0)]):
        pl.seed_everything(3, verbose=False)
        loader = fits.loader(
            shuffle=True,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(1),
        )
        logger = pl.loggers.CSVLogger(tmp_path, name=f"{len(callbacks)}")
        module = Recorder()
        fits.trainer(tmp_path, *callbacks, logger=logger, max_epochs=3).fit(module, loader)
        states.append(fits.state_of(module))
        batches.append(torch.cat(module.trained))
        rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
        header = rows[0].split(",")
        columns = [column for column, name in enumerate(header) if not name.startswith("pruning/")]
        table = [[row.split(",")[column] for column in columns] for row in rows]
        logs.append([row for row in table if any(row[2:]) or row == table[0]])
    assert fits.equal_states(*states)
    assert torch.equal(*batches)
    assert len(batches[0]) == 3 * 48
    values = [[dict(zip(log[0], row, strict=True)) for row in log[1:]] for log in logs]
    kept = [
        [{name: value for name, value in row.items() if value and name not in ("step", "epoch")} for row in rows]
        for rows in values
    ]
    assert [row for row in kept[0] if row] == [row for row in kept[1] if row]


class Stream(IterableDataset[Any]):
    """An endless-looking stream without a length, restarted by each ``iter``."""

    def __init__(self, num_batches: int = 4) -> None:
        self.num_batches = num_batches

    def __iter__(self) -> Iterator[Any]:
        return (sample for index, sample in enumerate(fits.dataset(16 * self.num_batches)) if index >= 0)


class Reiterable:
    """Not a DataLoader, but it gives batches."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(fits.loader()))


def two_loaders(shape: str, mode: str) -> Any:
    first, second = fits.loader(48), fits.loader(32)
    loaders = {"dict": {"a": first, "b": second}, "list": [first, second]}[shape]
    return CombinedLoader(loaders, mode)


class PairModule(ConvModule):
    """Trains on a pair of batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = batch.values() if isinstance(batch, dict) else batch
        self.calls.append(first[0][:, 0, 0, 0].clone())
        return F.cross_entropy(self(first[0]), first[1]) + (
            0.0 if second is None else F.cross_entropy(self(second[0]), second[1])
        )


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (ConvModule, lambda: fits.loader()),
        (ConvModule, lambda: fits.loader(num_workers=1, persistent_workers=True)),
        (ConvModule, lambda: fits.loader(num_workers=2)),
        (ConvModule, lambda: DataLoader(Stream(), batch_size=16)),
        (ConvModule, lambda: DataLoader(Stream(), batch_size=16, num_workers=1, persistent_workers=True)),
        (ConvModule, lambda: Reiterable()),
        (PairModule, lambda: {"a": fits.loader(48), "b": fits.loader(32)}),
        (PairModule, lambda: [fits.loader(48), fits.loader(32)]),
        (PairModule, lambda: two_loaders("dict", "min_size")),
        (PairModule, lambda: two_loaders("list", "max_size")),
    ],
    ids=[
        "plain",
        "persistent",
        "workers",
        "stream",
        "stream_in_worker",
        "any_iterable",
        "dict",
        "list",
        "min_size",
        "max_size",
    ],
)
@pytest.mark.parametrize("warmup_epochs", [0, 1])
def test_training_batches(tmp_path: Path, module: Any, data: Any, warmup_epochs: int) -> None:
    """Scoring reads the loader's own order from its first batch, cycled, and training loses none of its batches."""
    plain = module()
    fits.trainer(tmp_path, max_epochs=2).fit(plain, data())
    trained = [batch.tolist() for batch in plain.calls]
    epoch = trained[: len(trained) // 2]

    scored = module()
    rounds = len(epoch) + 2
    callback = fits.drive(warmup_epochs=warmup_epochs, rounds=rounds, bn_batches=0)
    fits.trainer(tmp_path, callback, max_epochs=2).fit(scored, data())
    calls = [batch.tolist() for batch in scored.calls]
    start = warmup_epochs * len(epoch)
    assert calls[start : start + rounds] == (epoch + epoch)[:rounds]
    assert calls[:start] + calls[start + rounds :] == trained
    assert callback.pruned


def test_training_batches__limit(tmp_path: Path) -> None:
    """``limit_train_batches`` holds for scoring, too."""
    module = ConvModule()
    callback = fits.drive(warmup_epochs=0, rounds=4, bn_batches=0)
    fits.trainer(tmp_path, callback, max_epochs=1, limit_train_batches=2).fit(module, fits.loader())
    first, second = module.calls[0].tolist(), module.calls[1].tolist()
    assert [call.tolist() for call in module.calls] == [first, second] * 3


def test_training_batches__transfer_hooks(tmp_path: Path) -> None:
    """A module that moves or augments its batches on the way does so for scoring as well."""

    class Doubled(ConvModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 1, batch[1]

    module = Doubled()
    fits.trainer(tmp_path, fits.drive(warmup_epochs=0, rounds=1, bn_batches=0), max_epochs=1).fit(module, fits.loader())
    assert torch.equal(module.calls[0], next(iter(fits.loader()))[0][:, 0, 0, 0] * 2 + 1)


class Spent(IterableDataset[Any]):
    """A stream that can be read only once."""

    def __init__(self) -> None:
        self.samples = iter(fits.dataset())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.samples)


def test_training_batches__iterator_error(tmp_path: Path) -> None:
    """Reading ahead in a stream that cannot be restarted would take batches away from training: refused."""
    with pytest.raises(MisconfigurationException, match=r"\(Spent\) is an iterator: .*`num_workers=1`"):
        fits.trainer(tmp_path, fits.drive(warmup_epochs=0)).fit(ConvModule(), DataLoader(Spent(), batch_size=16))


def test_resuming_calls_no_extra_training_step(tmp_path: Path) -> None:
    """A resumed sparse run trains on what remains, and on nothing else."""
    running = fits.trainer(tmp_path, fits.drive(), max_epochs=3)
    running.fit(ConvModule(), fits.loader())
    running.save_checkpoint(tmp_path / "sparse.ckpt")
    module = ConvModule()
    fits.trainer(tmp_path, fits.drive(), max_epochs=4).fit(module, fits.loader(), ckpt_path=tmp_path / "sparse.ckpt")
    assert len(module.calls) == 3


def test_sandbox__instance_log_is_kept(tmp_path: Path) -> None:
    """A ``log`` that somebody has put on the instance is there again afterwards, and was silent in between."""
    module, logged = ConvModule(), []
    module.log = lambda name, *args, **kwargs: logged.append(name)  # type: ignore[method-assign]
    callback = fits.drive(warmup_epochs=0, bn_batches=0)
    fits.trainer(tmp_path, callback, max_epochs=1, limit_val_batches=0).fit(module, fits.loader())
    assert logged.count("train_loss") == 3


def test_metrics_and_mode_in_one_module(tmp_path: Path) -> None:
    """Metrics that were updated before pruning in the same epoch keep exactly what they had."""

    class Eager(ConvModule):
        def on_train_epoch_start(self) -> None:
            self.accuracy.update(torch.eye(fits.NUM_CLASSES), torch.arange(fits.NUM_CLASSES))

    class Early(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.accuracy.update(torch.eye(fits.NUM_CLASSES), torch.arange(fits.NUM_CLASSES))

    class Late(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self.value = pl_module.accuracy.compute().item()
            self.count = pl_module.accuracy.tp.sum().item()
            pl_module.accuracy.reset()

    late = Late()
    callback = fits.drive(warmup_epochs=0)
    fits.trainer(tmp_path, Early(), callback, late, max_epochs=1).fit(ConvModule(), fits.loader())
    assert callback.pruned
    assert (late.value, late.count) == (1.0, fits.NUM_CLASSES)
    assert isinstance(ConvModule().accuracy, MulticlassAccuracy)


class OwnZeroGrad(ConvModule):
    """Counts on gradients that are still there."""

    def optimizer_zero_grad(self, *args: Any) -> None:
        super().optimizer_zero_grad(*args)


class ManualGradients(ConvModule):
    """Optimizes as it likes, and clears gradients when it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))


@pytest.mark.parametrize(("make", "are_kept"), [(ConvModule, False), (OwnZeroGrad, True), (ManualGradients, True)])
def test_free_gradients(make: type[ConvModule], are_kept: bool, tmp_path: Path) -> None:
    """Scoring needs no room beside gradients that Lightning is about to drop; all others are left alone."""
    module = make()
    module.unused = torch.nn.Parameter(torch.ones(2))  # of no optimizer
    frees: list[set[str]] = []

    class Free(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                module.unused.grad = torch.ones(2)
                before = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
                free_gradients(trainer, pl_module)
                frees.append({name for name in before if module.get_parameter(name).grad is None})

    optimized = {name for name, _ in module.named_parameters()} - {"unused"}
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
        [module.get_parameter(name) for name in sorted(optimized)], lr=0.01
    )
    fits.trainer(tmp_path, Free(), max_epochs=2, limit_val_batches=0).fit(module, fits.loader())
    assert frees == [set() if are_kept else optimized]


def test_free_gradients__of_a_callback(tmp_path: Path) -> None:
    """The callback that prunes lets go of them before it scores, so that none come back after it."""
    there: list[bool] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            there.append(any(parameter.grad is not None for parameter in pl_module.parameters()))

    callbacks = Watch(), fits.drive(warmup_epochs=1), Watch()
    fits.trainer(tmp_path, *callbacks, max_epochs=2, limit_val_batches=0).fit(ConvModule(), fits.loader())
    assert there == [False, False, True, False]
