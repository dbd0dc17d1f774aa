"""Real Trainers whose steps are timed: dense, pruned by us, and pruned by Lightning's own `ModelPruning`."""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from benchmarks import networks
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_drive import SNIPPruningCallback
from lightning_drive.network import prunable

SPARSITY = 0.98


class Module(pl.LightningModule):
    """Trains a network on noise: one step in epoch 0, ``steps`` in every epoch after it."""

    def __init__(self, name: str, batch_size: int, steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = networks.NETWORKS[name]()
        self.batches = networks.batches(batch_size, networks.pixels_of(name))
        self.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: networks.Batch, batch_idx: int) -> Tensor:
        return networks.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        steps = self.steps if self.current_epoch else 1
        batches = (self.batches * steps)[:steps]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class StepTimes(pl.Callback):
    """Notes when every step of epoch 1 begins."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 1:
            self.begins.append(time.perf_counter())


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    """Make a quiet Trainer, in which epoch 0 has one step."""
    return pl.Trainer(
        **{"max_epochs": 2, **settings},
        callbacks=list(callbacks),
        accelerator="cpu",
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def seconds_per_step(module: Module, callbacks: Sequence[pl.Callback]) -> float:
    """Fit, and take the median time from one step of epoch 1 to the next, with all that Lightning does in between."""
    times = StepTimes()
    trainer(times, *callbacks).fit(module)
    return median(end - begin for begin, end in zip(times.begins, times.begins[1:], strict=False))


def ours(sparsity: float = SPARSITY, **settings: Any) -> pl.Callback:
    return SNIPPruningCallback(sparsity=sparsity, warmup_epochs=1, bn_batches=0, **settings)


def model_pruning(module: nn.Module) -> pl.Callback:
    """Make Lightning's callback, which prunes the same parameters to the same sparsity at the end of epoch 0."""
    places = [name.rpartition(".") for name in prunable.prunable_parameters(module)]
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.get_submodule(owner), name) for owner, _, name in places],
        amount=SPARSITY,
        apply_pruning=lambda epoch: epoch == 0,
        use_lottery_ticket_hypothesis=False,
    )
