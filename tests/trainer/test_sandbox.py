"""Scoring runs the training step of a running Trainer, and the run never notices."""

from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from fits import ConvModule
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall


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
