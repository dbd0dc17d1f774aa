"""Images that are decoded once and stay in memory, on the GPU if there is one, and are augmented there.

An epoch then costs little more than the network's arithmetic: a batch is one indexing operation, and there is nothing
to do for worker processes. Images that come as files are decoded into one tensor, which is kept in `ROOT/decoded/` for
later runs; delete that folder after changing an image without changing its name.

Every class looks for its data in `root`, in its published layout, and raises an error that names what is missing.
Pixels are divided by 255 and normalised by the mean and standard deviation of each channel over the training images.
Training images are padded by zeros (the mean colour) and cropped at random, and half of them are mirrored; the paper
does not state its augmentation. `test` images are also those of validation: nothing is selected by them.
"""

import hashlib
import pickle
import zipfile
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal, TypeAlias
from uuid import uuid4

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

Split: TypeAlias = Literal["train", "test"]
Batch: TypeAlias = tuple[Tensor, Tensor]


class InMemory(Dataset[Batch]):
    """Images, uint8 of shape (N, 3, H, W), and labels, of shape (N,); whole batches are taken at once."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        which = torch.tensor(indices, device=self.images.device)
        return self.images[which], self.labels[which]


def as_it_is(batch: Batch) -> Batch:
    return batch


class Images(pl.LightningDataModule):
    """The base of all data sets here.

    Args:
        root: Folder that holds the data.
        batch_size: Training images in a step, on each device.
        augment: Whether training images are shifted and mirrored at random.
        padding: Largest shift in pixels.
        train_images: Number of training images to use, chosen at random, the same for every seed; default: all.
        test_images: Number of test images to use; default: all.

    """

    name: str
    """Name of the data in results."""

    def __init__(
        self,
        root: str,
        *,
        batch_size: int = 128,
        augment: bool = True,
        padding: int = 4,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        super().__init__()
        for setting, value, least in (("batch_size", batch_size, 1), ("padding", padding, 0)):
            check_least(setting, value, least)
        self.root = Path(root)
        self.batch_size = batch_size
        self.augment = augment
        self.padding = padding
        self.limits: dict[Split, int | None] = {"train": train_images, "test": test_images}
        self.prepared: dict[Split, Batch] = {}
        self.splits: dict[Split, InMemory] = {}
        self.mean = self.std = torch.empty(0)  # of each channel over all training images

    @abstractmethod
    def read(self, split: Split) -> Batch:
        """Return all images of a part, uint8 of shape (N, 3, H, W), and their labels, int64 of shape (N,)."""

    def prepare_data(self) -> None:
        """Decode all images once, in one process, which keeps them; the others read them decoded."""
        if not self.splits:
            self.prepared = {split: self._read(split) for split in ("train", "test")}

    def setup(self, stage: str) -> None:
        """Load the images into the memory of the Trainer's device."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if self.splits and self.mean.device == device:
            return
        for split in ("train", "test"):
            images, labels = self.prepared.pop(split, None) or self._read(split)
            self._check(split, len(images), int(labels.max()) + 1)
            if split == "train":
                self.mean, self.std = (value.to(device) for value in mean_and_std(images))
            if limit := self.limits[split]:
                chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
                images, labels = images[chosen], labels[chosen]
            self.splits[split] = InMemory(images.to(device), labels.to(device))

    def _read(self, split: Split) -> Batch:
        try:
            return self.read(split)
        except OSError as error:  # of folders that one must not read, a broken connection, a full disk
            raise MisconfigurationException(
                f"The {split} images of {self.name} in {self.root.absolute()} cannot be read: {error}. Their folder is"
                " named by `--data.root`."
            ) from error

    def _check(self, split: Split, count: int, num_classes: int) -> None:
        limit = self.limits[split]
        if limit is not None and not 0 < limit <= count:
            raise MisconfigurationException(
                f"`{split}_images` must be between 1 and {count}, or null for all, the number of {split} images in"
                f" {self.root}, got {limit}."
            )
        wanted = getattr(self.trainer and self.trainer.lightning_module, "num_classes", num_classes)
        if num_classes > wanted:
            raise MisconfigurationException(
                f"The model tells {wanted} classes apart, but {self.root} has {num_classes}. Set `num_classes` of the"
                " model to that."
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, collate_fn=as_it_is)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.splits["test"], batch_size=1000, collate_fn=as_it_is)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise and augment a whole batch of bytes on the device."""
        images, labels = batch
        images = (images - self.mean) / self.std
        if self.augment and self.trainer is not None and self.trainer.training:
            images = augment(images, self.padding)
        return images, labels


def check_least(setting: str, value: int, least: int) -> None:
    if value < least:
        raise MisconfigurationException(f"`--data.{setting}` must be at least {least}, got {value}.")


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact mean and standard deviation of every channel of uint8 images, float32 of shape (3, 1, 1).

    The unit is that of a byte. The deviation of a constant channel is 1, so that one can divide by it.
    """
    counts = torch.stack([channel.reshape(-1).bincount(minlength=256) for channel in images.unbind(1)]).double()
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.float64)
    mean = (share * value).sum(1, keepdim=True)
    variance = (share * (value - mean).square()).sum(1, keepdim=True)
    variance[variance == 0] = 1
    return mean.float().unsqueeze(-1), variance.sqrt().float().unsqueeze(-1)


def augment(images: Tensor, padding: int) -> Tensor:
    """Shift every image by up to `padding` pixels in both directions, and mirror about half of them."""
    device = images.device
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1, 1), device=device)
    rows = top + torch.arange(height, device=device)[:, None]
    columns = left + torch.arange(width, device=device)
    images_in_order = torch.arange(count, device=device)[:, None, None]
    shifted = F.pad(images, [padding] * 4).movedim(1, -1)[images_in_order, rows, columns].movedim(-1, 1)
    mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
    # Channels first again: channels last, narrow layers make oneDNN overrun its memory on the CPU (oneDNN issue 6035).
    return torch.where(mirrored, shifted.flip(-1), shifted).contiguous()


# Digits, which come with scikit-learn.


class Digits(Images):
    """1,797 grey images of 8x8 pixels in 10 classes, which come with scikit-learn: three quarters of them to train on.

    Args:
        settings: See `Images`.

    """

    name = "digits"

    def __init__(self, **settings: Any) -> None:
        super().__init__("scikit-learn", **settings)

    def read(self, split: Split) -> Batch:
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
        part = parts[("train", "test").index(split)]
        images = torch.from_numpy(pixels[part].astype(np.uint8)).view(-1, 1, 8, 8)  # from 0 to 16
        return images, torch.from_numpy(labels[part])


# CIFAR, from the files that torchvision fetches.


class CIFAR10(Images):
    """CIFAR-10 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 pixels in 10 classes.

    Args:
        root: Folder that holds `cifar-10-batches-py/`, as torchvision stores it.
        download: Whether to fetch the data (170 MB) if it is not there.
        settings: See `Images`.

    """

    name = "CIFAR-10"
    source: type[torchvision.datasets.CIFAR10] = torchvision.datasets.CIFAR10

    def __init__(self, root: str, *, download: bool = False, **settings: Any) -> None:
        super().__init__(root, **settings)
        self.download = download

    def read(self, split: Split) -> Batch:
        try:
            dataset = self.source(str(self.root), train=split == "train", download=self.download)
        except RuntimeError as error:  # from torchvision, for missing or altered files
            raise MisconfigurationException(
                f"There is no complete {self.source.base_folder}/ in {self.root.absolute()}, where {self.name} is"
                f" looked for. Add `--data.download=true` to fetch it, unpack {self.source.url} there, or name its"
                " folder by `--data.root`. A tree of images is read by `--data=ImageTree`."
            ) from error
        return torch.from_numpy(dataset.data).movedim(-1, 1).contiguous(), torch.tensor(dataset.targets)


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky, 2009): as CIFAR-10, in 100 classes and `cifar-100-python/`."""

    name = "CIFAR-100"
    source = torchvision.datasets.CIFAR100


# Trees of image files.


class DecodedImages(Images):
    """Images in files, which are decoded once into a tensor."""

    size = 32
    """Height and width in pixels to which images are resized, by averaging boxes of pixels; proportions may change."""

    @abstractmethod
    def files(self, split: Split) -> tuple[list[Path], list[int]]:
        """Return the files of a part, in a fixed order, and their labels."""

    def read(self, split: Split) -> Batch:
        files, labels = self.files(split)
        names = "\n".join(str(path.relative_to(self.root)) for path in files)
        stored = self.root / "decoded" / f"{split}-{self.size}-{hashlib.sha256(names.encode()).hexdigest()[:16]}.pt"
        if stored.is_file():
            images = load(stored)
        else:
            rank_zero_info(f"Decoding {len(files):,} images of {self.root}")
            with ThreadPool(torch.get_num_threads()) as pool:  # follows OMP_NUM_THREADS and the affinity
                images = torch.stack(pool.map(self._decode, files))
            store(images, stored)
        return images, torch.tensor(labels)

    def _decode(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # which Pillow raises
            raise MisconfigurationException(f"{file} must be an image, but cannot be read: {error}") from error
        if pixels.size != (self.size, self.size):
            pixels = pixels.resize((self.size, self.size), Image.Resampling.BOX)
        return torch.from_numpy(np.array(pixels)).movedim(-1, 0)

    def _by_class(self, folder: Path) -> tuple[list[Path], list[int]]:
        """Return the images in a folder with a folder for each class, and their labels."""
        named = [(file, name) for name in folders_in(folder) for file in images_below(folder / name)]
        if not named:
            raise MisconfigurationException(
                f"There are no images in {folder.absolute()}: {self.name} needs `{folder.name}/<class>/<image>` in the"
                f" folder that `--data.root` names, for each class. {self.help}"
            )
        return self._numbered(named)

    def _numbered(self, named: list[tuple[Path, str]]) -> tuple[list[Path], list[int]]:
        """Return files and labels; classes are those of the training images, numbered by their names."""
        numbers = {name: number for number, name in enumerate(folders_in(self.root / "train"))}
        for file, name in named:
            if name not in numbers:
                raise MisconfigurationException(
                    f"Every class must have a folder in {self.root.absolute() / 'train'}, which has none for {name!r},"
                    f" the class of {file}. Add that, or remove the image. {self.help}"
                )
        return [file for file, _ in named], [numbers[name] for _, name in named]

    help = ""
    """How to get the data, for errors."""


def folders_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)


def store(images: Tensor, path: Path) -> None:
    """Write a whole file or none, since several processes may write at once."""
    part = path.with_suffix(f".{uuid4().hex}")  # not the process id, which two machines may share
    try:
        path.parent.mkdir(exist_ok=True)
        torch.save(images, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises the latter for full disks and folders that it cannot write
        with suppress(OSError):
            part.unlink()
        rank_zero_warn(f"Decoded images cannot be stored for later runs: {error}")


def load(path: Path) -> Tensor:
    """Read what `store` wrote."""
    try:
        images: Tensor = torch.load(path, mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise MisconfigurationException(
            f"{path} holds decoded images, but is damaged. Delete it, and they are decoded again."
        ) from error
    return images


class ImageTree(DecodedImages):
    """Any tree of images, `train/<class>/*` and `test/<class>/*` (or `val`), as torchvision's ImageFolder reads it.

    Args:
        root: Folder that holds `train/` and `test/` or `val/`.
        name: What to call the data where results are reported; the default is the name of the folder.
        size: Height and width that images are brought to.
        settings: See `Images`.

    """

    def __init__(self, root: str, *, name: str | None = None, size: int = 32, **settings: Any) -> None:
        super().__init__(root, **settings)
        check_least("size", size, 1)
        self.name = name or self.root.absolute().name
        self.size = size

    def files(self, split: Split) -> tuple[list[Path], list[int]]:
        if split == "test" and not (self.root / "test").is_dir() and (self.root / "val").is_dir():
            return self._by_class(self.root / "val")
        return self._by_class(self.root / split)


class TinyImageNet(DecodedImages):
    """Tiny ImageNet (Stanford CS231n): 100,000 training and 10,000 validation images of 64x64 pixels in 200 classes.

    `root` is the unpacked folder, with `train/<class>/images/*.JPEG`, `val/images/*.JPEG` and
    `val/val_annotations.txt`. Its test set has no published labels, so its validation set is the test set here.

    """

    name = "Tiny ImageNet"
    size = 64
    help = "Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip and name its folder."

    def files(self, split: Split) -> tuple[list[Path], list[int]]:
        if split == "train":
            return self._by_class(self.root / "train")
        folder, table = self.root / "val" / "images", self.root / "val" / "val_annotations.txt"
        if not table.is_file() or not images_below(folder):
            return self._by_class(self.root / "val")  # sorted into classes afterwards, as many people do
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
        return self._numbered([(folder / row[0], row[1]) for row in rows])


# ImageNet.


class ImageNet32(DecodedImages):
    """ImageNet at 32x32 pixels: 1,281,167 training and 50,000 validation images in 1,000 classes.

    Either the published downsampled images (Chrabaszcz et al., 2017), `train_data_batch_1` to `train_data_batch_10` and
    `val_data`, as they are or as `.npz`; or ImageNet itself, `train/<class>/*.JPEG` and `val/<class>/*.JPEG`, which is
    downsampled in the same way, by averaging boxes of pixels.

    """

    name = "ImageNet, 32x32"
    help = "Or put train_data_batch_1 ... 10 and val_data there, from https://image-net.org/download-images.php."

    def read(self, split: Split) -> Batch:
        if not self._batches("train_data_batch_"):
            return super().read(split)
        stem = {"train": "train_data_batch_", "test": "val_data"}[split]
        paths = self._batches(stem)
        if len({path.stem for path in paths}) != max(len(paths), 1):
            raise MisconfigurationException(
                f"{self.root.absolute()}, or a folder in it, must hold each {stem}* once, as it is or as .npz, got"
                f" {[str(path.relative_to(self.root)) for path in paths]}."
            )
        pixels, labels = zip(*(read_batch(path) for path in paths), strict=True)
        return torch.cat(pixels), torch.cat(labels)

    def _batches(self, stem: str) -> list[Path]:
        paths = [*self.root.glob(f"{stem}*"), *self.root.glob(f"*/{stem}*")]
        return sorted(path for path in paths if path.suffix in ("", ".npz") and path.is_file())

    def files(self, split: Split) -> tuple[list[Path], list[int]]:
        return self._by_class(self.root / {"train": "train", "test": "val"}[split])


def read_batch(path: Path) -> Batch:
    """Read one of the published files, whose rows are images and whose labels count from 1."""
    try:
        part = read_npz(path) if path.suffix else read_pickle(path)
        pixels, labels = np.asarray(part["data"]), np.asarray(part["labels"])
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, KeyError) as error:
        raise MisconfigurationException(
            f"{path} must be a batch of downsampled ImageNet, but it is not: {error}"
        ) from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * 32 * 32) or labels.min() < 1:
        raise MisconfigurationException(
            f"{path} must have rows of 3,072 bytes, which are images of 32x32 pixels, and as many labels from 1, got"
            f" {pixels.dtype} of shape {pixels.shape} and {len(labels)} labels from {labels.min()}."
        )
    return torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64) - 1)


def read_npz(path: Path) -> dict[str, Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:  # NumPy leaves broken files open
        return {name: arrays[name] for name in ("data", "labels")}


class ArraysOnly(pickle.Unpickler):
    """Read a pickle of plain values and arrays, and of nothing that could run code."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} or (
            module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct"
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a file of arrays must not hold {module}.{name}")


def read_pickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return ArraysOnly(file, encoding="latin1").load()
