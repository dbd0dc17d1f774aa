r"""Compare a dense ResNet-18 with ones pruned by DRIVE, on CIFAR-10.

    python examples/cifar10.py --data DIR --download                     # fetches CIFAR-10 (170 MB) into DIR
    python examples/cifar10.py --data DIR --train-images 5000 --width 16 --batch-size 64 \
        --sparsity 0 0.98 --epochs 6 --warmup-epochs 2                   # minutes on a CPU

`DIR` is either where torchvision keeps its CIFAR-10, or a tree of images, `DIR/train/<class>/*.jpg` and
`DIR/test/<class>/*.jpg`. All images are decoded once and stay in memory, on the GPU if there is one, so that an epoch
costs little more than its arithmetic. The network is torchvision's ResNet-18 with the usual changes for small images:
a 3x3 first convolution with stride 1 and no max-pooling.

The settings are ours, not the paper's, which trains for 200 epochs from a learning rate of 0.01.

Measured on 2026-11-22 with Python 3.11, torch 2.15 and Lightning 2.6.6: the second command, on one busy core of an
AMD EPYC, took 11 minutes (7 of processor time) with seed 0 on CIFAR-10 stored as JPEG. Dense, the narrow network
recognises 47.6 % of the test images; with 2 % of its weights, 43.6 %. One seed says little after so short a training:
a run that differs only in the order of additions gave 51.1 and 45.7 %. The first command, and a GPU, are not measured.
"""

import argparse
import logging
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from comparison import Result, print_table, save_figure
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import PILToTensor
from torchvision.transforms.v2.functional import normalize

from lightning_drive import DRIVEPruningCallback

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of CIFAR-10's training pixels, in [0, 1]


# The data: tensors of uint8 images, from which whole batches are taken at once.


def load_images(folder: Path, split: str, download: bool, limit: int | None = None) -> TensorDataset:
    """Decode the images of "train" or "test" in random order, and only as many of them as the limit says."""
    dataset: ImageFolder | CIFAR10
    if (folder / split).is_dir():
        dataset = ImageFolder(str(folder / split), transform=PILToTensor())
    elif download or (folder / CIFAR10.base_folder).is_dir():
        dataset = CIFAR10(str(folder), train=split == "train", download=download, transform=PILToTensor())
    else:
        sys.exit(
            f"There is no CIFAR-10 in {folder}: neither {CIFAR10.base_folder}/, as torchvision stores it, nor {split}/"
            " with a folder of images for each class. Name another folder by --data, or add --download to fetch it."
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))  # the same for every --seed
    images, labels = zip(*(dataset[index] for index in order[:limit].tolist()), strict=True)
    return TensorDataset(torch.stack(images).to(DEVICE), torch.tensor(labels).to(DEVICE))


def batches(data: TensorDataset, batch_size: int, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    """Give batches; each is one indexing operation, so that there is nothing to do for worker processes."""
    order = RandomSampler(data) if shuffle else SequentialSampler(data)
    return DataLoader(data, sampler=BatchSampler(order, batch_size, drop_last=shuffle), batch_size=None)


def augment(images: Tensor, padding: int = 4) -> Tensor:
    """Shift every image by up to `padding` pixels in both directions, and mirror about half of them."""
    device = images.device
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1, 1), device=device)
    rows = top + torch.arange(height, device=device)[:, None]
    columns = left + torch.arange(width, device=device)
    each = torch.arange(count, device=device)[:, None, None]
    shifted = F.pad(images, [padding] * 4).movedim(1, -1)[each, rows, columns].movedim(-1, 1)
    mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
    # Channels first again: channels last, narrow layers make oneDNN overrun its memory on the CPU (oneDNN issue 6035).
    return torch.where(mirrored, shifted.flip(-1), shifted).contiguous()


# The network.


def resnet18(width: int) -> nn.Sequential:
    """Build ResNet-18 for small images, with torchvision's blocks, names and initial weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(width)
    layers["relu"] = nn.ReLU()
    layers["layer1"] = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
    layers["layer2"] = stage(width, 2 * width)
    layers["layer3"] = stage(2 * width, 4 * width)
    layers["layer4"] = stage(4 * width, 8 * width)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(8 * width, 10)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def stage(inputs: int, outputs: int) -> nn.Sequential:
    """Build two blocks, the first of which halves the image and has a convolution in its shortcut."""
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(outputs))
    return nn.Sequential(BasicBlock(inputs, outputs, stride=2, downsample=shortcut), BasicBlock(outputs, outputs))


class ImageClassifier(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.network = resnet18(width)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Turn bytes into what the network reads: on the device, a whole batch at a time."""
        images, labels = batch
        images = normalize(images / 255, MEAN, STD)
        return (augment(images) if self.trainer.training else images), labels

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


# One run, and the comparison of several.


def train(sparsity: float, train_data: TensorDataset, test_data: TensorDataset, options: argparse.Namespace) -> Result:
    """Train one network and test it; a sparsity of 0 means dense."""
    name = f"DRIVE, {100 * sparsity:g}% sparse" if sparsity else "dense"
    print(f"Training for {options.epochs} epochs: {name}")
    pl.seed_everything(options.seed, verbose=False)
    model = ImageClassifier(options.width)
    pruning = DRIVEPruningCallback(sparsity=sparsity, warmup_epochs=options.warmup_epochs, rounds=options.rounds)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[pruning] if sparsity else [],
        accelerator=DEVICE.type,
        devices=1,
        precision="bf16-mixed" if DEVICE.type == "cuda" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, batches(train_data, options.batch_size, shuffle=True))
    seconds = time.perf_counter() - start
    metrics = trainer.test(model, batches(test_data, batch_size=1000, shuffle=False), verbose=False)
    return Result(
        network=name,
        accuracy=metrics[0]["test_accuracy"],
        num_weights=sum(weight.numel() for weight in model.parameters() if weight.ndim > 1),  # no biases, no norms
        seconds=seconds,
        report=pruning.report,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Compare dense and pruned ResNet-18s on CIFAR-10.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds CIFAR-10")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 into that folder if it is not there")
    parser.add_argument(
        "--sparsity", type=float, nargs="+", default=[0.0, 0.9, 0.95, 0.98], help="fractions to remove; 0 is dense"
    )
    parser.add_argument("--epochs", type=int, default=50, help="all epochs, dense and sparse")
    parser.add_argument("--warmup-epochs", type=int, default=5, help="dense epochs before pruning")
    parser.add_argument("--rounds", type=int, default=100, help="pruning rounds, one batch each")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--train-images", type=int, help="train on so many images only")
    parser.add_argument("--width", type=int, default=64, help="channels of the first convolution; 64 is ResNet-18")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for a figure, such as cifar10.png")
    options = parser.parse_args(argv)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning 2.6 with torch 2.15
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # there is nothing for them to do

    train_data = load_images(options.data, "train", options.download, limit=options.train_images)
    test_data = load_images(options.data, "test", options.download)
    print(f"{len(train_data):,} images to learn from, {len(test_data):,} to test on, on the {DEVICE.type.upper()}")
    results = [train(sparsity, train_data, test_data, options) for sparsity in options.sparsity]
    print_table(results)
    if options.output:
        save_figure(results, "ResNet-18 on CIFAR-10", options.output)


if __name__ == "__main__":
    main()
