"""Every data set is read as it is published: the right images with the right labels, once, and the same for everyone.

The images are small and tell their class, see ``paper_images.py``.
"""

import importlib
import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import paper_images
import processes
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from paper_images import Watcher, classes_of, numbers_of, paint, rows_of, save, trainer, write_tree
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(paper_images.PAPER)
    return importlib.import_module("images")


@pytest.fixture
def tree(images: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Twelve training images of three classes, and six test images."""
    write_tree(tmp_path)
    return lambda **settings: images.ImageTree(str(tmp_path), **{"size": 8, **settings})


def check(data: Any, split: str, labels: list[int], numbers: list[int]) -> None:
    """The part has these images, in this order, each with its label; rows are rows and channels are channels."""
    pixels, found = data.read(split)
    size = getattr(data, "size", 32)
    assert (pixels.dtype, found.dtype) == (torch.uint8, torch.int64)
    assert pixels.shape == (len(labels), 3, size, size)
    assert found.tolist() == labels == classes_of(pixels)
    assert numbers_of(pixels) == numbers
    rows = torch.arange(pixels.shape[-1])[:, None].expand(pixels[:, 1].shape)
    assert (pixels[:, 1].int() - rows).abs().max() <= 2  # of JPEG


def ready(data: Any) -> Any:
    """Take images into memory as a Trainer does it."""
    data.prepare_data()
    data.setup("fit")
    return data


# Digits


def test_digits(images: ModuleType) -> None:
    """What scikit-learn has, each image once, and every class in the same share of both parts."""
    data = images.Digits()
    (train, train_labels), (test, test_labels) = data.read("train"), data.read("test")
    assert (train.shape, test.shape, train.dtype) == ((1347, 1, 8, 8), (450, 1, 8, 8), torch.uint8)
    pixels, labels = load_digits(return_X_y=True)
    rows = {(*row.astype(int).tolist(), label) for row, label in zip(pixels, labels.tolist(), strict=True)}
    found = [
        (*image.flatten().tolist(), label)
        for image, label in zip(torch.cat([train, test]), torch.cat([train_labels, test_labels]).tolist(), strict=True)
    ]
    assert set(found) == rows
    assert len(found) == len(labels)
    assert (train_labels.bincount() / 1347 - test_labels.bincount() / 450).abs().max() < 0.002


# CIFAR


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def cifar(images: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The class, for which a few images in `tmp_path/there` are what was published."""
    kind = getattr(images, request.param)
    for name, value in paper_images.write_cifar(tmp_path / "there", kind.source).items():
        monkeypatch.setattr(kind.source, name, value)
    return kind


def test_cifar(cifar: Any, tmp_path: Path) -> None:
    data = cifar(str(tmp_path / "there"))
    count = 20 if data.name == "CIFAR-10" else 4  # in five files, or in one
    check(data, "train", [7 * number % 10 for number in range(count)], list(range(count)))
    check(data, "test", [8, 5, 2, 9], [24, 25, 26, 27])


def test_cifar__missing_error(cifar: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException) as error:
        cifar(str(tmp_path)).prepare_data()
    for words in (cifar.source.base_folder, f" in {tmp_path},", cifar.name, "--data.download=true", cifar.source.url):
        assert words in str(error.value)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"half of it")])
def test_cifar__damaged_error(cifar: Any, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(tmp_path / "there" / cifar.source.base_folder / cifar.source.test_list[0][0])
    with pytest.raises(MisconfigurationException, match="There is no complete cifar-"):
        cifar(str(tmp_path / "there")).prepare_data()


def test_cifar__download(cifar: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is fetched where it is looked for, and only if one asks for that."""
    there = tmp_path / "there" / cifar.source.base_folder
    monkeypatch.setattr(cifar.source, "download", lambda self: there.rename(Path(self.root) / there.name))
    (tmp_path / "here").mkdir()
    with pytest.raises(MisconfigurationException):
        cifar(str(tmp_path / "here")).prepare_data()
    data = cifar(str(tmp_path / "here"), download=True)
    assert len(data.read("train")[0]) in (4, 20)


# Trees of image files


@pytest.mark.parametrize("test", ["test", "val"])
def test_tree(images: ModuleType, tmp_path: Path, test: str) -> None:
    write_tree(tmp_path, test)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    data = images.ImageTree(str(tmp_path), size=8)
    check(data, "train", [0] * 4 + [1] * 4 + [2] * 4, list(range(12)))
    check(data, "test", [0, 0, 1, 1, 2, 2], list(range(6)))
    assert (data.name, images.ImageTree(str(tmp_path), name="insects").name) == (tmp_path.name, "insects")


def test_tree__test_before_val(images: ModuleType, tmp_path: Path) -> None:
    write_tree(tmp_path)
    write_tree(tmp_path, "val", per_class=1)
    (tmp_path / "val" / "ant" / "00.png").unlink()
    assert len(images.ImageTree(str(tmp_path), size=8).read("test")[0]) == 6


def test_tree__same_classes(tree: Any, tmp_path: Path) -> None:
    """A class keeps its number where the test images have none of it."""
    for path in (tmp_path / "test" / "ant").iterdir():
        path.unlink()
    (tmp_path / "test" / "ant").rmdir()
    check(tree(), "test", [1, 1, 2, 2], [2, 3, 4, 5])


def test_tree__unknown_class_error(tree: Any, tmp_path: Path) -> None:
    save(paint(0), tmp_path / "test" / "bat" / "0.png")
    with pytest.raises(MisconfigurationException, match=r"train, which has none for 'bat', the class of .*0\.png"):
        tree().read("test")


def test_tree__formats(images: ModuleType, tmp_path: Path) -> None:
    """Whatever torchvision's ImageFolder reads is an image, also in capitals and in folders of its own."""
    kinds = ("BMP", "jpeg", "jpg", "JPEG", "pgm", "png", "ppm", "tif", "tiff", "webp")
    for number, kind in enumerate(kinds):
        pixels = np.full((8, 8) if kind == "pgm" else (8, 8, 3), 10 * number, dtype=np.uint8)
        save(pixels, tmp_path / "train" / "all" / "deeper" / f"{number}.{kind}")
    pixels, labels = images.ImageTree(str(tmp_path), size=8).read("train")
    assert labels.tolist() == [0] * len(kinds)
    assert (pixels.int() - torch.arange(0, 10 * len(kinds), 10)[:, None, None, None]).abs().max() <= 1


def test_tree__modes(images: ModuleType, tmp_path: Path) -> None:
    """Grey images have three equal channels, transparency is left out, and palettes and CMYK are looked up."""
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    red.putalpha(100)
    (tmp_path / "train" / "all").mkdir(parents=True)
    colours = {"L": (76,) * 3, "LA": (76,) * 3, "1": (255,) * 3, "RGBA": (255, 0, 0), "P": (255, 0, 0)}
    for mode in colours:
        made = Image.new("1", (8, 8), 1) if mode == "1" else red.convert("RGB" if mode == "P" else "RGBA").convert(mode)
        made.save(tmp_path / "train" / "all" / f"{mode}.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "train" / "all" / "CMYK.jpg", quality=100)
    pixels, _ = images.ImageTree(str(tmp_path), size=8).read("train")
    for image, name in zip(pixels.int(), sorted([*colours, "CMYK"]), strict=True):
        colour = torch.tensor(colours.get(name, (255, 0, 0)))[:, None, None]
        assert (image - colour).abs().max() <= 2, name


def test_tree__broken_image_error(tree: Any, tmp_path: Path) -> None:
    path = tmp_path / "train" / "bee" / "05.png"
    for content in (b"no image", path.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(MisconfigurationException, match=r"bee/05\.png must be an image, but cannot be read"):
            tree().read("train")


def box_means(pixels: np.ndarray, size: int) -> np.ndarray:
    """Average the pixels whose middles lie in each of size x size equal boxes."""

    def boxes(length: int) -> np.ndarray:
        middles, edges = np.arange(length) + 0.5, np.arange(size + 1) * length / size
        inside = (middles > edges[:-1, None]) & (middles < edges[1:, None])
        return inside / inside.sum(1, keepdims=True)

    return np.einsum("ih,jw,hwc->cij", boxes(pixels.shape[0]), boxes(pixels.shape[1]), pixels.astype(float))


@pytest.mark.parametrize(
    ("kind", "width", "height", "settings"),
    [("ImageNet32", 96, 64, {}), ("ImageNet32", 32, 160, {}), ("ImageTree", 101, 46, {"size": 15})],
)
def test_downsample(
    images: ModuleType, tmp_path: Path, kind: str, width: int, height: int, settings: dict[str, int]
) -> None:
    """Images of any shape become square, by means over boxes."""
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    save(pixels, tmp_path / "train" / "n01" / "0.png")
    [found], _ = getattr(images, kind)(str(tmp_path), **settings).read("train")
    size = settings.get("size", 32)
    assert found.shape == (3, size, size)
    assert np.abs(found.numpy() - box_means(pixels, size)).max() <= 1.01  # it is rounded after rows and after columns


# Decoding


def test_decoded_once(tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decoded is there for the next time, even if no image can be opened."""
    first = tree().read("train")
    monkeypatch.setattr(Image, "open", None)
    assert all(map(torch.equal, tree().read("train"), first))


def test_decoded_once__in_a_run(tree: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Training and testing read each part once, though nothing can be stored."""
    (tmp_path / "decoded").write_text("no folder")
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_image(path))
    run, module, data = trainer(tmp_path), Watcher(), tree()
    with pytest.warns(UserWarning, match="cannot be stored"):
        run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    assert len(opened) == len(set(opened)) == 18


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_decoded_again(tree: Any, tmp_path: Path, change: str) -> None:
    """Other files are not what was decoded before."""
    tree().read("train")
    file = tmp_path / "train" / "bee" / "04.png"
    numbers, labels = list(range(12)), [0] * 4 + [1] * 4 + [2] * 4
    if change == "added":
        save(paint(1, 30, 8, 8), file.with_name("04b.png"))
        numbers.insert(5, 30)
        labels.insert(5, 1)
    elif change == "removed":
        file.unlink()
        numbers.remove(4)
        labels.remove(1)
    else:
        file.rename(file.with_name("99.png"))
        numbers.insert(7, numbers.pop(4))
    check(tree(), "train", labels, numbers)


def test_decoded_again__other_classes(tree: Any, tmp_path: Path) -> None:
    """Nor are other classes, or another size."""
    tree().read("train")
    (tmp_path / "train" / "ant").rename(tmp_path / "train" / "dog")
    pixels, found = tree().read("train")
    assert found.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert classes_of(pixels) == [1] * 4 + [2] * 4 + [0] * 4
    assert tree(size=4).read("train")[0].shape == (12, 3, 4, 4)


def test_decoded__cannot_be_stored(tree: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that cannot be made or a full disk: there is a warning, the images are right, and nothing is left."""
    expected = [0] * 4 + [1] * 4 + [2] * 4, list(range(12))
    (tmp_path / "decoded").write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be stored for later runs: .*exists"):
        check(tree(), "train", *expected)
    (tmp_path / "decoded").unlink()

    def overflow(images: Tensor, path: Path) -> None:
        path.write_text("the first bytes")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", overflow)
    with pytest.warns(UserWarning, match="cannot be stored for later runs: PytorchStreamWriter"):
        check(tree(), "train", *expected)
    assert list((tmp_path / "decoded").iterdir()) == []


def test_decoded__at_once(tree: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two that write at the same time do not meet in a file, and nobody finds half of one."""
    both, save_tensor, partial = threading.Barrier(2), torch.save, []

    def slowly(images: Tensor, path: Path) -> None:
        save_tensor(images, path)
        both.wait(10)
        partial.append((path, list((tmp_path / "decoded").glob("*.pt"))))
        both.wait(10)

    monkeypatch.setattr(torch, "save", slowly)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(tree().read("train")[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path for path, _ in partial}) == 2
    assert [stored for _, stored in partial] == [[], []]
    assert torch.equal(*found)
    [stored] = (tmp_path / "decoded").iterdir()
    assert torch.equal(torch.load(stored, weights_only=True), found[0])


# Tiny ImageNet


@pytest.mark.parametrize("val", ["as published", "sorted", "sorted, with leftovers"])
def test_tiny_imagenet(images: ModuleType, tmp_path: Path, val: str) -> None:
    paper_images.write_tiny_imagenet(tmp_path)
    labels, numbers = [1, 0, 0, 1], [0, 1, 2, 3]
    if val != "as published":
        labels, numbers = [0, 0, 1, 1], [1, 2, 0, 3]
        for number, name in enumerate(("n02", "n01", "n01", "n02")):
            (tmp_path / "val" / name).mkdir(exist_ok=True)
            (tmp_path / "val" / "images" / f"val_{number}.JPEG").rename(tmp_path / "val" / name / f"{number}.JPEG")
    if val == "sorted":
        (tmp_path / "val" / "images").rmdir()
        (tmp_path / "val" / "val_annotations.txt").unlink()
    data = images.TinyImageNet(str(tmp_path))
    check(data, "train", [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    check(data, "test", labels, numbers)


def test_tiny_imagenet__no_annotations_error(images: ModuleType, tmp_path: Path) -> None:
    """Its folder of images is no class."""
    paper_images.write_tiny_imagenet(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").unlink()
    with pytest.raises(MisconfigurationException, match=r"'images'.*Unpack http://cs231n"):
        images.TinyImageNet(str(tmp_path)).prepare_data()


@pytest.mark.parametrize(
    ("kind", "part", "where"),
    [
        ("ImageTree", "train", "train/<class>/<image>"),
        ("ImageTree", "test", "test/<class>/<image>"),
        ("TinyImageNet", "train", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
        ("TinyImageNet", "val", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
        ("ImageNet32", "train", "train_data_batch_1 ... 10"),
        ("ImageNet32", "val", "val_data"),
    ],
)
def test_missing_error(images: ModuleType, tmp_path: Path, kind: str, part: str, where: str) -> None:
    """The error says what to put where, whether the folder is empty or half of the data is there."""
    write_tree(tmp_path, "test" if kind == "ImageTree" else "val")
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(MisconfigurationException) as error:
        getattr(images, kind)(str(tmp_path)).prepare_data()
    for words in (str(tmp_path / part), "--data.root", where):
        assert words in str(error.value)


# ImageNet


def write_batch(path: Path, classes: list[int], start: int, kind: str, **changes: Any) -> None:
    """Write images of these classes, which count from 0, with labels that count from 1."""
    content = {"data": rows_of(classes, start), "labels": [label + 1 for label in classes], "mean": np.zeros(3072)}
    content |= changes
    path.parent.mkdir(exist_ok=True)
    if kind == "npz":
        np.savez(path.with_suffix(".npz"), **content)
        return
    text = pickle.dumps(content, protocol=int(kind[-1]))
    path.write_bytes(text.replace(b"numpy._core", b"numpy.core") if kind == "pickle 2" else text)  # before NumPy 2


@pytest.mark.parametrize("kind", ["pickle 2", "pickle 4", "npz"])
@pytest.mark.parametrize("folders", [("", ""), ("Imagenet32_train", "val_data")])
def test_imagenet32__batches(images: ModuleType, tmp_path: Path, kind: str, folders: tuple[str, str]) -> None:
    train, val = (tmp_path / folder for folder in folders)
    write_batch(train / "train_data_batch_1", [0, 2], 0, kind)
    write_batch(train / "train_data_batch_2", [1, 0, 3], 2, kind)
    write_batch(val / "val_data", [3, 1], 9, kind)
    (tmp_path / "val_data.zip").write_text("what it came in")
    data = images.ImageNet32(str(tmp_path))
    check(data, "train", [0, 2, 1, 0, 3], [0, 1, 2, 3, 4])
    check(data, "test", [3, 1], [9, 10])


def test_imagenet32__tree(images: ModuleType, tmp_path: Path) -> None:
    for label, name in enumerate(("n01", "n02")):
        save(paint(label, 1 + label, 40, 32), tmp_path / "train" / name / f"{name}_1.JPEG")
        save(paint(label, 3 + label, 33, 32), tmp_path / "val" / name / f"ILSVRC2012_val_{label}.JPEG")
    data = images.ImageNet32(str(tmp_path))
    check(data, "train", [0, 1], [1, 2])
    check(data, "test", [0, 1], [3, 4])


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_imagenet32__malicious_error(images: ModuleType, tmp_path: Path) -> None:
    """A pickle that would run code is refused, and runs nothing."""
    write_batch(tmp_path / "train_data_batch_1", [0], 0, "pickle 4", mean=Malicious(tmp_path / "harm"))
    with pytest.raises(MisconfigurationException, match=r"train_data_batch_1 must be.*must not hold \w+\.mkdir"):
        images.ImageNet32(str(tmp_path)).prepare_data()
    assert not (tmp_path / "harm").exists()
    pickle.loads((tmp_path / "train_data_batch_1").read_bytes())
    assert (tmp_path / "harm").exists()  # it is malicious


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((2, 12288), dtype=np.uint8)}, r"32x32 pixels.*got uint8 of shape \(2, 12288\)"),
        ({"data": np.zeros((2, 3072))}, "rows of 3,072 bytes.* got float64"),
        ({"labels": [1]}, "as many labels.* 1 labels"),
        ({"labels": [0, 1]}, "labels from 1, got .* from 0"),
    ],
)
@pytest.mark.parametrize("kind", ["pickle 4", "npz"])
def test_imagenet32__content_error(
    images: ModuleType, tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    write_batch(tmp_path / "train_data_batch_1", [0, 1], 0, kind, **changes)
    with pytest.raises(MisconfigurationException, match=message):
        images.ImageNet32(str(tmp_path)).prepare_data()


@pytest.mark.parametrize("name", ["train_data_batch_1", "train_data_batch_1.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"<html>not found</html>", pickle.dumps({"data": 1})])
def test_imagenet32__damaged_error(images: ModuleType, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MisconfigurationException, match=f"{name} must be a batch"):
        images.ImageNet32(str(tmp_path)).prepare_data()


def test_imagenet32__twice_error(images: ModuleType, tmp_path: Path) -> None:
    """The same batch as a pickle and as `.npz` would count twice."""
    for kind in ("pickle 4", "npz"):
        write_batch(tmp_path / "train_data_batch_1", [0, 1], 0, kind)
    with pytest.raises(MisconfigurationException, match=r"once.*\['train_data_batch_1', 'train_data_batch_1\.npz'\]"):
        images.ImageNet32(str(tmp_path)).prepare_data()


def test_imagenet32__batches_and_tree_error(images: ModuleType, tmp_path: Path) -> None:
    """Batches number the classes in another order than a tree does: both go together only with their like."""
    write_batch(tmp_path / "train_data_batch_1", [0, 1], 0, "npz")
    write_tree(tmp_path, "val")
    with pytest.raises(MisconfigurationException, match=r"must hold each val_data\* once.* got \[\]"):
        images.ImageNet32(str(tmp_path)).prepare_data()


def test_decoded__damaged_error(tree: Any, tmp_path: Path) -> None:
    tree().read("train")
    [stored] = (tmp_path / "decoded").iterdir()
    for content in (stored.read_bytes()[:200], b"", b"no file of torch"):
        stored.write_bytes(content)
        with pytest.raises(MisconfigurationException, match=rf"{stored.name} holds decoded images, but is damaged\."):
            tree().read("train")


def test_decoded__threads(images: ModuleType, tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as torch uses, which follows OMP_NUM_THREADS and the processors that this process may use."""
    threads = []
    pool = images.ThreadPool
    monkeypatch.setattr(images, "ThreadPool", lambda number: threads.append(number) or pool(number))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tree().read("train")
    assert threads == [3]


def test_unreadable_error(tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system says."""
    data = tree()
    monkeypatch.setattr(data, "files", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(MisconfigurationException, match=r"^The train images of .* cannot be read: .*Permission denied"):
        data.prepare_data()


@pytest.mark.parametrize(("setting", "value", "least"), [("batch_size", 0, 1), ("padding", -1, 0), ("size", 0, 1)])
def test_settings__error(tree: Any, setting: str, value: int, least: int) -> None:
    with pytest.raises(MisconfigurationException, match=f"`--data.{setting}` must be at least {least}, got {value}"):
        tree(**{setting: value})


# What a Trainer gets


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("limit", [0, -1, 13])
def test_limits__error(tree: Any, split: str, limit: int) -> None:
    most = {"train": 12, "test": 6}[split]
    with pytest.raises(
        MisconfigurationException, match=rf"`{split}_images` must be between 1 and {most},.* got {limit}\."
    ):
        ready(tree(**{f"{split}_images": limit}))


def test_limits(tree: Any) -> None:
    """The images are taken at random, and are the same for every seed; all of them is no limit."""
    chosen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        data = ready(tree(train_images=7, test_images=4))
        chosen.append([numbers_of(data.splits[split].images) for split in ("train", "test")])
        for split in ("train", "test"):
            assert data.splits[split].labels.tolist() == classes_of(data.splits[split].images)
    assert chosen[0] == chosen[1]
    assert [len(set(numbers)) for numbers in chosen[0]] == [7, 4]
    assert sorted(chosen[0][0]) != list(range(7))
    assert len(ready(tree(train_images=12, test_images=6)).splits["train"]) == 12


@pytest.mark.parametrize(("num_classes", "refused"), [(2, True), (3, False), (4, False)])
def test_num_classes__error(tree: Any, tmp_path: Path, num_classes: int, refused: bool) -> None:
    """A model that tells too few classes apart is refused before it trains."""
    module = Watcher(num_classes)
    if not refused:
        trainer(tmp_path).fit(module, datamodule=tree())
        return
    with pytest.raises(MisconfigurationException, match=r"The model tells 2 classes apart, but .* has 3\. Set"):
        trainer(tmp_path).fit(module, datamodule=tree())
    assert not module.sizes


def test_normalised(images: ModuleType, tmp_path: Path) -> None:
    """Over all training images each channel has mean 0 and standard deviation 1; test images follow these."""
    noise = np.random.default_rng(0)
    for split, top in (("train", 100), ("test", 256)):
        for number in range(10):
            pixels = noise.integers((0, 50, top - 10), (50, 60, top), size=(8, 8, 3), dtype=np.uint8)
            save(pixels, tmp_path / split / "all" / f"{number}.png")
    data = ready(images.ImageTree(str(tmp_path), size=8, train_images=5))
    stored = {split: data.read(split)[0] for split in ("train", "test")}
    pixels, labels = data.on_after_batch_transfer((stored["train"], torch.zeros(10)), 0)
    assert (pixels.dtype, labels.tolist()) == (torch.float32, [0] * 10)
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-5
    assert (pixels.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    tested, _ = data.on_after_batch_transfer((stored["test"], labels), 0)
    spread = stored["train"].double().std((0, 2, 3), correction=0)[:, None, None]
    expected = (stored["test"] - stored["train"].double().mean((0, 2, 3))[:, None, None]) / spread
    torch.testing.assert_close(tested.double(), expected, rtol=1e-5, atol=1e-5)


def test_mean_and_std(images: ModuleType) -> None:
    """Each channel of its own, to the last digit of float32; a constant channel becomes zeros."""
    pixels = torch.tensor([[[[0, 255]], [[10, 10]], [[1, 1]]], [[[0, 255]], [[10, 14]], [[1, 1]]]], dtype=torch.uint8)
    mean, std = images.mean_and_std(pixels)
    assert mean.shape == std.shape == (3, 1, 1)
    assert mean.flatten().tolist() == [127.5, 11, 1]
    assert std.flatten().tolist() == pytest.approx([127.5, 3**0.5, 1])


def test_augment(images: ModuleType) -> None:
    """Every image is a window of itself, padded, or of its mirror image; all windows come, about equally often."""
    torch.manual_seed(0)
    source = torch.rand(2000, 3, 5, 6)
    augmented = images.augment(source, 2)
    assert augmented.shape == source.shape
    assert augmented.is_contiguous()
    windows = F.pad(source, [2] * 4).unfold(2, 5, 1).unfold(3, 6, 1)  # image, channel, row and column of the corner
    counts: Counter[tuple[int, ...]] = Counter()
    for mirrored, image in enumerate((augmented, augmented.flip(-1))):
        same = (windows == image[:, :, None, None]).all(-1).all(-1).all(1)
        counts.update((mirrored, *place) for place in same.nonzero()[:, 1:].tolist())
    assert sum(counts.values()) == 2000
    assert len(counts) == 2 * 5 * 5
    assert min(counts.values()) > 40 - 4 * 6
    assert max(counts.values()) < 40 + 4 * 6  # a standard deviation is 6


def test_augment__random_state(images: ModuleType) -> None:
    """Torch's random state decides, and no padding leaves only the mirror."""

    def drawn(seed: int, padding: int) -> Tensor:
        torch.manual_seed(seed)
        return images.augment(torch.arange(50 * 12.0).view(50, 3, 2, 2), padding)

    assert torch.equal(drawn(0, 4), drawn(0, 4))
    assert not torch.equal(drawn(0, 4), drawn(1, 4))
    source = torch.arange(50 * 12.0).view(50, 3, 2, 2)
    same = (drawn(0, 0) == source).flatten(1).all(1)
    assert (drawn(0, 0) == source.flip(-1)).flatten(1).all(1).eq(~same).all()
    assert 10 < same.sum() < 40


@pytest.mark.parametrize(("settings", "changes"), [({}, True), ({"augment": False}, False), ({"padding": 0}, True)])
def test_augment__in_training_only(tree: Any, tmp_path: Path, settings: dict[str, Any], changes: bool) -> None:
    """Images to validate and test on, also during training, are as they are; images to train on only if asked for."""
    for path in tmp_path.rglob("*.png"):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[:, 0, 0] = 255  # so that a mirror image is another
        save(pixels, path)
    module, data, run = Watcher(), tree(batch_size=12, **settings), trainer(tmp_path)
    torch.manual_seed(0)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)

    def as_they_are(split: str) -> set[tuple[float, ...]]:
        return as_set((data.splits[split].images - data.mean) / data.std)

    assert as_set(module.shown["val"][-1]) == as_set(module.shown["test"][0]) == as_they_are("test")
    assert len(as_set(module.shown["train"][0]) & as_they_are("train")) < (12 if changes else 13)
    assert (as_set(module.shown["train"][0]) == as_they_are("train")) is not changes
    if "padding" in settings:
        both = as_they_are("train") | as_set((data.splits["train"].images.flip(-1) - data.mean) / data.std)
        assert as_set(module.shown["train"][0]) <= both


def as_set(images: Tensor) -> set[tuple[float, ...]]:
    return {tuple(image.flatten().tolist()) for image in images}


def test_device(tree: Any, tmp_path: Path) -> None:
    """Images are where the trainer computes, and follow to another trainer's device."""
    data = tree()
    for device in ("meta", "cpu"):
        data.trainer = trainer(tmp_path)
        data.trainer.strategy._root_device = torch.device(device)
        ready(data)
        for split in data.splits.values():
            assert {split.images.device.type, split.labels.device.type, split[[0]][0].device.type} == {device}
        assert {data.mean.device.type, data.std.device.type} == {device}


def test_fit(tree: Any, tmp_path: Path) -> None:
    """Every epoch shows every training image once, in an order of its own, and then every test image."""
    torch.manual_seed(0)
    module, data = Watcher(), tree(batch_size=5, augment=False)
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(module, datamodule=data)
    everything = {split: [(label, number, label) for label, number in numbered(split)] for split in ("train", "test")}
    assert [sorted(epoch) for epoch in module.seen["train"]] == [everything["train"]] * 2
    assert module.seen["train"][0] != module.seen["train"][1] != everything["train"]
    assert module.seen["val"] == [everything["test"]] * 2
    assert module.sizes == [5, 5, 2] * 2


def numbered(split: str) -> list[tuple[int, int]]:
    """Class and number of each image that `write_tree` writes."""
    count = {"train": 4, "test": 2}[split]
    return [(number // count, number) for number in range(3 * count)]


@pytest.mark.parametrize("kind", ["CIFAR10", "TinyImageNet", "ImageNet32"])
def test_classifier(images: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """The examples' own module trains on it."""
    if kind == "CIFAR10":
        for name, value in paper_images.write_cifar(tmp_path, images.CIFAR10.source).items():
            monkeypatch.setattr(images.CIFAR10.source, name, value)
    elif kind == "TinyImageNet":
        paper_images.write_tiny_imagenet(tmp_path)
    else:
        write_batch(tmp_path / "train_data_batch_1", [0, 2], 0, "pickle 4")
        write_batch(tmp_path / "val_data", [1, 2], 0, "pickle 4")
    classifier = importlib.import_module("classifier")
    module = classifier.ImageClassifier("convnet", 10, lambda parameters: torch.optim.SGD(parameters, lr=0.01))
    run = trainer(tmp_path)
    run.fit(module, datamodule=getattr(images, kind)(str(tmp_path)))
    assert run.callback_metrics["train_loss"].isfinite()
    assert 0 <= run.callback_metrics["val_accuracy"] <= 1


@pytest.mark.ddp
def test_two_processes(tmp_path: Path) -> None:
    """Two ranks that decode at once share the training images of every epoch, without one left out or shown twice."""
    write_tree(tmp_path)
    processes.run(paper_images.both_ranks, tmp_path, log=tmp_path / "log.txt")
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(list((tmp_path / "decoded").iterdir())) == 2
    for epochs in zip(*ranks, strict=True):
        assert [len(epoch) for epoch in epochs] == [6, 6]
        assert sorted(epochs[0] + epochs[1]) == [(label, number, label) for label, number in numbered("train")]
    assert ranks[0][0] != ranks[0][1]
