"""Modules and callbacks that keep copies of the network, as mean teachers and averages of one's own do."""

import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback


def mlp(width: int = 24) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, fits.NUM_CLASSES)
    )


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))  # type: ignore[no-any-return]


@torch.no_grad()
def move(means: Iterable[Tensor], now: Iterable[Tensor]) -> None:
    for mean, each in zip(means, now, strict=True):
        mean.lerp_(each, 0.1)


class Student(pl.LightningModule):
    """Trains `student`; what else it keeps, it says itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = mlp()

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.student.parameters(), 0.05)


class MeanTeacher(Student):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.student)

    def on_train_batch_end(self, *_: Any) -> None:
        move(self.teacher.parameters(), self.student.parameters())


class Averaged(Student):
    """With torch's average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.student)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.student)


class Ema(pl.Callback):
    """Keeps a copy of the module, made when training starts."""

    def __init__(self) -> None:
        self.average: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.average = self.copied(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        move(self.values(), pl_module.parameters())

    def copied(self, pl_module: pl.LightningModule) -> Any:
        return copy.deepcopy(pl_module)

    def values(self) -> Any:
        return self.average.parameters()


class EmaOfTensors(Ema):
    def copied(self, pl_module: pl.LightningModule) -> Any:
        return {name: each.detach().clone() for name, each in pl_module.named_parameters()}

    def values(self) -> Any:
        return self.average.values()


class Shadow:
    """As `torch_ema` keeps them."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.shadow_params = [each.detach().clone() for each in parameters]
        self.collected_params = None


class EmaInAnObject(Ema):
    def copied(self, pl_module: pl.LightningModule) -> Any:
        return Shadow(pl_module.parameters())

    def values(self) -> Any:
        return self.average.shadow_params


METHODS: dict[str, Callable[..., PruningCallback]] = {
    "DRIVE": lambda kind=DRIVEPruningCallback: kind(sparsity=0.8, warmup_epochs=1, rounds=4),
    "IMP": lambda kind=IMPPruningCallback: kind(sparsity=0.8, cycles=2, epochs_per_cycle=1),
}


def fit(folder: Path, module: Any, *callbacks: pl.Callback, **kwargs: Any) -> list[str]:
    """Train for three epochs; return what was said of copies."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fits.trainer(folder, *callbacks, **{"max_epochs": 3, **kwargs}).fit(module, fits.loader(), ckpt_path=ckpt_path)
    return [str(each.message) for each in caught if "has the same names and shapes as" in str(each.message)]
