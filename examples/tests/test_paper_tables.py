"""What the tables and figures of the paper's experiments show is what stands in the results file, and nothing else."""

import importlib
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.colors import to_hex
from PIL import Image

PAPER = Path(__file__).parents[1] / "paper"
LINE: dict[str, Any] = {
    "experiment": "alexnet_cifar10",
    "method": "drive",
    "control": "none",
    "sparsity": 0.98,
    "seed": 0,
    "data": "CIFAR-10 (JPEG)",
    "train_images": 50000,
    "test_images": 10000,
    "batch_size": 256,
    "epochs": 50,
    "total_epochs": 50,
    "accuracy": 0.8,
    "num_weights": 1000,
    "num_kept": 20,
    "effective_sparsity": None,
    "seconds": {"warmup": 4.0, "pruning": 6.0, "training": 80.0},
    "digest": "d",
    "warnings": [],
    "overrides": [],
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
    "hardware": "a CPU",
    "revision": "f9ea891",
    "date": "2026-11-25",
}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a module as Python does that runs `tables.py`: its folder comes first."""
    monkeypatch.syspath_prepend(PAPER)
    return importlib.import_module(name)


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("results", monkeypatch)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("published", monkeypatch)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("figures", monkeypatch)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("tables", monkeypatch)


@pytest.fixture
def make(results: ModuleType) -> Callable[..., Any]:
    """Make a run that differs from LINE in some fields."""
    return lambda **changes: results.Run(**{**LINE, **changes})


@pytest.fixture
def seeds(make: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Make a run for every accuracy in percent, with seeds 0, 1 and so on."""

    def runs(method: str, sparsity: float, percents: Sequence[float], **changes: Any) -> list[Any]:
        common = {"method": method, "sparsity": sparsity, **changes}
        return [make(seed=seed, accuracy=value / 100, **common) for seed, value in enumerate(percents)]

    return runs


@pytest.fixture
def alexnet(seeds: Callable[..., list[Any]]) -> list[Any]:
    """AlexNet's runs: golden means and deviations are those of these lines, by hand."""
    times = {"warmup": 0.0, "pruning": 0.0, "training": 100.0}
    return [
        *seeds("dense", 0.0, [84, 85], seconds=times),  # 84.5 ± 0.7071
        *seeds("snip", 0.98, [72.0], seconds={**times, "pruning": 2.0}),
        *seeds("drive", 0.98, [83, 85, 87]),  # 85 ± 2
        *seeds("drive", 0.993, [74.0, 75.0]),  # 74.5 ± 0.7071
        *seeds("imp", 0.98, [80, 82], total_epochs=1050, seconds={**times, "pruning": 900.0}),  # 81 ± 1.4142
        *seeds("imp", 0.993, [77.24], total_epochs=1050, seconds={**times, "pruning": 2100.0}),
    ]


@pytest.fixture
def convnet(seeds: Callable[..., list[Any]]) -> list[Any]:
    own = {"experiment": "convnet_cifar10"}
    return [
        *seeds("drive", 0.98, [60, 61], **own),
        *seeds("drive", 0.98, [56, 57], **own, control="shuffle"),
        *seeds("drive", 0.98, [60.1], **own, control="reinit"),
        *seeds("snip", 0.9, [63.0], **own),
        *seeds("snip", 0.9, [62.5], **own, control="shuffle"),
        *seeds("synflow", 0.98, [50.0], **own, control="shuffle"),
        *seeds("iterative_snip", 0.98, [58.5], **own, epochs=50),
        *seeds("drive_long", 0.98, [62.0], **own, epochs=150, total_epochs=150),
    ]


def write(path: Path, runs: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(asdict(run)) + "\n" for run in runs), encoding="utf-8")
    return path


def rows(table: Any) -> dict[str, dict[str, str]]:
    """Name of each row to its cells by heading."""
    return {row[0]: dict(zip(table.headings[1:], row[1:], strict=True)) for row in table.rows}


def test_run__properties(make: Callable[..., Any]) -> None:
    run = make()
    assert run.key == ("alexnet_cifar10", "drive", "none", 0.98, 0)
    assert run.seconds_to_masks == 10
    assert run.total_seconds == 90


def test_append(results: ModuleType, make: Callable[..., Any], tmp_path: Path) -> None:
    """A line has the fields in the order of the schema; reading gives the runs back, file by file."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    runs = [make(seed=seed, data="Übung") for seed in range(3)]
    for run, path in zip(runs, (first, second, first), strict=True):
        results.append(path, run)
    line = first.read_text(encoding="utf-8").splitlines()[0]
    assert '"data": "Übung"' in line
    assert list(json.loads(line)) == list(LINE) == [field.name for field in fields(results.Run)]
    assert results.read([first, second], results.Run) == [runs[0], runs[2], runs[1]]


def test_append__reaches_the_disk(
    results: ModuleType, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system is told to keep the line when it has all of it."""
    path, sizes = tmp_path / "a.jsonl", []
    monkeypatch.setattr("os.fsync", lambda _: sizes.append(path.stat().st_size))
    results.append(path, make())
    assert sizes == [path.stat().st_size]


def test_append__no_nan(results: ModuleType, make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        results.append(tmp_path / "a.jsonl", make(effective_sparsity=math.nan))


def test_append__waits(results: ModuleType, make: Callable[..., Any], tmp_path: Path) -> None:
    """Nobody writes while somebody else does."""
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "a.jsonl"
    writer = threading.Thread(target=results.append, args=(path, make()))
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(timeout=0.3)
        assert writer.is_alive()
        assert not path.read_bytes()
    writer.join(timeout=10)
    assert results.read([path], results.Run) == [make()]


def test_append__after_a_torn_line(results: ModuleType, make: Callable[..., Any], tmp_path: Path) -> None:
    """Only the torn line is lost, and it is reported until someone deletes it."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"experiment": "alex')
    results.append(path, make())
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: is not JSON"):
        results.read([path], results.Run)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert results.read([path], results.Run) == [make()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "no"}, r"`control` must be one of none, shuffle, reinit, got 'no'"),
        ({"sparsity": 98.0}, r"`sparsity` is the fraction removed and must be in \[0, 1\), got 98\.0"),
        ({"sparsity": 0.0}, r"`sparsity` must be 0 for a dense run and for no other, got 0\.0"),
        ({"method": "dense"}, r"`sparsity` must be 0 for a dense run and for no other, got 0\.98"),
        ({"accuracy": 58.1}, r"`accuracy` is a fraction and must be in \[0, 1\], got 58\.1"),
        ({"accuracy": "0.5"}, r"`accuracy` must be float, got '0\.5'"),
        ({"epochs": 1.5}, r"`epochs` must be int, got 1\.5"),
        ({"data": None}, r"`data` must be str, got None"),
        ({"warnings": "none"}, r"`warnings` must be list, got 'none'"),
        ({"versions": []}, r"`versions` must be dict, got \[\]"),
        ({"effective_sparsity": "0.9"}, r"`effective_sparsity` must be float \| None, got '0\.9'"),
        ({"seconds": {"training": 1.0}}, "`seconds` must have warmup, pruning, training, got training"),
        ({"seconds": {"warmup": 0, "pruning": -1, "training": 1}}, "`seconds` must be finite numbers of at least 0"),
        ({"seconds": {"warmup": 0, "pruning": "1", "training": 1}}, "`seconds` must be finite numbers of at least 0"),
        ({"seconds": {"warmup": 0, "pruning": math.inf, "training": 1}}, "`seconds` must be finite numbers"),
        ({"lr": 0.1}, "lacks nothing, and has unknown lr"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_read__bad_value_error(results: ModuleType, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps({**LINE, **changes}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}"):
        results.read([path], results.Run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(LINE)[:-9], "is incomplete, since its process was stopped"),
        (json.dumps(LINE), "is incomplete"),
        ("{]\n", "is not JSON"),
        ("\n", "is not JSON"),
        ("[1]\n", "is not a JSON object"),
        ('{"seed": 1}\n', r"lacks experiment, .*, date, and has unknown nothing"),
    ],
    ids=["torn", "without-newline", "syntax", "blank", "list", "lacking"],
)
def test_read__bad_line_error(results: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}"):
        results.read([path], results.Run)


def test_published(results: ModuleType, published: ModuleType) -> None:
    assert published.ACCURACIES.keys() == published.UNPRUNED.keys()
    assert list(published.UNPRUNED) == list(results.EXPERIMENTS)[:8]
    for experiment, curves in published.ACCURACIES.items():
        high = (0.7, 0.8, 0.9, 0.95) if "imagenet32" in experiment else (0.9, 0.95, 0.98, 0.993)
        assert {tuple(curve) for curve in curves.values()} == {high}
        assert {"drive", "imp"} <= curves.keys() <= {"snip", "synflow", "drive", "imp"}
        assert "snip" not in curves or "tiny" not in experiment
    last_but_one = [list(curves["drive"].values())[2] for curves in published.ACCURACIES.values()]
    assert last_but_one == [85.37, 91.36, 89.86, 61.58, 60.30, 42.25, 42.79, 40.97]
    # Sums over the paper's tables as design.md copies them: of 28 rows with 4 figures each, and of what is unpruned.
    total = sum(sum(curve.values()) for curves in published.ACCURACIES.values() for curve in curves.values())
    assert total == pytest.approx(7234.86)
    assert sum(published.UNPRUNED.values()) == pytest.approx(554.56)
    assert published.PRUNING_SECONDS["resnet18_cifar10"] == {"snip": 2, "synflow": 3, "drive": 270, "imp": 21000}
    speed_up = {name: seconds["imp"] / seconds["drive"] for name, seconds in published.PRUNING_SECONDS.items()}
    assert speed_up == pytest.approx({"alexnet_cifar10": 109, "resnet18_cifar10": 78, "resnet18_imagenet32": 869}, 0.01)


def test_accuracies(results: ModuleType, alexnet: list[Any]) -> None:
    """Mean and sample deviation in percent; the order is that of the methods, whatever that of the lines."""
    found = results.accuracies(alexnet[::-1])
    assert [(method, sparsity) for method, _, sparsity in found] == [
        ("dense", 0.0),
        ("snip", 0.98),
        ("drive", 0.98),
        ("drive", 0.993),
        ("imp", 0.98),
        ("imp", 0.993),
    ]
    drive = found["drive", "none", 0.98]
    assert (drive.mean, drive.deviation, drive.count) == (pytest.approx(85), pytest.approx(2), 3)
    snip = found["snip", "none", 0.98]
    assert (snip.mean, snip.deviation, snip.count) == (72, None, 1)


def test_accuracy_table(tables: ModuleType, alexnet: list[Any]) -> None:
    table = tables.all_tables(alexnet)[0]
    assert table.title == "Table 1. AlexNet, CIFAR-10: test accuracy in % at a sparsity of"
    assert rows(table) == {
        "SNIP": {"98%": "72.00 (n=1)\npaper 72.95 (-0.95)", "99.3%": "not run\npaper 58.35"},
        "SynFlow": {"98%": "not run\npaper 78.61", "99.3%": "not run\npaper 66.64"},
        "DRIVE": {
            "98%": "85.00 ± 2.00 (n=3)\npaper 85.37 (-0.37)",
            "99.3%": "74.50 ± 0.71 (n=2)\npaper 74.49 (+0.01)",
        },
        "IMP": {
            "98%": "81.00 ± 1.41 (n=2)\npaper 80.57 (+0.43)",
            "99.3%": "77.24 (n=1)\npaper 76.24 **(+1.00)**",
        },
    }
    assert table.caption[0] == "Dense: 84.50 ± 0.71 (n=2); paper 84.20 (+0.30)"


def test_accuracy_table__own_experiment(tables: ModuleType, seeds: Callable[..., list[Any]]) -> None:
    """Without a figure of the paper's, there are only ours, and only of methods that ran."""
    runs = [*seeds("magnitude", 0.9, [62.0], experiment="digits"), *seeds("imp", 0.95, [70.0], experiment="digits")]
    table = tables.all_tables(runs)[0]
    assert rows(table) == {
        "Magnitude": {"90%": "62.00 (n=1)", "95%": "not run"},
        "IMP": {"90%": "not run", "95%": "70.00 (n=1)"},
    }
    assert table.caption[0] == "Dense: not run"


def test_accuracy_table__imagenet(tables: ModuleType, seeds: Callable[..., list[Any]]) -> None:
    table = tables.all_tables(seeds("imp", 0.95, [30.0], experiment="resnet18_imagenet32"))[0]
    assert table.title.startswith("Table 2. ResNet-18, ImageNet at 32x32")
    assert rows(table)["IMP"] == {"95%": "30.00 (n=1)\npaper 33.94 **(-3.94)**"}


def test_accuracy_table__warnings(tables: ModuleType, seeds: Callable[..., list[Any]]) -> None:
    runs = [*seeds("snip", 0.993, [10, 11], warnings=["layer collapse"]), *seeds("drive", 0.993, [70.0])]
    accuracy, time = tables.all_tables(runs)
    assert accuracy.caption[-1] == "Runs that gave warnings: SNIP at 99.3% (2)."
    assert "warnings" not in " ".join(time.caption)


def test_time_table(tables: ModuleType, alexnet: list[Any]) -> None:
    """Means over seeds and sparsities; IMP takes (900 + 900 + 2,100) / 3 = 1,300 seconds, DRIVE 4 + 6."""
    table = tables.all_tables(alexnet)[1]
    names = ["runs", "epochs in all", "time to masks", "training", "total", "masks faster than IMP's"]
    names += ["paper, RTX A6000: time to masks", "paper: faster than IMP's"]
    assert list(table.headings) == ["method", *names]
    assert [list(row) for row in table.rows] == [
        ["dense", "2", "50", "-", "100 ± 0 s", "100 ± 0 s", "-", "-", "-"],
        ["SNIP", "1", "50", "2.0 s", "100 s", "102 s", "650x", "3 s", "8,000x"],
        ["DRIVE", "5", "50", "10.0 ± 0.0 s", "80.0 ± 0.0 s", "90.0 ± 0.0 s", "130x", "220 s", "109x"],
        ["IMP", "3", "1,050", "1,300 ± 693 s", "100 ± 0 s", "1,400 ± 693 s", "-", "24,000 s", "-"],
    ]


def test_time_table__without_imp(tables: ModuleType, seeds: Callable[..., list[Any]]) -> None:
    """Nothing to compare with, here or in the paper; short times have two digits."""
    runs = seeds("snip", 0.9, [60.0], experiment="digits", seconds={"warmup": 0, "pruning": 0.25, "training": 9})
    table = tables.all_tables(runs)[1]
    assert [list(row) for row in table.rows] == [["SNIP", "1", "50", "0.25 s", "9.0 s", "9.2 s", "-"]]


@pytest.mark.parametrize("other", [{"hardware": "another"}, {"versions": {"torch": "9.9"}}], ids=str)
def test_time_table__elsewhere(
    tables: ModuleType, figures: ModuleType, seeds: Callable[..., list[Any]], other: dict[str, Any]
) -> None:
    """Times of different machines or versions are not compared; their accuracies are."""
    own = {"experiment": "digits"}
    runs = [*seeds("snip", 0.9, [60.0, 61.0], **own), *seeds("drive", 0.9, [62.0], **own, **other)]
    accuracy, time = tables.all_tables(runs)
    assert (list(rows(accuracy)), list(rows(time))) == (["SNIP", "DRIVE"], ["SNIP"])
    assert time.caption[-1].endswith("on another machine or with other versions: DRIVE.")
    [axes] = figures.draw_times(compare(figures, runs)).axes
    assert [label.get_text().split("\n")[0] for label in axes.get_yticklabels()] == ["SNIP"]


def test_control_table(tables: ModuleType, convnet: list[Any]) -> None:
    """Only what was controlled is there, next to the same method at the same sparsity."""
    _, _, table, *_ = tables.all_tables(convnet)
    assert "shuffled" in table.title
    assert rows(table) == {
        "SNIP, 90%": {"none": "63.00 (n=1)", "shuffle": "62.50 (n=1)\n(-0.50)", "reinit": "not run"},
        "SynFlow, 98%": {"none": "not run", "shuffle": "50.00 (n=1)", "reinit": "not run"},
        "DRIVE, 98%": {
            "none": "60.50 ± 0.71 (n=2)",
            "shuffle": "56.50 ± 0.71 (n=2)\n**(-4.00)**",
            "reinit": "60.10 (n=1)\n(-0.40)",
        },
    }


def test_ablation_table(tables: ModuleType, convnet: list[Any]) -> None:
    """Differences are those to DRIVE at the same sparsity, and controls do not count."""
    *_, table, as_long_as_imp = tables.all_tables(convnet)
    assert "DRIVE's parts" in table.title
    assert rows(table) == {
        "SNIP": {"90%": "63.00 (n=1)", "98%": "not run"},
        "iterative SNIP": {"90%": "not run", "98%": "58.50 (n=1)\n**(-2.00)**"},
        "DRIVE": {"90%": "not run", "98%": "60.50 ± 0.71 (n=2)"},
        "DRIVE, as long as IMP": {"90%": "not run", "98%": "62.00 (n=1)\n**(+1.50)**"},
    }
    assert "50 or 150 epochs" in table.caption[-1]
    assert rows(as_long_as_imp) == {"DRIVE, as long as IMP": {"98%": "62.00 (n=1)"}}


def test_ablation_table__gradual(tables: ModuleType, seeds: Callable[..., list[Any]]) -> None:
    """Variants of gradual pruning are compared with DRIVE, and those that train longer with IMP."""
    own = {"experiment": "convnet_cifar10"}
    runs = [
        *seeds("drive", 0.98, [60, 61], **own),
        *seeds("gradual", 0.98, [64.0], **own),
        *seeds("gradual_exponential", 0.98, [64.5], **own),
        *seeds("gradual_exponential_long", 0.98, [68.0], **own, total_epochs=85),
        *seeds("imp", 0.98, [66.0], **own, total_epochs=85),
    ]
    variants, as_long_as_imp = tables.all_tables(runs)[-2:]
    assert rows(variants) == {
        "DRIVE": {"98%": "60.50 ± 0.71 (n=2)"},
        "gradual": {"98%": "64.00 (n=1)\n**(+3.50)**"},
        "gradual, exponential": {"98%": "64.50 (n=1)\n**(+4.00)**"},
    }
    assert rows(as_long_as_imp) == {
        "gradual, exponential, as long as IMP": {"98%": "68.00 (n=1)\n**(+2.00)**"},
        "IMP": {"98%": "66.00 (n=1)"},
    }


def test_all_tables__only_where_runs_are(tables: ModuleType, alexnet: list[Any], convnet: list[Any]) -> None:
    """Experiments come in a fixed order; runs of controls and ablations are in no table of accuracies or times."""
    titles = [table.title for table in tables.all_tables([*convnet, *alexnet])]
    assert [title.split(":")[0] for title in titles] == [
        "Table 1. AlexNet, CIFAR-10",
        "AlexNet, CIFAR-10",
        "Table 1. Small ConvNet, CIFAR-10 (our own protocol)",
        *["Small ConvNet, CIFAR-10 (our own protocol)"] * 4,
    ]
    accuracy, time = tables.all_tables(convnet)[:2]
    assert list(rows(accuracy)) == list(rows(time)) == ["SNIP", "DRIVE"]
    assert rows(time)["DRIVE"]["runs"] == "2"


def test_measured_on(tables: ModuleType, make: Callable[..., Any]) -> None:
    assert tables.measured_on([make()]) == [
        "Measured on CIFAR-10 (JPEG), 50,000 images to train on and 10,000 to test on; batches of 256; 50 epochs; "
        "seed 0; a CPU; python 3.11.7, torch 2.14.1; 2026-11-25; revision f9ea891."
    ]


def test_measured_on__differences(tables: ModuleType, make: Callable[..., Any]) -> None:
    """Whatever differs is listed in full, and so is what the command line changed, but for the folder."""
    other = {"seed": 3, "data": "CIFAR-10", "train_images": 1000, "batch_size": 64, "epochs": 5, "hardware": "a GPU"}
    other |= {"versions": {"python": "3.11.7", "torch": "2.15.0"}, "revision": "abc", "date": "2026-11-24"}
    overrides = ["--data.root=/data", "--trainer.max_epochs=5"]
    runs = [make(overrides=["--x=1"]), make(**other, overrides=[*overrides, "--x=1"])]
    assert tables.measured_on(runs) == [
        "Measured on CIFAR-10 (JPEG), 50,000 images to train on and 10,000 to test on or "
        "CIFAR-10, 1,000 images to train on and 10,000 to test on; batches of 256 or 64; 50 or 5 epochs; "
        "seeds 0, 3; a CPU or a GPU; python 3.11.7, torch 2.14.1 or 2.15.0; 2026-11-24 or 2026-11-25; "
        "revision f9ea891 or abc; with `--x=1`, `--trainer.max_epochs=5` in 1 of 2 runs."
    ]


def test_main(tables: ModuleType, alexnet: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of several files is printed: cells line by line, without marks of Markdown."""
    alexnet[:2] = [replace(run, overrides=["--x=[red]"]) for run in alexnet[:2]]
    files = [write(tmp_path / "a.jsonl", alexnet[:4]), write(tmp_path / "b.jsonl", alexnet[4:])]
    tables.main([str(file) for file in files])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Table 1. AlexNet, CIFAR-10: test accuracy in % at a sparsity of"
    place = lines.index("IMP 81.00 ± 1.41 (n=2) 77.24 (n=1)")
    assert lines[place + 1] == "paper 80.57 (+0.43) paper 76.24 (+1.00)"
    assert "Dense: 84.50 ± 0.71 (n=2); paper 84.20 (+0.30)" in lines
    assert "AlexNet, CIFAR-10: time to masks (warm-up and pruning, in IMP all cycles) and in all" in lines
    assert sum(line.startswith("Measured on CIFAR-10 (JPEG), 50,000 images") for line in lines) == 2
    assert " ".join(lines).count("with `--x=[red]` in 2 of 11 runs.") == 2


def test_main__only_dense(
    tables: ModuleType, seeds: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to draw yet."""
    path = write(tmp_path / "a.jsonl", seeds("dense", 0.0, [84, 85]))
    tables.main([str(path), "--figures", str(tmp_path / "figures")])
    assert "Dense: 84.50 ± 0.71 (n=2); paper 84.20 (+0.30)" in capsys.readouterr().out
    assert not list((tmp_path / "figures").iterdir())


def test_main__markdown(tables: ModuleType, alexnet: list[Any], tmp_path: Path) -> None:
    """What stood between the marks is replaced; all else stays as it is, byte by byte, and once is as good as twice."""
    path, page = write(tmp_path / "a.jsonl", alexnet), tmp_path / "README.md"
    before, after = b"# Title\r\n\xff\xfe <!-- tables.py begins -->", b"<!-- tables.py ends --> text\r\n\n\nno newline"
    page.write_bytes(before + b"\n| old |\n" + after)
    tables.main([str(path), "--markdown", str(page)])
    written = page.read_bytes()
    assert written.startswith(before + b"\n\n**Table 1. AlexNet, CIFAR-10: test")
    assert written.endswith(b".\n\n" + after)
    assert b"old" not in written
    assert b"revision f9ea891.\n\n**AlexNet, CIFAR-10: time to masks" in written
    lines = written[len(before) : -len(after)].decode().splitlines()
    assert lines[4:6] == ["| method | 98% | 99.3% |", "| --- | ---: | ---: |"]
    cells = ["81.00 ± 1.41 (n=2)<br>paper 80.57 (+0.43)", "77.24 (n=1)<br>paper 76.24 **(+1.00)**"]
    assert f"| IMP | {cells[0]} | {cells[1]} |" in lines
    assert "Dense: 84.50 ± 0.71 (n=2); paper 84.20 (+0.30)" in lines
    assert sum(line.startswith("Measured on CIFAR-10 (JPEG)") for line in lines) == 2

    tables.main([str(path), "--markdown", str(page)])
    assert page.read_bytes() == written


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- tables.py begins -->",
        "<!-- tables.py ends -->",
        "<!-- tables.py ends --><!-- tables.py begins -->",
        "<!-- tables.py begins --><!-- tables.py begins --><!-- tables.py ends -->",
        "<!-- tables.py begins --><!-- tables.py ends --><!-- tables.py ends -->",
    ],
    ids=["none", "no-end", "no-begin", "reversed", "two-begins", "two-ends"],
)
def test_main__marks_error(tables: ModuleType, alexnet: list[Any], tmp_path: Path, text: str) -> None:
    path, page = write(tmp_path / "a.jsonl", alexnet), tmp_path / "README.md"
    page.write_text(text, encoding="utf-8")
    message = r"README\.md must have <!-- tables\.py begins --> and below it <!-- tables\.py ends -->, each once"
    with pytest.raises(SystemExit, match=message):
        tables.main([str(path), "--markdown", str(page)])
    assert page.read_text(encoding="utf-8") == text


def test_main__error(tables: ModuleType, make: Callable[..., Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [])
    with pytest.raises(SystemExit, match=r"There is no finished run in .*a\.jsonl, .*a\.jsonl\."):
        tables.main([str(path), str(path)])
    with pytest.raises(SystemExit, match=r"No such file or directory: '.*b\.jsonl'"):
        tables.main([str(tmp_path / "b.jsonl")])
    path.write_text("{\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"a\.jsonl, line 1: is not JSON"):
        tables.main([str(path)])
    write(path, [make()])
    with pytest.raises(SystemExit, match=r"No such file or directory: '.*README\.md'"):
        tables.main([str(path), "--markdown", str(tmp_path / "README.md")])
    with pytest.raises(SystemExit, match=r"File exists: '.*a\.jsonl'"):
        tables.main([str(path), "--figures", str(path)])


def test_main__duplicates_error(tables: ModuleType, make: Callable[..., Any], tmp_path: Path) -> None:
    """The same run is refused, though its accuracy differs; other seeds, controls and sparsities are other runs."""
    runs = [make(), make(seed=1), make(control="shuffle"), make(sparsity=0.9)]
    first, second = write(tmp_path / "a.jsonl", runs), write(tmp_path / "b.jsonl", [make(seed=1, accuracy=0.1)])
    tables.main([str(first)])
    message = r"twice, delete all but one: alexnet_cifar10, drive, control none, sparsity 0\.98, seed 1\.$"
    with pytest.raises(SystemExit, match=message):
        tables.main([str(first), str(second)])


@pytest.mark.parametrize(
    "change",
    [
        {"data": "CIFAR-10"},
        {"train_images": 1},
        {"test_images": 1},
        {"batch_size": 1},
        {"epochs": 1},
        {"total_epochs": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_main__mixture_error(
    tables: ModuleType, make: Callable[..., Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    """A mean is one of seeds, and of nothing else; hardware and versions may differ, as captions say so."""
    fine = [make(), make(seed=1, hardware="a GPU", revision="x"), make(method="imp", seed=1, **change)]
    tables.main([str(write(tmp_path / "a.jsonl", fine))])
    message = r"the same data, batch size and epochs: alexnet_cifar10, drive, control none, sparsity 0\.98, seed 2\.$"
    with pytest.raises(SystemExit, match=message):
        tables.main([str(write(tmp_path / "a.jsonl", [*fine, make(seed=2, **change)]))])


def test_main__figures(
    tables: ModuleType, alexnet: list[Any], convnet: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every figure that there are runs for, in the size that fits a README; our ConvNet has no IMP here."""
    folder = tmp_path / "new" / "figures"
    tables.main([str(write(tmp_path / "a.jsonl", [*alexnet, *convnet])), "--figures", str(folder)])
    names = [f"alexnet_cifar10_figure{number}.png" for number in (2, 3, 5, 6)]
    names += [f"convnet_cifar10_figure{number}.png" for number in (2, 5, 6)]
    assert sorted(path.name for path in folder.iterdir()) == names
    printed = capsys.readouterr().out.replace("\n", "")
    for name in names:
        assert str(folder / name) in printed
        with Image.open(folder / name) as image:
            image.load()
            assert image.size == (1600, 960)


def compare(figures: ModuleType, runs: list[Any]) -> Any:
    (comparison,) = figures.select(runs)
    return comparison


def labels(figure: Any) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def curves(figures: ModuleType, axes: Any, style: str) -> dict[str, list[float]]:
    """Method to the values of its line, for lines of one style."""
    methods = {colour: method for method, colour in figures.COLOURS.items()}
    chosen = [line for line in axes.get_lines() if line.get_linestyle() == style and is_curve(axes, line)]
    return {methods[line.get_color()]: list(line.get_ydata()) for line in chosen}


def levels(axes: Any) -> dict[str, float]:
    """Style to the height of each line across the figure."""
    return {line.get_linestyle(): line.get_ydata()[0] for line in axes.get_lines() if not is_curve(axes, line)}


def shown_names(axis: Any) -> list[Any]:
    """Names of ticks, but for those beyond the ends of the axis."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]


def is_curve(axes: Any, line: Any) -> bool:
    return bool(line.get_transform() == axes.transData)


def bars(figures: ModuleType, axes: Any) -> list[tuple[str, bool, Any]]:
    """Each bar's method, whether it is hollow, and its height, from left to right."""
    methods = {to_hex(colour): method for method, colour in figures.COLOURS.items()}
    found = []
    for bar in sorted(axes.patches, key=lambda bar: bar.get_x()):
        hollow = bar.get_facecolor()[3] == 0
        found.append(
            (methods[to_hex(bar.get_edgecolor() if hollow else bar.get_facecolor())], hollow, bar.get_height())
        )
    return found


def whiskers(axes: Any) -> list[tuple[float, float]]:
    """Lower and upper end of each error bar."""
    segments = [segment for collection in axes.collections for segment in collection.get_segments()]
    return [(segment[0][1], segment[1][1]) for segment in segments if len(segment)]


def approximately(values: dict[str, list[float]]) -> dict[str, Any]:
    return {name: pytest.approx(value) for name, value in values.items()}


def test_select(figures: ModuleType, alexnet: list[Any], convnet: list[Any], seeds: Callable[..., list[Any]]) -> None:
    """Controls and ablations are left out, and so are experiments in which nothing was pruned."""
    chosen = figures.select([*convnet, *alexnet, *seeds("dense", 0.0, [99.0], experiment="digits")])
    assert [run.experiment for run in chosen] == ["alexnet_cifar10", "convnet_cifar10"]
    assert list(chosen[0].runs) == alexnet
    assert {(run.method, run.control) for run in chosen[1].runs} == {("drive", "none"), ("snip", "none")}


def test_draw_accuracies__left_out(figures: ModuleType, convnet: list[Any], alexnet: list[Any]) -> None:
    """What has runs and no curve is named, by its title; where nothing is left out, nothing is said."""
    figure = figures.draw_accuracies(compare(figures, convnet))
    assert note(figure) == "Not shown: iterative SNIP; DRIVE, as long as IMP"
    assert note(figures.draw_accuracies(compare(figures, alexnet))) == ""


def note(figure: Any) -> str:
    [legend] = figure.legends
    text = legend.get_title().get_text()
    return "" if text == "None" else text


def test_draw_accuracies__much_left_out(figures: ModuleType, seeds: Callable[..., list[Any]]) -> None:
    """All names stay inside the picture, and off the axes."""
    runs = [run for method in figures.METHODS for run in seeds(method, 0.9 if method != "dense" else 0.0, [60, 61])]
    figure = figures.draw_accuracies(compare(figures, runs))
    figure.draw_without_rendering()
    box = figure.legends[0].get_title().get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert not box.overlaps(figure.axes[0].xaxis.label.get_window_extent())


def test_own_methods(figures: ModuleType, tables: ModuleType, seeds: Callable[..., list[Any]]) -> None:
    """They come last, in the main table and with styles of their own, for as many as there are some."""
    names = [f"own{index}" for index in range(len(figures.SPARE) + 1)]
    runs = [run for name in ("snip", *names) for run in seeds(name, 0.9, [60, 61])]
    table, *_ = tables.all_tables(runs)
    assert [row[0] for row in table.rows][-len(names) :] == names
    comparison = compare(figures, runs)
    styles = [comparison.styles[name] for name in ("snip", *names[:-1])]
    assert len({to_hex(colour) for colour, _ in styles}) == len({marker for _, marker in styles}) == len(names)
    assert comparison.left_out == [names[-1]]
    figure = figures.draw_accuracies(comparison)
    assert note(figure) == f"Not shown: {names[-1]}"
    assert set(names[:-1]) < set(labels(figure))


def test_styles(figures: ModuleType) -> None:
    """No two methods share a colour or a marker."""
    colours, markers = zip(*figures.STYLES.values(), strict=True)
    assert len({figures.GREY, *colours}) == 1 + len(figures.STYLES)
    assert len(set(markers)) == len(figures.STYLES)


def test_draw_bars(figures: ModuleType, alexnet: list[Any]) -> None:
    """At the highest sparsity, with the paper's hollow bar on the right of ours."""
    figure = figures.draw_bars(compare(figures, alexnet))
    (axes,) = figure.axes
    assert bars(figures, axes) == [
        ("snip", True, 58.35),
        ("synflow", True, 66.64),
        ("drive", False, pytest.approx(74.5)),
        ("drive", True, 74.49),
        ("imp", False, pytest.approx(77.24)),
        ("imp", True, 76.24),
    ]
    spread = math.sqrt(0.5)
    assert whiskers(axes) == [pytest.approx((74.5 - spread, 74.5 + spread))]  # IMP has one seed
    assert [label.get_text() for label in axes.get_xticklabels()] == ["SNIP", "SynFlow", "DRIVE", "IMP"]
    assert [text.get_text() for text in axes.texts] == ["58.4", "66.6", "74.5", "74.5", "77.2", "76.2"]
    assert levels(axes) == {"-": pytest.approx(84.5), "--": 84.2}
    assert labels(figure) == ["ours, mean ± standard deviation", "paper", "dense", "dense, paper"]
    assert axes.get_ylabel() == "test accuracy (%)"
    assert figure.get_suptitle() == "AlexNet, CIFAR-10\nTest accuracy at 99.3% sparsity"
    assert axes.get_title() == "CIFAR-10 (JPEG), 50,000 training images, 50 epochs, 1 to 3 seeds\na CPU"


def test_draw_bars__without_paper(figures: ModuleType, convnet: list[Any]) -> None:
    """Each bar stands above its name; there is no dense network here."""
    figure = figures.draw_bars(compare(figures, convnet))
    (axes,) = figure.axes
    assert bars(figures, axes) == [("drive", False, pytest.approx(60.5))]
    (bar,) = axes.patches
    assert bar.get_x() + bar.get_width() / 2 == pytest.approx(0)
    assert labels(figure) == ["ours, mean ± standard deviation"]


def test_draw_differences(figures: ModuleType, alexnet: list[Any]) -> None:
    """Ours are means over seeds minus IMP's, and the paper's those of its own figures."""
    figure = figures.draw_differences(compare(figures, alexnet))
    (axes,) = figure.axes
    assert curves(figures, axes, "-") == approximately({"snip": [72 - 81], "drive": [85 - 81, 74.5 - 77.24]})
    assert curves(figures, axes, "--") == approximately(
        {
            "snip": [83.09 - 85.76, 79.95 - 83.58, 72.95 - 80.57, 58.35 - 76.24],
            "synflow": [86.37 - 85.76, 84.02 - 83.58, 78.61 - 80.57, 66.64 - 76.24],
            "drive": [86.97 - 85.76, 87.21 - 83.58, 85.37 - 80.57, 74.49 - 76.24],
        }
    )
    assert whiskers(axes) == [pytest.approx((4 - math.sqrt(6), 4 + math.sqrt(6)))]  # variances 4 and 2
    assert levels(axes) == {"-": 0}
    assert labels(figure) == ["SNIP", "SynFlow", "DRIVE", "IMP", "paper"]
    assert axes.get_ylabel() == "difference to IMP (percentage points)"


def test_draw_differences__where_imp_is(figures: ModuleType, seeds: Callable[..., list[Any]]) -> None:
    """What IMP did not reach is left out, and without any of it there is no figure."""
    own = {"experiment": "digits"}
    runs = [*seeds("drive", 0.9, [90.0], **own), *seeds("drive", 0.98, [80.0], **own), *seeds("snip", 0.9, [1], **own)]
    assert figures.draw_differences(compare(figures, runs)) is None
    imp = seeds("imp", 0.98, [81.0], **own)
    assert figures.draw_differences(compare(figures, imp)) is None
    figure = figures.draw_differences(compare(figures, [*runs, *imp]))
    assert curves(figures, figure.axes[0], "-") == approximately({"drive": [-1]})
    assert labels(figure) == ["DRIVE", "IMP"]


def test_draw_accuracies(figures: ModuleType, published: ModuleType, alexnet: list[Any]) -> None:
    figure = figures.draw_accuracies(compare(figures, alexnet))
    (axes,) = figure.axes
    assert curves(figures, axes, "-") == approximately({"snip": [72], "drive": [85, 74.5], "imp": [81, 77.24]})
    paper = published.ACCURACIES["alexnet_cifar10"]
    assert curves(figures, axes, "--") == {method: list(curve.values()) for method, curve in paper.items()}
    assert levels(axes) == {"-": pytest.approx(84.5), "--": 84.2}
    spreads = [(85, 2), (74.5, math.sqrt(0.5)), (81, math.sqrt(2))]
    assert whiskers(axes) == [pytest.approx((mean - spread, mean + spread)) for mean, spread in spreads]
    assert labels(figure) == ["SNIP", "SynFlow", "DRIVE", "IMP", "paper", "dense", "dense, paper"]
    assert axes.get_ylabel() == "test accuracy (%)"


def test_draw_accuracies__sparsities(figures: ModuleType, alexnet: list[Any]) -> None:
    """Sparsity grows to the right; ours and the paper's of one sparsity are side by side, but not in one place."""
    figure = figures.draw_accuracies(compare(figures, alexnet))
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert axes.xaxis_inverted()
    assert list(axes.get_xticks()) == pytest.approx([10, 5, 2, 0.7])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["90", "95", "98", "99.3"]
    assert axes.get_xlabel() == "sparsity (% of the weights removed)"
    drive, imp = (
        next(line for line in axes.get_lines() if line.get_color() == figures.COLOURS[method] and style(line) == "-")
        for method in ("drive", "imp")
    )
    assert list(drive.get_xdata()) == pytest.approx([2, 0.7], rel=0.05)
    assert set(drive.get_xdata()).isdisjoint(imp.get_xdata())


def style(line: Any) -> str:
    return str(line.get_linestyle())


def test_draw_times(figures: ModuleType, alexnet: list[Any]) -> None:
    """To masks, then training, then the paper's time to masks; a dense network and nobody's paper have fewer bars."""
    figure = figures.draw_times(compare(figures, alexnet))
    (axes,) = figure.axes
    widths = [bar.get_width() for bar in sorted(axes.patches, key=lambda bar: bar.get_y())]
    assert widths == pytest.approx([100, 2, 100, 3, 10, 80, 220, 1300, 100, 24000])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["dense\n100 s", "SNIP\n102 s", "DRIVE\n90.0 s", "IMP\n1,400 s"]
    texts = ["100 s", "2.0 s", "100 s", "3.0 s", "10.0 s", "80.0 s", "220 s", "1,300 s", "100 s", "24,000 s"]
    assert [text.get_text() for text in axes.texts] == texts
    assert axes.yaxis_inverted()
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] == 1  # half the shortest time
    assert axes.get_xlabel().startswith("seconds")
    assert labels(figure)[-1] == "paper, to masks, on an RTX A6000"


def test_draw_times__linear(figures: ModuleType, convnet: list[Any]) -> None:
    """10 seconds and 80 fit on one axis; controls and ablations do not count."""
    figure = figures.draw_times(compare(figures, convnet))
    (axes,) = figure.axes
    assert axes.get_xscale() == "linear"
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([10, 80, 10, 80])
    assert labels(figure) == ["to masks: warm-up and pruning, in IMP all cycles", "training with them"]


@pytest.mark.parametrize("number", [2, 3, 5, 6])
def test_figures__fit(figures: ModuleType, alexnet: list[Any], seeds: Callable[..., list[Any]], number: int) -> None:
    """Nothing is cut off, and no two names on an axis overlap, even with all of AlexNet's sparsities."""
    curve = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
    runs = [
        *alexnet,
        *(run for method in ("drive", "imp") for sparsity in curve for run in seeds(method, sparsity, [80, 81])),
    ]
    figure = figures.FIGURES[number](compare(figures, runs))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    named = [shown_names(axis) for axis in (axes.xaxis, axes.yaxis)]
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *figure.texts, *named[0], *named[1]]
    for benchmark in [*figure.legends, *(text for text in texts if text.get_text())]:
        box = benchmark.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    for names in named:
        boxes = [name.get_window_extent() for name in names]
        assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])


# What speedup.py and collapse.py found.

MEASURED = {
    **{"experiment": "resnet18_cifar10", "data": "noise", "batch_size": 128, "hardware": "a CPU"},
    **{"versions": {"torch": "2.0"}, "revision": "abc", "date": "2026-01-02"},
}


def test_speedup_table(results: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    """Rows have what follows from seconds, beside the limit, and what the paper says: 21,000 s over 270 s."""
    protocol = {"epochs": 200, "warmup_epochs": 5, "cycles": 50, "epochs_per_cycle": 20}
    seconds = {"seconds_per_step": 3.6, "seconds_per_round": 7.2, "seconds_of_pruning": 72.0, "seconds_per_cut": 36.0}
    counts = {"steps_per_epoch": 391, "timed_steps": 8, "timed_rounds": 10}
    results.append(tmp_path / "s.jsonl", results.Speedup(**MEASURED, **counts, **seconds, protocol=protocol))
    table = tables.speedup_table(results.read([tmp_path / "s.jsonl"], results.Speedup))
    # DRIVE: 5 * 391 steps of 3.6 s, 72 s, and 90 rounds more of 7.2 s; IMP: 50 times 20 * 391 steps, and 36 s
    [row] = rows(table).values()
    assert (row["DRIVE"], row["IMP"]) == ("2.2 h", "391.5 h")
    assert (row["speed-up"], row["limit"], row["share"], row["paper"]) == ("182x", "190x", "95.5%", "78x")
    assert (row["step"], row["round"], row["cut"], row["steps per epoch"]) == ("3.6 s", "7.2 s", "36.0 s", "391")
    assert table.caption[0].startswith("Timed: 8 steps, 10 rounds and a cut;")
    assert table.caption[1] == "Measured on noise; batches of 128; a CPU; torch 2.0; 2026-01-02; revision abc."


def test_collapse_table(results: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    for sparsity, seed, effective in ((0.98, 0, 0.981), (0.993, 0, 1.0), (0.993, 1, 0.9975), (0.993, 2, 1.0)):
        own = {"method": "SNIP", "sparsity": sparsity, "seed": seed, "effective_sparsity": effective, "num_kept": 5}
        results.append(tmp_path / "c.jsonl", results.Collapse(**MEASURED, **own, empty_layers=[], overrides=[]))
    unknown = {"method": "SynFlow", "sparsity": 0.98, "seed": 0, "effective_sparsity": None, "num_kept": 5}
    results.append(tmp_path / "c.jsonl", results.Collapse(**MEASURED, **unknown, empty_layers=[], overrides=[]))
    table = tables.collapse_table(results.read([tmp_path / "c.jsonl"], results.Collapse))
    assert rows(table) == {
        "ResNet-18, CIFAR-10: SNIP": {"98%": "0 of 1 (98.10% to 98.10%)", "99.3%": "2 of 3 (99.75% to 100.00%)"},
        "ResNet-18, CIFAR-10: SynFlow": {"98%": "0 of 1", "99.3%": "not run"},
    }
    assert table.caption[1].startswith("Seeds 0, 1, 2. Measured on noise;")


def test_main__more(
    results: ModuleType, tables: ModuleType, seeds: Callable[..., list[Any]], tmp_path: Path, capsys: Any
) -> None:
    """Both come after the tables of runs, which the brief page has fewer of; other lines are refused."""
    for run in [*seeds("snip", 0.9, [62.0]), *seeds("warmup_snip", 0.9, [62.0])]:
        results.append(tmp_path / "r.jsonl", run)
    own = {"method": "SNIP", "sparsity": 0.5, "seed": 0, "effective_sparsity": 1.0, "num_kept": 5}
    results.append(tmp_path / "c.jsonl", results.Collapse(**MEASURED, **own, empty_layers=[], overrides=[]))
    page, readme = tmp_path / "page.md", tmp_path / "readme.md"
    for path in (page, readme):
        path.write_bytes(b"\n".join(tables.MARKS))
    runs = [str(tmp_path / "r.jsonl"), "--markdown", str(page), "--brief", str(readme)]
    tables.main([*runs, "--collapses", str(tmp_path / "c.jsonl")])
    for shown in (page.read_text(), capsys.readouterr().out):
        places = [shown.index(text) for text in ("Table 1. ", "time to masks", "DRIVE's parts", "Networks cut off")]
        assert places == sorted(places)
    assert re.findall(r"^\*\*(.*)\*\*$", readme.read_text(), re.MULTILINE) == [
        "Table 1. AlexNet, CIFAR-10: test accuracy in % at a sparsity of"
    ]
    with pytest.raises(SystemExit, match=r"c\.jsonl, line 1: lacks"):
        tables.main([*runs, "--speedups", str(tmp_path / "c.jsonl")])


def test_table_of_the_page_on_methods(results: ModuleType) -> None:
    """The page on choosing a method has the means of the committed results."""
    means = results.accuracies(results.read([PAPER / "results" / "convnet_cifar10.jsonl"], results.Run))
    page = (PAPER.parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    methods = {
        "DRIVE, 15": "drive",
        "gradual, 15": "gradual_exponential",
        "DRIVE, 35": "drive_long",
        "IMP, 35": "imp",
        "gradual, 35": "gradual_exponential_long",
    }
    for title, method in methods.items():
        own = [means.get((method, "none", sparsity)) for sparsity in (0.9, 0.95, 0.98, 0.993)]
        cells = [f"{summary.mean:.1f}" if summary else "" for summary in own]
        assert re.sub(" +", " ", f"| {title} | {' | '.join(cells)} |") in re.sub(" +", " ", page)


def test_committed_pages(tables: ModuleType, tmp_path: Path) -> None:
    """What README and the page of results say between the marks is what the committed results say."""
    root = PAPER.parents[1]
    folder = PAPER / "results"
    shutil.copy(root / "README.md", tmp_path / "readme.md")
    shutil.copy(folder / "README.md", tmp_path / "page.md")
    measured = ["--speedups", str(folder / "speedup.jsonl"), "--collapses", str(folder / "collapse.jsonl")]
    pages = ["--markdown", str(tmp_path / "page.md"), "--brief", str(tmp_path / "readme.md")]
    tables.main([*(str(folder / f"convnet_cifar10{name}.jsonl") for name in ("", "_full")), *measured, *pages])
    assert (tmp_path / "readme.md").read_text() == (root / "README.md").read_text()
    assert (tmp_path / "page.md").read_text() == (folder / "README.md").read_text()
    for path in (root / "README.md", folder / "README.md"):
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text()):
            assert (path.parent / picture).is_file(), picture
