"""The examples run as a user runs them, from the command line, and end with a table and a figure."""

import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import processes
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1]
ROW = re.compile(
    r"^ *(dense|DRIVE, .* sparse) +([\d.]+)% +([\d,]+) +([\d.]+%) +(-|[\d.]+ s) +[\d.]+ s *$", re.MULTILINE
)


def run(script: str, *arguments: str, folder: Path) -> CompletedProcess[str]:
    """Run an example in a folder, on the package of this checkout."""
    return processes.script(EXAMPLES / script, *arguments, folder=folder)


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
    assert all(image_size(tmp_path / f"digits-{kind}.png")[0] == 1200 for kind in ("density", "rounds", "scores"))


@pytest.mark.slow
def test_cifar10(tmp_path: Path) -> None:
    write_noise(tmp_path / "cifar", per_class=4)
    network = [
        "--network",
        "convnet",
        "--sparsity",
        "0",
        "0.5",
        "--epochs",
        "2",
        "--warmup-epochs",
        "1",
        "--rounds",
        "3",
    ]
    data = ["--data", "cifar", "--batch-size", "10", "--train-images", "30"]
    completed = run("cifar10.py", *data, *network, "--output", "figure.png", folder=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "site-packages" not in completed.stderr
    assert {name: share for name, (_, _, share) in read_table(completed.stdout).items()} == {
        "dense": "100%",
        "DRIVE, 50% sparse": "50%",
    }
    assert image_size(tmp_path / "figure.png")[0] == 1600
    assert {path.stem for path in tmp_path.glob("figure-*.png")} == {"figure-density", "figure-rounds", "figure-scores"}


def test_cifar10__no_data(tmp_path: Path) -> None:
    completed = run("cifar10.py", "--data", "nowhere", folder=tmp_path)
    assert completed.returncode == 1
    assert re.fullmatch(r".*cifar-10-batches-py/.*\n", completed.stderr)  # one line


@pytest.mark.slow
def test_compact(tmp_path: Path) -> None:
    """The default data, less of it: a row for each network, which is smaller and says the same."""
    line = "--epochs 1 --train-images 256 --rounds 5 --repeats 1 --method drive magnitude --sparsity 0.99"
    completed = run("compact.py", *shlex.split(line), "--output", "results.jsonl", folder=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "site-packages" not in completed.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["network"], row["data"], row["method"], row["weights_kept"]) for row in rows] == [
        ("digitnet", "digits", "drive", 238),
        ("digitnet", "digits", "magnitude", 238),
    ]
    for row in rows:
        assert row["parameters"][0] == 24_058 > row["parameters"][1]
        for key in ("channels", "multiply_adds", "dense_bytes", "sparse_bytes"):
            assert row[key][0] > row[key][1] > 0, key
        assert row["difference"] < 1e-4
        assert min(row["time_ratio"].values()) > 0

    again = run("compact.py", "--table", "results.jsonl", folder=tmp_path)
    assert again.stdout == completed.stdout
    assert re.findall(r"^\| (\w+) \| (\w+) \| (99%) \|.*\| 24,058 → ", again.stdout, re.MULTILINE) == [
        ("digitnet", "drive", "99%"),
        ("digitnet", "magnitude", "99%"),
    ]


def test_compact__page(tmp_path: Path) -> None:
    """The table of the page on `compact` is what its committed results give."""
    docs = EXAMPLES.parent / "docs"
    page = (docs / "compact.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- table begins -->")[2].partition("<!-- table ends -->")[0]
    assert shown.strip() == run("compact.py", "--table", str(docs / "compact.jsonl"), folder=tmp_path).stdout.strip()
    assert len(shown.strip().splitlines()) == 1 + 2 * (2 + 2 * 2 * 3)  # two tables: networks, sparsities, methods


@pytest.mark.slow
def test_compact__images(tmp_path: Path) -> None:
    """A tree of images, and a network in colour; and where there is nothing."""
    write_noise(tmp_path / "noise", per_class=4)
    line = "--epochs 1 --batch-size 10 --rounds 2 --repeats 1 --method synflow --sparsity 0.98"
    completed = run("compact.py", "--data", "noise", *shlex.split(line), folder=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert len(re.findall(r"^\| convnet \| synflow \| 98% \|.*\| 391,466 → ", completed.stdout, re.MULTILINE)) == 1
    missing = run("compact.py", "--data", "nowhere", folder=tmp_path)
    assert missing.returncode == 1
    assert len(missing.stderr.splitlines()) == 1


CLI_METHODS = {"drive": 10, "snip": 10, "synflow": 10, "imp": 22, "gradual": 10}  # with the epochs of each
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


def test_accelerate(tmp_path: Path) -> None:
    """The accelerated network is as good as the sparse one, and all layers are in the tables."""
    done = run("accelerate.py", "--width", "128", "--epochs", "6", "--sparsity", "0.9", folder=tmp_path)
    accuracies = re.findall(r"([\d.]+)% of the test images", done.stdout)
    assert len(accuracies) == 3
    assert float(accuracies[1]) > 80
    assert accuracies[2] == accuracies[1]
    assert re.findall(r"^(net\.\d(?:\.weight)?) ", done.stdout, re.MULTILINE) == [
        *(f"net.{layer}.weight" for layer in (1, 3, 5)),
        *(f"net.{layer}" for layer in (1, 3, 5)),
        *(f"net.{layer}" for layer in (1, 3, 5)),
    ]
    assert "training step: " in done.stdout
