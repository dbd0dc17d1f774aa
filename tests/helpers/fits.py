"""Small but real fits: a module with everything that scoring could disturb, its data, and a quiet Trainer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import models
import torch
import torch.nn.functional as F
from optimizers import Orthogonal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_drive import DRIVEPruningCallback, GradualPruningCallback, IMPPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback

NUM_CLASSES = 4


def dataset(num_samples: int = 48, seed: int = 0) -> TensorDataset:
    """Images of 8x8 whose brightest quadrant is their class: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_samples, 1, 8, 8, generator=generator)
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
    return TensorDataset(images, labels)


def loader(num_samples: int = 48, batch_size: int = 16, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset(num_samples), batch_size=batch_size, **kwargs)


class ConvModule(pl.LightningModule):
    """Convolution, BatchNorm, Dropout, a metric and logging, in one small classifier."""

    def __init__(self, optimizer: str = "sgd", dropout: float = 0.0, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimizer, self.lr = optimizer, lr
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1)
        )
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8 * 16, NUM_CLASSES)
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)
        self.calls: list[Tensor] = models.Record()

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.features(images)))
        return self.head(self.dropout(features.flatten(1)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.calls.append(images[:, 0, 0, 0].detach().clone())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(16)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.parameters()
        return {
            "sgd": lambda: torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=1e-2),
            "nesterov": lambda: torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=1e-2, nesterov=True),
            "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-1),
            "rmsprop": lambda: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-2, centered=True),
            "adagrad": lambda: torch.optim.Adagrad(parameters, lr=1e-2, weight_decay=1e-2),
        }[self.optimizer]()


class BiaslessMLP(pl.LightningModule):
    """Only matrices, and an optimizer that moves every weight of one in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 24, bias=False), nn.Linear(24, NUM_CLASSES, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(F.relu(self.first(images.flatten(1))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Orthogonal(self.parameters())


class Manual(ConvModule):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class SaveEpochs(pl.Callback):
    """Saves a checkpoint at the end of each epoch: `0.ckpt`, `1.ckpt` and so on."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.current_epoch}.ckpt")


def loss_fn(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def trainer(tmp_path: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | kwargs))


def fit(
    folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, ckpt_path: Path | None = None, **settings: Any
) -> pl.Trainer:
    """Train on `loader()`, and return the Trainer."""
    running = trainer(folder, *callbacks, **settings)
    running.fit(module, loader(), ckpt_path=ckpt_path)
    return running


def drive(**kwargs: Any) -> DRIVEPruningCallback:
    settings: dict[str, Any] = {"sparsity": 0.8, "warmup_epochs": 2, "rounds": 5}
    return DRIVEPruningCallback(**(settings | kwargs))


def gradual(**kwargs: Any) -> GradualPruningCallback:
    settings: dict[str, Any] = {"sparsity": 0.8, "start_epoch": 1, "end_epoch": 2, "cuts_per_epoch": 3}
    return GradualPruningCallback(**(settings | kwargs))


PRUNABLE = ("features.0.weight", "features.4.weight", "head.weight")  # of `ConvModule`
NUM_PRUNABLE = 6 * 9 + 8 * 6 * 9 + 8 * 16 * 4
NUM_KEPT = 200  # at a sparsity of 0.8
LAST_CUT = 2  # epoch, of the callbacks below
NUM_KEPT_IN = {  # epochs 0 to 3
    "DRIVE": (998, 998, 200, 200),
    "IMP": (998, 446, 200, 200),
    "Gradual": (998, 299, 200, 200),
    "Gradual_by_drive": (998, 299, 200, 200),
}
CALLBACKS: dict[str, Callable[..., PruningCallback]] = {
    "DRIVE": drive,
    "IMP": lambda **settings: IMPPruningCallback(**{"sparsity": 0.8, "cycles": 2, "epochs_per_cycle": 1, **settings}),
    "Gradual": lambda **settings: gradual(**{"start_epoch": 0, "cuts_per_epoch": 1, **settings}),
    "Gradual_by_drive": lambda **settings: gradual(
        **{"start_epoch": 0, "cuts_per_epoch": 1, "criterion": "drive", **settings}
    ),
}


def num_zeros(state: Mapping[str, Tensor]) -> int:
    """Count the zeros in the prunable parameters of a `ConvModule`."""
    return sum(int((state[name] == 0).sum()) for name in PRUNABLE)


def assert_pruned(callback: PruningCallback, module: nn.Module) -> None:
    """A `ConvModule` was pruned once and to the end, at the start of the right epoch, to the exact count."""
    assert callback.report is not None
    assert callback.report.epoch == LAST_CUT
    assert callback.masks.num_kept == NUM_KEPT == round(NUM_PRUNABLE * 0.2)
    assert callback.masks.hold_for(module)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal_states(first: Any, second: Any) -> bool:
    """Return whether nested states are equal bit for bit: keys, types, values, and signs of zeros."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        same_signs = torch.equal(torch.signbit(first), torch.signbit(second))
        return first.dtype == second.dtype and torch.equal(first, second) and same_signs
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(equal_states(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(equal_states, first, second))
    return bool(first == second)
