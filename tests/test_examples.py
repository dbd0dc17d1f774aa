"""The examples run as a user runs them, from the command line, and end with a table and a figure."""

import importlib
import importlib.util
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The example with LightningCLI, run in this process, in a folder that looks like the repository's root."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("cli_main", EXAMPLES / "cli" / "main.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(line: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["main.py", *shlex.split(line)])
        return module.main()

    return run


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


CLI_METHODS = {"drive": 10, "snip": 10, "synflow": 10, "imp": 22}  # with the epochs of each
CLI_FIT = "fit --config examples/cli/base.yaml --config examples/cli/{}.yaml"
CLI_QUICK = "--trainer.limit_train_batches=2 --trainer.enable_progress_bar=false --trainer.log_every_n_steps=1"


def test_cli__methods_have_files() -> None:
    assert {path.stem for path in (EXAMPLES / "cli").glob("*.yaml")} == {"base", *CLI_METHODS}


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # ModelCheckpoint, in a new version's folder
@pytest.mark.parametrize("method", CLI_METHODS)
def test_cli(cli: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str) -> None:
    """Every method prunes the network; validated, tested and trained on from its checkpoint, it stays as it is."""

    def check(run: Any) -> str:
        [callback, *_] = run.trainer.callbacks
        assert (callback.masks.num_kept, callback.masks.num_prunable) == (2_382, 23_824)
        for name, weight in run.model.named_parameters():
            if name in callback.masks:
                assert torch.equal(weight != 0, callback.masks[name])
        return callback.masks.digest()

    first = cli(f"{CLI_FIT.format(method)} {CLI_QUICK}")
    assert first.trainer.current_epoch == CLI_METHODS[method]
    digest = check(first)
    [checkpoint] = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")

    from_saved = f"--config lightning_logs/version_0/config.yaml --ckpt_path '{checkpoint}'"
    for subcommand in ("validate", "test"):
        assert check(cli(f"{subcommand} {from_saved}")) == digest
    assert "test_accuracy" in capsys.readouterr().out
    longer = cli(f"fit {from_saved} --trainer.max_epochs {CLI_METHODS[method] + 1}")
    assert longer.trainer.current_epoch == CLI_METHODS[method] + 1
    assert check(longer) == digest


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_cli__test_without_callback(cli: Any, tmp_path: Path) -> None:
    """The checkpoint is sparse by itself: to test it, `base.yaml` is enough."""
    cli(f"{CLI_FIT.format('snip')} {CLI_QUICK} --trainer.max_epochs 1")
    [checkpoint] = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    tested = cli(f"test --config examples/cli/base.yaml --ckpt_path '{checkpoint}'")
    weights = [weight for weight in tested.model.parameters() if weight.ndim > 1]
    assert sum(int(weight.count_nonzero()) for weight in weights) == 2_382


def test_cli__last_callbacks_count(cli: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As the header says: one method's file goes over another's, and callbacks are added on the command line."""
    more = "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val_loss --print_config"
    with pytest.raises(SystemExit, match="0"):
        cli(f"{CLI_FIT.format('drive')} --config examples/cli/snip.yaml {more}")
    found = re.findall(r"^  - class_path: .*\.(\w+)$", capsys.readouterr().out, re.MULTILINE)
    assert found == ["SNIPPruningCallback", "EarlyStopping"]


@pytest.mark.slow
def test_cli__script(tmp_path: Path) -> None:
    """The header's first command, as it stands there, and what a person sees of a wrong value."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    text = (EXAMPLES / "cli" / "main.py").read_text()
    [command] = re.findall(r"^ +python examples/cli/main.py (fit .*drive.yaml)$", text, re.MULTILINE)
    arguments = shlex.split(command)
    completed = run("cli/main.py", *arguments, folder=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "Warning" not in completed.stderr
    assert re.search(r"^all +23,824 +2,382 ", completed.stderr + completed.stdout, re.MULTILINE)
    assert len(list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))) == 1

    refused = run("cli/main.py", *arguments, "--trainer.callbacks.sparsity=90", folder=tmp_path)
    assert refused.returncode == 2
    assert [line for line in refused.stderr.splitlines() if "Seed set" not in line] == [
        "error: `sparsity` is the fraction removed and must be in [0, 1), got 90.0. For 90 % pass 0.9."
    ]
