"""Whole runs of 20 epochs, five of them dense: accelerated, dense, and sparse without acceleration."""

import time
from collections.abc import Callable
from statistics import mean

import lightning.pytorch as pl
import pytest
import torch
from benchmarks import images, measure, networks, trainers
from benchmarks.networks import Batch
from benchmarks.page import Figure
from benchmarks.pruned import MLP, RECIPES, TRANSFORMER
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_drive import DRIVEPruningCallback

EPOCHS, DENSE_EPOCHS, SPARSITY, ROUNDS = 20, 5, 0.98, 20
CASES = [(MLP, 128, 10_000, 2), (TRANSFORMER, 16, 320, 1)]
"""Network, batch size, the most images to train on, and repeats."""
DENSE, MASKED = "a dense run", "a sparse run without acceleration"


class Classifier(pl.LightningModule):
    """Trains a network by the optimizer of its recipe."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.recipe = networks.NETWORKS[name](), RECIPES[name]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return networks.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.recipe.optimizer(self)

    def accuracy(self, batch: Batch) -> float:
        inputs, labels = batch
        with torch.no_grad():
            predictions = self.network.eval()(inputs).argmax(1)
        return (predictions == labels).float().mean().item()


class Runs:
    """Repeats a whole run, and notes the accuracy of each.

    Args:
        name: The network.
        batch_size: Of training.
        size: The most images to train on.
        make_callbacks: Makes the callbacks of each run.

    """

    def __init__(self, name: str, batch_size: int, size: int, make_callbacks: Callable[[], list[pl.Callback]]) -> None:
        self.name, self.batch_size, self.size, self.make_callbacks = name, batch_size, size, make_callbacks
        self.seconds: list[float] = []
        self.accuracies: list[float] = []

    def run(self) -> None:
        module, data = Classifier(self.name), images.load(self.size)
        dataset = TensorDataset(*(tensor[: self.size] for tensor in data.train))
        loader = DataLoader(dataset, self.batch_size, shuffle=True, drop_last=True)
        trainer = trainers.trainer(*self.make_callbacks(), max_epochs=EPOCHS)
        begin = time.perf_counter()
        trainer.fit(module, loader)
        self.seconds.append(time.perf_counter() - begin)
        self.accuracies.append(module.accuracy(data.test))


def drive(accelerate: bool) -> list[pl.Callback]:
    settings = {"accelerate": True} if accelerate else {}
    return [
        DRIVEPruningCallback(sparsity=SPARSITY, warmup_epochs=DENSE_EPOCHS, rounds=ROUNDS, bn_batches=0, **settings)  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(("name", "batch_size", "size", "repeats"), CASES)
def test_whole_run(figure: Callable[..., Figure], name: str, batch_size: int, size: int, repeats: int) -> None:
    ours = Runs(name, batch_size, size, lambda: drive(accelerate=True))
    peers = {
        DENSE: Runs(name, batch_size, size, list),
        MASKED: Runs(name, batch_size, size, lambda: drive(accelerate=False)),
    }
    with measure.threads(1):
        for _ in range(repeats):
            for runs in (ours, *peers.values()):
                runs.run()
    accuracies = ", ".join(
        f"{100 * mean(runs.accuracies):.1f} % ({what})"
        for what, runs in {"accelerated": ours, "dense": peers[DENSE], "sparse": peers[MASKED]}.items()
    )
    data = images.load(size)
    figure(
        "whole runs",
        f"{name}, batches of {batch_size}",
        "s",
        lambda: (ours.seconds, {peer: runs.seconds for peer, runs in peers.items()}),
        goal=0.55,
        note=f"test accuracy {accuracies}; {data.name} ({min(size, len(data.train[1])):,} to train on),"
        f" {EPOCHS} epochs, {DENSE_EPOCHS} of them dense, DRIVE at {100 * SPARSITY:g} % in {ROUNDS} rounds, 1 thread,"
        " seed 0",
    )
