"""Images that tell what they are, in the layouts in which data sets are published, and what trains on them.

Red is 20 times the class, green the row of a pixel, blue 8 times the number of the image.
"""

import hashlib
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

PAPER = Path(__file__).parents[1] / "paper"


def paint(label: int, number: int = 0, width: int = 32, height: int = 32) -> np.ndarray:
    """Make an image, uint8 of shape (height, width, 3)."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 20 * label, np.arange(height)[:, None], 8 * number
    return pixels


def classes_of(images: Tensor) -> list[int]:
    return (images[:, 0].double().mean((1, 2)) / 20).round().int().tolist()


def numbers_of(images: Tensor) -> list[int]:
    return (images[:, 2].double().mean((1, 2)) / 8).round().int().tolist()


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_tree(root: Path, test: str = "test", per_class: int = 4, size: int = 8) -> None:
    """Write three classes of PNG files; numbers go on from class to class, and for the test images from 0 again."""
    for split, count in (("train", per_class), (test, 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for number in range(label * count, (label + 1) * count):
                save(paint(label, number, size, size), root / split / name / f"{number:02}.png")


def write_tiny_imagenet(root: Path) -> None:
    """Write two classes of three images to train on, and four images to test on."""
    for label, name in enumerate(("n01", "n02")):
        for number in range(3):
            save(paint(label, number, 64, 64), root / "train" / name / "images" / f"{name}_{number}.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    rows = []
    for number, label in enumerate((1, 0, 0, 1)):
        save(paint(label, number, 64, 64), root / "val" / "images" / f"val_{number}.JPEG")
        rows.append(f"val_{number}.JPEG\tn0{label + 1}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    save(paint(0, 0, 64, 64), root / "test" / "images" / "test_0.JPEG")  # nobody knows of which class


def rows_of(labels: Sequence[int], start: int = 0) -> np.ndarray:
    """Put images into rows as CIFAR and the downsampled ImageNet have them: first all red, then green, then blue."""
    images = [paint(label, start + number) for number, label in enumerate(labels)]
    return np.stack(images).transpose(0, 3, 1, 2).reshape(len(labels), -1)


def write_cifar(root: Path, source: type[torchvision.datasets.CIFAR10]) -> dict[str, Any]:
    """Write few images as torchvision stores them, and give the lists of files and sums that it checks them by."""
    folder, key = root / source.base_folder, "fine_labels" if "100" in source.base_folder else "labels"
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str, start: int) -> list[str]:
        labels = [7 * (start + number) % 10 for number in range(4)]
        return write(name, {"data": rows_of(labels, start), key: labels, "coarse_labels": [0] * 4})

    _, md5 = write(source.meta["filename"], {source.meta["key"]: [f"class {label}" for label in range(10)]})
    return {
        "train_list": [batch(name, 4 * index) for index, (name, _) in enumerate(source.train_list)],
        "test_list": [batch(name, 24) for name, _ in source.test_list],
        "meta": {**source.meta, "md5": md5},
    }


class Watcher(pl.LightningModule):
    """A tiny network that writes down which images it was shown, as (class, number, label), epoch by epoch."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.linear = nn.Linear(3, num_classes)
        self.seen: dict[str, list[list[tuple[int, int, int]]]] = {"train": [], "val": [], "test": []}
        self.shown: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
        self.sizes: list[int] = []

    def watch(self, stage: str, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        data: Any = self.trainer.datamodule
        pixels = images * data.std + data.mean
        if batch_idx == 0:
            self.seen[stage].append([])
        self.seen[stage][-1] += zip(classes_of(pixels), numbers_of(pixels), labels.tolist(), strict=True)
        self.shown[stage].append(images)
        return F.cross_entropy(self.linear(images.mean((2, 3))), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.sizes.append(len(batch[0]))
        return self.watch("train", batch, batch_idx)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.watch("val", batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.watch("test", batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1}
    return pl.Trainer(default_root_dir=folder, **{**quiet, **settings})


def both_ranks(arguments: list[str]) -> None:
    """Train for two epochs in two processes, which both find nothing decoded, and write down what each saw."""
    root = Path(arguments[0])
    sys.path.insert(0, str(PAPER))
    import images

    class Unprepared(images.ImageTree):
        def prepare_data(self) -> None:
            pass

    class Writer(pl.Callback):
        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            torch.save(pl_module.seen["train"], root / f"rank-{trainer.global_rank}.pt")

    os.environ["OMP_NUM_THREADS"] = "1"
    pl.seed_everything(0)
    data = Unprepared(str(root), size=8, batch_size=5, augment=False)
    trainer(root, strategy="ddp_fork", devices=2, max_epochs=2, callbacks=[Writer()]).fit(Watcher(), datamodule=data)
