"""The examples run as a user runs them, from the command line, and end with a table and a figure."""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import resnet18

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = ("dense", "magnitude", "SNIP", "SynFlow", "DRIVE", "IMP")
ROW = re.compile(
    r"^ *(dense|DRIVE, .* sparse) +([\d.]+)% +([\d,]+) +([\d.]+%) +(-|[\d.]+ s) +[\d.]+ s *$", re.MULTILINE
)


def run(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an example in a folder, on the package of this checkout."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def read_table(output: str) -> dict[str, tuple[float, str, str]]:
    """Network to its accuracy in percent, its number of weights and the share of them that is kept."""
    return {name: (float(accuracy), kept, share) for name, accuracy, kept, share, _ in ROW.findall(output)}


def write_noise(folder: Path, per_class: int) -> None:
    """Write random images as a tree of CIFAR-10's shape, JPEG and PNG files in turn."""
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(10):
            images = folder / split / f"class{label}"
            images.mkdir(parents=True)
            for index in range(per_class):
                pixels = noise.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{index}.{'png' if index % 2 else 'jpg'}")


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file that is whole."""
    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module, imported as Python does that runs it: its folder comes first."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("cifar10")


@pytest.fixture
def methods(cifar10: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The example as a module, to be run in a folder; nothing of what it sets for its process is left behind."""
    module = importlib.import_module("methods")
    for each in (cifar10, module):
        monkeypatch.setattr(each, "DEVICE", torch.device("cpu"))  # later tests could not fork after CUDA was used
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield module
    logger.setLevel(level)


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    completed = run("digits.py", "--epochs", "5", folder=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "site-packages" not in completed.stderr  # no library chatters

    table = read_table(completed.stdout)
    assert {name: row[1:] for name, row in table.items()} == {
        "dense": ("23,824", "100%"),
        "DRIVE, 90% sparse": ("2,382", "10%"),
        "DRIVE, 95% sparse": ("1,191", "5%"),
        "DRIVE, 98% sparse": ("476", "2%"),
    }
    assert all(accuracy > 30 for accuracy, _, _ in table.values())  # chance is 10 %
    assert image_size(tmp_path / "digits.png")[0] == 1600


@pytest.mark.slow
def test_cifar10(tmp_path: Path) -> None:
    write_noise(tmp_path / "cifar", per_class=4)
    network = ["--width", "2", "--sparsity", "0", "0.5", "--epochs", "2", "--warmup-epochs", "1", "--rounds", "3"]
    data = ["--data", "cifar", "--batch-size", "10", "--train-images", "30"]
    completed = run("cifar10.py", *data, *network, "--output", "figure.png", folder=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "site-packages" not in completed.stderr
    assert "30 images to learn from, 40 to test on" in completed.stdout
    assert {name: share for name, (_, _, share) in read_table(completed.stdout).items()} == {
        "dense": "100%",
        "DRIVE, 50% sparse": "50%",
    }
    assert image_size(tmp_path / "figure.png")[0] == 1600


def test_cifar10__no_data_error(cifar10: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no CIFAR-10 in .*: neither cifar-10-batches-py/.* nor train/.* --download"):
        cifar10.load_images(tmp_path, "train", download=False)


def test_cifar10__augment(cifar10: ModuleType) -> None:
    """Every image is a window of itself, padded, or of its mirror image."""
    torch.manual_seed(0)
    images = torch.rand(50, 3, 8, 8)
    padded = F.pad(images, [4] * 4)
    for image, source in zip(cifar10.augment(images), padded, strict=True):
        windows = source.unfold(1, 8, 1).unfold(2, 8, 1).movedim(0, 2)  # row and column of the corner come first
        found = (windows == image).flatten(2).all(2).any()
        mirrored = (windows == image.flip(-1)).flatten(2).all(2).any()
        assert found or mirrored


def test_cifar10__resnet18(cifar10: ModuleType) -> None:
    ours, theirs = cifar10.resnet18(width=64), resnet18(num_classes=10)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert sum(parameter.numel() for parameter in ours.parameters()) == 11_173_962


@pytest.mark.slow
def test_methods(methods: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All methods run; what the results file has is not done again, and the table can be had without training."""
    few = ["--train-images", "128", "--test-images", "100", "--epochs", "2", "--warmup-epochs", "1", "--rounds", "3"]
    few += ["--cycles", "2", "--epochs-per-cycle", "1", "--seeds", "0", "--sparsity", "0.5", "--results", "runs.jsonl"]
    methods.main([*few, "--methods", *METHODS[:3]])
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"]["method"] for line in lines] == [*METHODS[:3]]

    finished = run("methods.py", *few, "--output", "figure.png", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "site-packages" not in finished.stderr
    assert "[1 of 3] SynFlow at 50%, seed 0" in finished.stdout
    assert (tmp_path / "runs.jsonl").read_text().splitlines()[:3] == lines
    rows = re.findall(rf"^ *(?:[\d.]+% +)?({'|'.join(METHODS)}) .* (\d+) *$", finished.stdout, re.MULTILINE)
    assert rows == [(method, "4" if method == "IMP" else "2") for method in METHODS]
    assert image_size(tmp_path / "figure.png") == (1400, 800)

    capsys.readouterr()
    methods.main([*few, "--show"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) > len(METHODS)
    assert finished.stdout.endswith(shown)


@pytest.mark.slow
def test_methods__cifar10(methods: ModuleType, tmp_path: Path) -> None:
    write_noise(tmp_path / "cifar", per_class=2)
    data = ["--data", "cifar", "--batch-size", "10", "--methods", "SynFlow", "DRIVE", "--sparsity", "0.9"]
    short = ["--epochs", "2", "--warmup-epochs", "1", "--rounds", "3", "--control", "shuffle", "--seeds", "0"]
    methods.main([*data, *short, "--results", "runs.jsonl"])
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [found["num_kept"] for found in runs] == [39_050, 39_050]  # of 390,496
    assert [found["settings"]["pruning"]["control"] for found in runs] == ["shuffle", "shuffle"]


def test_methods__all_settings(methods: ModuleType) -> None:
    """Seed by seed; dense once, whatever the sparsity; and the rarer the weights, the more cycles."""
    choice = ["--methods", "dense", "IMP", "--sparsity", "0.3", "0.98", "0.993", "--seeds", "3", "4"]
    found = methods.all_settings(methods.read_options(choice))
    assert [(each["seed"], each["method"], each["pruning"].get("cycles")) for each in found] == [
        (seed, *rest) for seed in (3, 4) for rest in [("dense", None), ("IMP", 1), ("IMP", 4), ("IMP", 5)]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sparsity 90", "--sparsity: these are fractions to remove, between 0 and 1"),
        ("--epochs 0", "--epochs: must be a whole number of at least 1, got 0"),
        ("--epochs 3", "--warmup-epochs: must be at least 0 and less than --epochs"),
        ("--seeds -1", "--seeds: must be at least 0"),
        ("--methods drive", "invalid choice: 'drive'"),
        ("--output figure.txt", "--output: must end in .png"),
        ("--results nowhere/runs.jsonl", "there is no folder nowhere for runs.jsonl"),
    ],
)
def test_methods__option_errors(
    methods: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        methods.main(arguments.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("text", ["no json", "5", '{"accuracy": 1}', '{"settings": {}, "more": 1}'])
def test_methods__results_error(methods: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "runs.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="does not hold results of this script"):
        methods.read_runs(tmp_path / "runs.jsonl")
