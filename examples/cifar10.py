r"""Compare a dense ResNet-18 with ones pruned by DRIVE, on CIFAR-10.

    python examples/cifar10.py --data DIR --download                     # fetches CIFAR-10 (170 MB) into DIR
    python examples/cifar10.py --data DIR --network convnet --train-images 5000 --sparsity 0 0.98 --epochs 6 \
        --warmup-epochs 2                                                # a small network: minutes on a CPU

`DIR` is either where torchvision keeps its CIFAR-10, or a tree of images, `DIR/train/<class>/*` and
`DIR/test/<class>/*`. Networks and data are those of `paper/`, which also has the paper's own experiments. The settings
here are our own; the paper trains for 200 epochs from a learning rate of 0.01.

Measured on 2026-11-25 with Python 3.11, torch 2.14 and Lightning 2.6.6, on two very busy cores of an AMD EPYC: the
second command took 4 minutes of processor time with seed 0 on CIFAR-10 stored as JPEG. The dense small network
recognises 54.5 % of the test images, and 49.7 % with 2 % of its weights. One seed means little after such a short
training. We have not measured the first command, nor a GPU.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from comparison import Result, print_table, save_figure, save_pictures
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from paper.images import CIFAR10, Images, ImageTree
from paper.networks import Network, build
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_drive import DRIVEPruningCallback


class ImageClassifier(pl.LightningModule):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = build(network, num_classes=10)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def load(options: argparse.Namespace) -> Images:
    settings = {"batch_size": options.batch_size, "train_images": options.train_images}
    if (options.data / "train").is_dir():
        return ImageTree(options.data, **settings)
    return CIFAR10(options.data, download=options.download, **settings)


def train(sparsity: float, data: Images, options: argparse.Namespace) -> Result:
    """Train one network and test it; a sparsity of 0 means dense."""
    name = f"DRIVE, {100 * sparsity:g}% sparse" if sparsity else "dense"
    print(f"Training for {options.epochs} epochs: {name}")
    pl.seed_everything(options.seed, verbose=False)
    model = ImageClassifier(options.network)
    pruning = DRIVEPruningCallback(sparsity=sparsity, warmup_epochs=options.warmup_epochs, rounds=options.rounds)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[pruning] if sparsity else [],
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    metrics = trainer.test(model, datamodule=data, verbose=False)
    return Result(
        network=name,
        accuracy=metrics[0]["test_accuracy"],
        num_weights=sum(weight.numel() for weight in model.parameters() if weight.ndim > 1),  # no biases, no norms
        seconds=seconds,
        report=pruning.report,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compare dense and pruned networks on CIFAR-10.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 into that folder if it is not there")
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.0, 0.9, 0.95, 0.98], help="fractions to remove; 0 is dense"
    )
    parser.add_argument("--network", choices=["resnet18", "vgg16", "alexnet", "convnet"], default="resnet18")
    parser.add_argument("--epochs", type=int, default=50, help="number of epochs, dense and sparse together")
    parser.add_argument("--warmup-epochs", type=int, default=5, help="dense epochs before pruning")
    parser.add_argument("--rounds", type=int, default=100, help="pruning rounds, one batch each")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-images", type=int, help="number of images to train on; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for a figure, such as cifar10.png")
    options = parser.parse_args(argv)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning 2.6 with torch 2.15
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the images are in memory
    warnings.filterwarnings("ignore", message=".*have no `validation_step`")  # networks are tested once, at the end

    data = load(options)
    try:
        data.prepare_data()
    except MisconfigurationException as error:
        sys.exit(f"{error}")
    results = [train(sparsity, data, options) for sparsity in options.sparsity]
    print_table(results)
    if options.output:
        save_figure(results, f"{options.network} on CIFAR-10", options.output)
        if any(result.report for result in results):
            save_pictures(results, options.output)


if __name__ == "__main__":
    main()
