"""Real images to train on: scikit-learn's digits, or those of a folder that an environment variable names."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from benchmarks.networks import Batch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

VARIABLE = "LIGHTNING_DRIVE_IMAGES"
"""Names a folder with `train/` and `test/`, and in each a folder of images for each of at most ten classes."""
TRAINED, TESTED = 5000, 1000
"""The most images to train on and to test on."""
PIXELS = 32


@dataclass(frozen=True)
class Images:
    """Images of 32x32 in color, normalised by channel, and their classes.

    Args:
        name: What they are, for a reader.
        train: Images to train on, in random order, and their classes.
        test: Images to test on, and their classes.

    """

    name: str
    train: Batch
    test: Batch

    def batches(self, batch_size: int, pixels: int, count: int, seed: int = 0) -> list[Batch]:
        """Draw batches to train on, upsampled to the size that is asked for."""
        images, labels = self.train
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randint(len(labels), (batch_size,), generator=generator) for _ in range(count)]
        return [(resized(images[draw], pixels), labels[draw]) for draw in draws]


@cache
def load(most: int = TRAINED) -> Images:
    """Load the images of the folder, where there is one, or the digits; at most so many to train on."""
    folder = os.environ.get(VARIABLE)
    sizes = {"train": most, "test": TESTED}
    parts = {part: of_folder(Path(folder), part, size) for part, size in sizes.items()} if folder else digits()
    mean, std = (of(parts["train"][0], dim=(0, 2, 3), keepdim=True) for of in (torch.mean, torch.std))
    train, test = (((images - mean) / std, labels) for images, labels in (parts["train"], parts["test"]))
    return Images(f"images of {Path(folder).name}" if folder else "scikit-learn's digits", train, test)


def digits() -> dict[str, Batch]:
    """Return the digits in three equal channels, a quarter of them to test on."""
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(classes)
    images = resized(images, PIXELS).repeat(1, 3, 1, 1)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return {"train": (images[train], labels[train]), "test": (images[test], labels[test])}


def of_folder(folder: Path, part: str, most: int) -> Batch:
    """Return some images of a folder, of all classes alike."""
    steps = [transforms.Resize(PIXELS), transforms.CenterCrop(PIXELS), transforms.ToTensor()]
    dataset: Dataset[tuple[Tensor, int]] = torchvision.datasets.ImageFolder(
        str(folder / part), transforms.Compose(steps)
    )
    size = len(dataset)  # type: ignore[arg-type]
    chosen = torch.arange(0, size, max(1, size // most))
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))][:most]
    images, labels = zip(*(dataset[int(place)] for place in chosen), strict=True)
    return torch.stack(images), torch.tensor(labels)


def resized(images: Tensor, pixels: int) -> Tensor:
    return images if images.shape[-1] == pixels else F.interpolate(images, size=pixels, mode="bilinear")
