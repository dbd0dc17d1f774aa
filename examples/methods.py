r"""Compare pruning methods fairly: from the same start, on the same data, with the same number of epochs at the end.

    python examples/methods.py                                        # scikit-learn's digits
    python examples/methods.py --data DIR --train-images 10000 --test-images 5000 --epochs 10 --rounds 20 \
        --sparsity 0.98 0.993 --results runs.jsonl --output methods.png                            # CIFAR-10

Every network that is tested has trained for `--epochs` epochs under one learning-rate schedule. DRIVE's dense epochs
are among them; the cycles in which IMP looks for its masks are not, and the column "epochs" counts them, too. The
networks are small: that of `digits.py`, and for CIFAR-10 four convolutions with 390,496 weights that can be pruned.
SNIP takes one round and one batch, SynFlow 100 rounds without data; "magnitude" keeps the largest initial weights.

With `--results`, each finished run is added to a file, and none that is there is done again: an interrupted comparison
goes on where it was. `--show` prints the table of what is there so far.

The settings are ours, not those of the papers, which train larger networks for much longer.
"""

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from cifar10 import DEVICE, ImageClassifier, batches, load_images
from comparison import GREY, STYLES
from digits import DigitClassifier, load_data
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

from lightning_drive import DRIVEPruningCallback, IMPPruningCallback, Magnitude, SNIPPruningCallback
from lightning_drive import SynFlowPruningCallback as SynFlowPruningCallback
from lightning_drive.pruning import PruningCallback
from lightning_drive.warmup import WarmupPruningCallback

METHODS = {
    "dense": "dense",
    "magnitude": "magnitude",
    "snip": "SNIP",
    "synflow": "SynFlow",
    "drive": "DRIVE",
    "imp": "IMP",
}
STYLE_OF = dict(zip(list(METHODS)[1:], STYLES))  # the same colour and marker, whichever methods are compared

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One network, trained and tested: a line of the results file.

    Args:
        settings: All that the run depends on: the method and its own settings, the data, the seed, ...
        accuracy: Fraction of the test images that the network recognises.
        num_weights: Number of weights that pruning may remove.
        num_kept: Number of weights that are left.
        effective_sparsity: Fraction removed or cut off; ``None`` if dense, or if it could not be measured.
        epochs: All epochs trained, those of IMP's cycles included.
        pruning_seconds: Time for finding masks, without the training that comes before.
        training_seconds: Time for everything else in ``trainer.fit``.

    """

    settings: Settings
    accuracy: float
    num_weights: int
    num_kept: int
    effective_sparsity: float | None
    epochs: int
    pruning_seconds: float
    training_seconds: float

    @property
    def method(self) -> str:
        return METHODS[self.settings["method"]]


# What to train on, and which network.


@dataclass(frozen=True)
class Task:
    network: Callable[[], pl.LightningModule]
    train_data: TensorDataset
    test_data: TensorDataset
    accelerator: str


class SmallImageClassifier(ImageClassifier):
    """The classifier of `cifar10.py`, but with four convolutions in place of the ResNet-18."""

    def __init__(self) -> None:
        super().__init__(width=1)
        self.network = four_convolutions()


def four_convolutions() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if outputs < 256 else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers)


def load(options: argparse.Namespace) -> Task:
    if options.data:
        train_data = load_images(options.data, "train", options.download, limit=options.train_images)
        test_data = load_images(options.data, "test", options.download, limit=options.test_images)
        task = Task(SmallImageClassifier, train_data, test_data, DEVICE.type)
    else:
        torch.set_num_threads(1)  # layers this small gain nothing from more
        train_data, test_data = load_data()
        train_data = TensorDataset(*train_data[: options.train_images])
        task = Task(DigitClassifier, train_data, TensorDataset(*test_data[: options.test_images]), "cpu")
    if options.batch_size > len(task.train_data):
        sys.exit(f"--batch-size {options.batch_size} is more than the {len(task.train_data):,} training images.")
    return task


# Which runs there are, and one of them.


def all_settings(options: argparse.Namespace) -> list[Settings]:
    """List the settings of all runs: seed by seed, so that an unfinished comparison is one of fewer seeds."""
    found: list[Settings] = []
    for seed in options.seeds:
        for method in options.methods:
            common = {"method": method, "seed": seed, "data": "CIFAR-10" if options.data else "digits"}
            common |= {name: getattr(options, name) for name in ("train_images", "test_images", "batch_size", "epochs")}
            if method == "dense":
                found.append(common)
            else:
                found += [{**common, **own_settings(method, sparsity, options)} for sparsity in options.sparsity]
    return found


def own_settings(method: str, sparsity: float, options: argparse.Namespace) -> Settings:
    settings: dict[str, Any] = {"sparsity": sparsity, "control": options.control}
    if method == "drive":
        settings |= {"warmup_epochs": options.warmup_epochs, "rounds": options.rounds}
    if method == "imp":
        cycles = options.cycles or max(1, round(-math.log(1 - sparsity)))  # each keeps about 1/e of the weights
        settings |= {"cycles": cycles, "epochs_per_cycle": options.epochs_per_cycle}
    return settings


def pruning_callback(settings: Settings) -> PruningCallback:
    own = {name: settings[name] for name in OWN_SETTINGS if name in settings}
    if settings["method"] == "magnitude":
        return magnitude_at_initialisation(**own)
    constructors = {
        "snip": SNIPPruningCallback,
        "synflow": SynFlowPruningCallback,
        "drive": DRIVEPruningCallback,
        "imp": IMPPruningCallback,
    }
    return constructors[settings["method"]](**own)
