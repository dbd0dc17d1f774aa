"""Runs that are saved or interrupted at any call into the package, and all that two equal runs have in common."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_drive
from lightning_drive import (
    DRIVEPruningCallback,
    GradualPruningCallback,
    IMPPruningCallback,
    KeepZerosCallback,
    Random,
    SynFlowPruningCallback,
    find_masks,
)

PACKAGE = str(Path(lightning_drive.__file__).parent)
EPOCHS = 4
CALLBACKS: dict[str, Callable[[], Any]] = {
    "DRIVE": lambda: DRIVEPruningCallback(sparsity=0.8, warmup_epochs=1, rounds=3, bn_batches=2),
    "DRIVE_reinit": lambda: DRIVEPruningCallback(sparsity=0.8, warmup_epochs=2, rounds=2, control="reinit"),
    "SynFlow": lambda: SynFlowPruningCallback(sparsity=0.8, warmup_epochs=1, rounds=3, bn_batches=2),
    "IMP": lambda: IMPPruningCallback(sparsity=0.8, cycles=2, epochs_per_cycle=1),
    "KeepZeros": lambda: KeepZerosCallback(masks=find_masks(Net(), Random(seed=2), sparsity=0.8)),
    "Gradual": lambda: GradualPruningCallback(sparsity=0.8, start_epoch=0, end_epoch=2, cuts_per_epoch=2),
    "Gradual_by_drive": lambda: GradualPruningCallback(
        sparsity=0.8, start_epoch=0, end_epoch=2, cuts_per_epoch=2, criterion="drive", bn_batches=2
    ),
}


class Net(pl.LightningModule):
    """Has an alias, BatchNorm, momentum, a learning-rate schedule, and state of its own in a list and a counter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
        self.head = self.net[-1]
        self.losses: list[Tensor] = []
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        self.steps += 1
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # A score that is perfect for dense networks: the best of all epochs shows whether tracking began again.
        self.log("score", float((self.net[0].weight == 0).float().mean()) + 0.01 * self.current_epoch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


def loader(num_batches: int = 2) -> DataLoader[Any]:
    """Batches that are all the same: a run that is resumed in an epoch gets the first one again."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    labels = x[:, :3].argmax(1)
    return DataLoader(TensorDataset(x.repeat(num_batches, 1), labels.repeat(num_batches)), batch_size=8)


class Calls:
    """Does something at one call into the package, counted while the pruning callback has its turn."""

    def __init__(self, at: int | None = None, act: Callable[[pl.Trainer], None] = lambda _: None) -> None:
        self.at, self.act = at, act
        self.names: list[str] = []
        self.trainer: Any = None

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.names.append(frame.f_code.co_name)
            if len(self.names) - 1 == self.at:
                sys.setprofile(None)
                self.act(self.trainer)
                sys.setprofile(self)


class Hook(pl.Callback):
    """Begins to count where the pruning callback, behind it, begins."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.calls.trainer = trainer
        sys.setprofile(self.calls)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.calls.trainer = trainer
        sys.setprofile(self.calls)


class Unhook(pl.Callback):
    """Ends counting when the pruning callback, before it, is through, and knows what BatchNorm has then."""

    def __init__(self) -> None:
        self.statistics: list[list[Tensor]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        sys.setprofile(None)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        sys.setprofile(None)
        self.statistics.append([buffer.clone() for buffer in pl_module.buffers()])


class Run:
    """One fit, and all that two equal runs have in common at their end."""

    def __init__(
        self,
        pruning: Any,
        folder: Path,
        calls: Calls,
        ckpt_path: Path | None = None,
        *,
        make: type[Net] = Net,
        num_batches: int = 2,
    ) -> None:
        self.pruning, self.calls, self.model = pruning, calls, make()
        unhook = Unhook()
        best = ModelCheckpoint(folder, filename="best-{epoch}", monitor="score", mode="min")
        callbacks = [Hook(calls), pruning, unhook, best, OnExceptionCheckpoint(folder, "exception")]
        self.trainer = fits.trainer(folder, *callbacks, max_epochs=EPOCHS)
        data = loader(num_batches)
        try:
            self.trainer.fit(self.model, data, data, ckpt_path=ckpt_path)
        finally:
            sys.setprofile(None)
        self.end = {
            **fits.state_of(self.model),
            "best": Path(best.best_model_path).stem.partition("-v")[0],
            "masks": pruning.masks.digest(),
            "statistics": unhook.statistics[-1:],
            "rate": self.trainer.optimizers[0].param_groups[0]["lr"],
        }

    def differences(self, other: "Run") -> list[str]:
        return [name for name, value in self.end.items() if not fits.equal_states(value, other.end[name])]


def places(calls: Calls, number: int) -> list[int]:
    """Return some places among the calls: two thirds spread over all, one third over the few that put masks on."""
    last = len(calls.names) - 20  # another run may take some calls less, where something is cached
    first_of_commit, end_of_commit = (
        (calls.names.index(name) for name in ("_commit", "_announce")) if "_commit" in calls.names else (0, last)
    )
    in_commit = number // 3
    over_all = number - in_commit
    within = (end_of_commit - first_of_commit) / (in_commit + 1)
    return sorted(
        {round(last * index / max(1, over_all - 1)) for index in range(over_all)}
        | {first_of_commit + round(within * (index + 1)) for index in range(in_commit)}
    )


class Interrupt(BaseException):
    """What no handler takes for an ordinary error."""


def interrupt(_: pl.Trainer) -> None:
    raise Interrupt
