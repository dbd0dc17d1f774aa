"""The paper's experiments are what the paper prints, run to the end by every method, and can be stopped at any time."""

import importlib
import json
import logging
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import paper_images
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from processes import Script

from lightning_drive import PruningReport

PAPER = Path(__file__).parents[1] / "paper"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """A module of the examples, imported as Python does that runs one of them: their folder comes first."""
    monkeypatch.syspath_prepend(PAPER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that what `seed_everything` sets is put back
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield importlib.import_module
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


# The configurations say what the paper prints (design, section 7).

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
ROWS: dict[str, Any] = {
    # parameters, batch size, epochs, optimizer, {epoch: learning rate}, DRIVE's warm-up, IMP's cycles and their epochs
    "alexnet_cifar10": (23_468_874, 256, 50, ADAM, {0: 1e-4, 49: 1e-4}, 5, 50, 20),
    "vgg16_cifar10": (14_728_266, 128, 150, SGD, {0: 0.01, 29: 0.01, 30: 0.002, 149: 0.01 / 5**4}, 5, 50, 20),
    "resnet18_cifar10": (11_173_962, 128, 200, SGD, {0: 0.01, 100: 0.005, 200: 0.0}, 5, 50, 20),
    "vgg16_cifar100": (14_774_436, 128, 200, SGD, {59: 0.01, 60: 2e-3, 120: 4e-4, 160: 8e-5}, 5, 50, 20),
    "resnet18_cifar100": (11_220_132, 128, 200, SGD, {79: 0.01, 80: 1e-3, 119: 1e-3, 120: 1e-4}, 5, 50, 20),
    "vgg16_tinyimagenet": (14_825_736, 128, 100, SGD, {29: 0.01, 30: 1e-3, 60: 1e-4, 80: 1e-5}, 1, 50, 20),
    "resnet18_tinyimagenet": (11_271_432, 128, 100, SGD, {29: 0.01, 30: 1e-3, 60: 1e-4, 80: 1e-5}, 1, 50, 20),
    "resnet18_imagenet32": (11_681_832, 256, 100, SGD, {29: 0.1, 30: 0.01, 60: 1e-3, 80: 1e-4}, 1, 50, 20),
}


@pytest.mark.parametrize("experiment", ROWS)
def test_experiment(paper: Callable[[str], ModuleType], experiment: str) -> None:
    num_parameters, batch_size, epochs, optimizer_class, rates, warmup_epochs, cycles, epochs_per_cycle = ROWS[
        experiment
    ]
    run = paper("run")
    cli = run.build(run.Wanted(experiment, "dense", "none", 0.0, 0), ["--data.root=nowhere"])
    assert sum(parameter.numel() for parameter in cli.model.parameters()) == num_parameters
    assert cli.datamodule.batch_size == batch_size
    assert cli.trainer.max_epochs == epochs
    assert not any(isinstance(callback, run.PruningCallback) for callback in cli.trainer.callbacks)

    configured = cli.model.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    assert type(optimizer) is optimizer_class
    found = []
    for epoch in range(max(rates) + 1):
        if epoch in rates:
            found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if isinstance(configured, dict):
            configured["lr_scheduler"].step()
    assert found == pytest.approx(list(rates.values()), abs=1e-9)

    protocol = cli.config.protocol
    given = protocol.warmup_epochs, protocol.cycles, protocol.epochs_per_cycle
    assert given == (warmup_epochs, cycles, epochs_per_cycle)


METHODS = {
    # class, rounds, dense epochs before pruning, epochs in all: of `convnet_cifar10`, which has 15, 2 of them dense
    "magnitude": ("MagnitudePruningCallback", 1, 0, 15),
    "snip": ("SNIPPruningCallback", 1, 0, 15),
    "synflow": ("SynFlowPruningCallback", 100, 0, 15),
    "drive": ("DRIVEPruningCallback", 100, 2, 15),
    "imp": ("IMPPruningCallback", None, None, 5 * 4 + 15),
    "iterative_snip": ("SNIPPruningCallback", 100, 0, 15),
    "warmup_snip": ("SNIPPruningCallback", 1, 2, 15),
    "warmup_synflow": ("SynFlowPruningCallback", 100, 2, 15),
    "drive_long": ("DRIVEPruningCallback", 100, 2, 5 * 4 + 15),
    "gradual": ("GradualPruningCallback", None, None, 15),
    "gradual_exponential": ("GradualPruningCallback", None, None, 15),
    "gradual_drive": ("GradualPruningCallback", None, None, 15),
    "gradual_drive_exponential": ("GradualPruningCallback", None, None, 15),
    "gradual_exponential_half": ("GradualPruningCallback", None, None, 15),
    "gradual_exponential_late": ("GradualPruningCallback", None, None, 15),
    "gradual_exponential_long": ("GradualPruningCallback", None, None, 5 * 4 + 15),
    "gradual_long": ("GradualPruningCallback", None, None, 5 * 4 + 15),
}


@pytest.mark.parametrize("method", METHODS)
def test_method(paper: Callable[[str], ModuleType], method: str) -> None:
    run = paper("run")
    cli = run.build(run.Wanted("convnet_cifar10", method, "shuffle", 0.95, 3), [])
    pruning = cli.trainer.callbacks[0]
    rounds, warmup = (
        (getattr(pruning, "method", None) and pruning.method.rounds),
        getattr(pruning, "warmup_epochs", None),
    )
    assert (type(pruning).__name__, rounds, warmup, cli.trainer.max_epochs) == METHODS[method]
    assert (pruning.sparsity, pruning.control, cli.config.seed_everything) == (0.95, "shuffle", 3)
    if method == "imp":
        assert (pruning.cycles, pruning.epochs_per_cycle) == (5, 4)


@pytest.mark.parametrize(
    ("method", "end_epoch", "criterion", "schedule"),
    [
        ("gradual", None, "magnitude", "cubic"),
        ("gradual_exponential", None, "magnitude", "exponential"),
        ("gradual_drive", None, "drive", "cubic"),
        ("gradual_drive_exponential", None, "drive", "exponential"),
        ("gradual_exponential_half", 8, "magnitude", "exponential"),
        ("gradual_exponential_late", 12, "magnitude", "exponential"),
        ("gradual_exponential_long", None, "magnitude", "exponential"),
        ("gradual_long", None, "magnitude", "cubic"),
    ],
)
def test_gradual(
    paper: Callable[[str], ModuleType], method: str, end_epoch: int | None, criterion: str, schedule: str
) -> None:
    run = paper("run")
    pruning = run.build(run.Wanted("convnet_cifar10", method, "none", 0.95, 3), []).trainer.callbacks[0]
    assert (pruning.end_epoch, pruning.criterion, pruning.schedule) == (end_epoch, criterion, schedule)


def test_titles_are_those_of_configurations(paper: Callable[[str], ModuleType]) -> None:
    """Every title is that of a file; a file needs none."""
    results = paper("results")
    titled = {*results.EXPERIMENTS, *results.METHODS} - {"dense"}
    assert titled <= {path.stem for path in (PAPER / "configs").glob("*.yaml")}


EXPERIMENT = """
protocol: {epochs: 4, warmup_epochs: 1, cycles: 2, epochs_per_cycle: 1}
model:
  network: convnet
  num_classes: 3
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data: {class_path: images.ImageTree, init_args: {root: tree, batch_size: 4}}
trainer: {devices: 1, accelerator: cpu}
"""
METHOD = "pruning: {class_path: protocol.MagnitudePruningCallback, init_args: {sparsity: 0.5}}"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with images, an experiment and a method of one's own, none of which the examples know."""
    paper_images.write_tree(tmp_path / "tree")
    (tmp_path / "flowers.yaml").write_text(EXPERIMENT)
    (tmp_path / "biggest.yaml").write_text(METHOD)
    return tmp_path


def test_own_files(paper: Callable[[str], ModuleType], own: Path) -> None:
    """Their paths are all it takes, and results and tables call them as the files are called."""
    run, results, tables, figures = map(paper, ("run", "results", "tables", "figures"))
    line = "--experiments flowers.yaml --methods dense snip ./biggest.yaml --sparsities 0.5 --seeds 0 --results r.jsonl"
    wanted = run.all_wanted(run.read_options(line.split()))
    with warnings.catch_warnings():
        run.be_quiet()
        runs = [run.do(one, [], own / "checkpoints") for one in wanted]
    assert [one.key[:2] for one in runs] == [("flowers", name) for name in ("dense", "snip", "biggest")]
    assert {(one.data, one.num_kept / one.num_weights) for one in runs[1:]} == {("tree", 0.5)}
    for one in runs:
        results.append(own / "r.jsonl", one)
    assert run.missing(wanted, own / "r.jsonl", []) == []
    table, *_ = tables.all_tables(results.read([own / "r.jsonl"], results.Run))
    assert table.title.startswith("Table 1. flowers: test accuracy")
    assert [row[0] for row in table.rows] == ["SNIP", "biggest"]
    [comparison] = figures.select(runs)
    assert [name.get_text() for name in figures.draw_bars(comparison).axes[0].get_xticklabels()] == ["SNIP", "biggest"]
    drawn = [path.name for path in figures.save_all(runs, own / "figures")]  # not those over IMP and over sparsities
    assert drawn == ["flowers_figure2.png", "flowers_figure6.png"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nowhere.yaml", "'nowhere.yaml' is neither the path of a YAML file nor one of "),
        ("biggest", "'biggest' is neither the path of a YAML file nor one of "),
        ("drive.yaml", "'drive.yaml' is called as another one, and results know it by its name: rename the file"),
        ("dense.yaml", "'dense.yaml' is called as another one"),
    ],
)
def test_own_files__errors(
    paper: Callable[[str], ModuleType], own: Path, capsys: pytest.CaptureFixture[str], name: str, error: str
) -> None:
    for taken in ("drive", "dense"):
        (own / f"{taken}.yaml").write_text(METHOD)
    with pytest.raises(SystemExit):
        options(paper("run"), f"--methods {name}")
    assert error in capsys.readouterr().err


def test_own_files__also_known_ones_by_path(paper: Callable[[str], ModuleType]) -> None:
    run = paper("run")
    [wanted] = run.all_wanted(options(run, f"--methods {PAPER / 'configs' / 'snip.yaml'} --sparsities 0.5 --seeds 0"))
    assert wanted.key == ("convnet_cifar10", "snip", "none", 0.5, 0)


# Wrong settings are told in a line.


def command(paper: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", "fit", *words])
    paper("main").main()


@pytest.mark.parametrize("given", ["command", "file"])
def test_max_epochs__error(
    paper: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    given: str,
) -> None:
    """It follows from the protocol: another number is refused, wherever it stands, with what to set in its place."""
    (tmp_path / "own.yaml").write_text("trainer: {max_epochs: 3}")
    words = ["--trainer.max_epochs=3"] if given == "command" else ["--config", "own.yaml"]
    with pytest.raises(SystemExit):
        command(paper, monkeypatch, "--config", "digits.yaml", "--config", "imp.yaml", *words)
    assert capsys.readouterr().err == (
        "error: `trainer.max_epochs` must be 50, which follows from the protocol, got 3. Set `--protocol.epochs`, to"
        " which those of IMP's cycles are added.\n"
    )


def test_max_epochs(paper: Callable[[str], ModuleType]) -> None:
    """The number that it is anyway is no error: it stands in the files that Lightning saves."""
    run = paper("run")
    cli = run.build(run.Wanted("digits", "imp", "none", 0.9, 0), ["--trainer.max_epochs=50"])
    assert cli.trainer.max_epochs == 50


TREE = ("--data=ImageTree", "--data.root=tree")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--data.root=nowhere"], "error: There is no complete cifar-10-batches-py/ in "),
        (["--data=ImageTree", "--data.root=nowhere"], "error: There are no images in "),
        ([*TREE, "--data.batch_size=0"], "error: `--data.batch_size` must be at least 1, got 0."),
        ([*TREE, "--data.train_images=99"], "error: `train_images` must be between 1 and 12, or null for all,"),
        (
            [*TREE, "--data.train_images=null", "--data.test_images=null", "--model.num_classes=2"],
            "error: The model tells 2 classes apart",
        ),
    ],
)
def test_data__errors(
    paper: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, own: Path, words: list[str], error: str
) -> None:
    """A line, by `main.py` and, where the runs do not have to begin for it, by `run.py`."""
    monkeypatch.setattr(sys, "argv", [])
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_model_summary=false"]
    with pytest.raises(SystemExit) as ended:
        command(paper, monkeypatch, "--config", "convnet_cifar10.yaml", *quiet, *words)
    assert str(ended.value).startswith(error)
    assert "\n" not in str(ended.value)


def test_run__data_error(paper: Callable[[str], ModuleType], tmp_path: Path) -> None:
    few = ["--experiments", "convnet_cifar10", "--methods", "dense", "--results", "r.jsonl"]
    with pytest.raises(SystemExit, match=r"^error: There are no images in .*nowhere/train: "):
        paper("run").main([*few, "--", "--data=ImageTree", "--data.root=nowhere"])


def test_why_it_failed(paper: Callable[[str], ModuleType]) -> None:
    """What the user can mend is a line; for everything else there is a traceback."""
    run = paper("run")
    killed = "Its process was killed. The same command continues from its last whole epoch."
    expected: dict[BaseException, str] = {
        run.MisconfigurationException("`train_images` must be less."): "`train_images` must be less.",
        BrokenProcessPool("A process was terminated abruptly"): killed,
        SIGTERMException(): killed,
        SystemExit(2): "The error is above.",
        ZeroDivisionError("by zero"): "ZeroDivisionError: by zero\n",
    }
    for error, text in expected.items():
        future = Future[Any]()
        future.set_exception(error)
        assert run.why_it_failed(future) == text


def test_find_configs(paper: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """A file where one is goes before that of the same name in `configs/`; other arguments are left alone."""
    (tmp_path / "snip.yaml").touch()
    configs = PAPER / "configs"
    given = [
        "fit",
        "--config",
        "drive.yaml",
        "--config=imp.yaml",
        "-c",
        "snip.yaml",
        "--x",
        "drive.yaml",
        "--config",
        "no.yaml",
    ]
    found = paper("protocol").find_configs(given)
    assert found == [
        *("fit", "--config", str(configs / "drive.yaml"), f"--config={configs / 'imp.yaml'}", "-c", "snip.yaml"),
        *("--x", "drive.yaml", "--config", "no.yaml"),
    ]


# What is done, and what is not done again.


def options(run: ModuleType, line: str) -> Any:
    return run.read_options(["--experiments", "convnet_cifar10", "--results", "r.jsonl", *line.split()])


def test_all_wanted(paper: Callable[[str], ModuleType]) -> None:
    """Seed by seed, and dense once for each, whatever the sparsities and controls."""
    run = paper("run")
    wanted = run.all_wanted(
        options(run, "--methods dense drive --sparsities .9 .98 --controls none reinit --seeds 4 2 --jobs 2")
    )
    one_seed = [
        *(("dense", "none", 0.0), ("drive", "none", 0.9), ("drive", "reinit", 0.9)),
        *(("drive", "none", 0.98), ("drive", "reinit", 0.98)),
    ]
    assert [one.key for one in wanted] == [("convnet_cifar10", *key, seed) for seed in (4, 2) for key in one_seed]


def test_all_wanted__sparsities_of_the_paper(paper: Callable[[str], ModuleType]) -> None:
    run = paper("run")
    both = run.read_options(["--experiments", "vgg16_cifar10", "resnet18_imagenet32", "--results", "r.jsonl"])
    sparsities: dict[str, set[float]] = {}
    for one in run.all_wanted(both):
        sparsities.setdefault(one.experiment, set()).add(one.sparsity)
    assert sparsities["vgg16_cifar10"] == {0.0, 0.9, 0.95, 0.98, 0.993}
    assert sparsities["resnet18_imagenet32"] == {0.0, 0.7, 0.8, 0.9, 0.95}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--sparsities 98", "fractions to remove, between 0 and 1, got [98.0]"),
        ("--jobs 0", "must be at least 1, got 0"),
        ("--methods fancy", "invalid choice: 'fancy'"),
        ("--results nowhere/r.jsonl", "there is no folder nowhere"),
    ],
)
def test_read_options__errors(
    paper: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], line: str, error: str
) -> None:
    with pytest.raises(SystemExit):
        options(paper("run"), line)
    assert error in capsys.readouterr().err


def test_kept(paper: Callable[[str], ModuleType]) -> None:
    """Where the data is on a machine says nothing about results."""
    assert paper("run").kept(["--data=ImageTree", "--data.root=here", "--data.name=x"]) == [
        "--data=ImageTree",
        "--data.name=x",
    ]


def test_phases(paper: Callable[[str], ModuleType]) -> None:
    stopwatch = paper("run").Stopwatch()
    stopwatch.seconds = [10.0, 11.0, 15.0, 12.0]  # pruned in 3 s at the beginning of epoch 2
    assert stopwatch.phases(None) == {"warmup": 0, "pruning": 0, "training": 48}
    pruned = PruningReport("DRIVE()", (), seconds=3.0, epoch=2, step=0, digest="", warnings=())
    assert stopwatch.phases(pruned) == {"warmup": 21, "pruning": 3, "training": 24}
    ticket = PruningReport("IMP()", (), seconds=3.0, epoch=2, step=0, digest="", warnings=(), cycle=2)
    assert stopwatch.phases(ticket) == {"warmup": 0, "pruning": 24, "training": 24}


SHORT = (
    *("--protocol.epochs=6", "--protocol.warmup_epochs=1", "--protocol.cycles=2", "--protocol.epochs_per_cycle=2"),
    "--data.train_images=600",
)


def words(results: str, *methods: str, jobs: int = 1, more: tuple[str, ...] = ()) -> list[str]:
    options = ["--experiments", "digits", "--methods", *methods, "--sparsities", "0.9", "--seeds", "0"]
    return [*options, "--jobs", str(jobs), "--results", results, "--", *SHORT, *more]


def start(folder: Path, results: str, *methods: str, **options: Any) -> Script:
    """Start `run.py` as a user does."""
    return Script(PAPER / "run.py", *words(results, *methods, **options), folder=folder)


def read(path: Path) -> dict[str, Any]:
    return {line["method"]: line for line in map(json.loads, path.read_text().splitlines())}


def wait_for(folder: Path, pattern: str, script: Script) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline
        assert script.process.is_alive()
        time.sleep(0.01)


@pytest.mark.slow
def test_run__killed(paper: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """What was done is kept, and what was under way goes on: as if nothing had happened."""
    run = paper("run")
    with warnings.catch_warnings():
        run.be_quiet()
        expected = {
            method: run.do(run.Wanted("digits", method, "none", sparsity, 0), SHORT, tmp_path / "whole" / method)
            for method, sparsity in (("dense", 0.0), ("imp", 0.9))
        }

    checkpoints = tmp_path / "killed.jsonl.checkpoints"
    killed = start(tmp_path, "killed.jsonl", "dense", "imp")
    wait_for(checkpoints, "*imp*/epoch=[2-9].ckpt", killed)
    killed.send(signal.SIGKILL)
    assert killed.finish().returncode == -signal.SIGKILL
    before = read(tmp_path / "killed.jsonl") if (tmp_path / "killed.jsonl").exists() else {}
    assert "imp" not in before

    again = start(tmp_path, "killed.jsonl", "dense", "imp").finish()
    assert again.returncode == 0, again.stderr
    assert f"{2 - len(before)} runs to do" in again.stdout
    assert not checkpoints.exists()
    found = read(tmp_path / "killed.jsonl")
    assert found.keys() == {"dense", "imp"}
    for method, line in found.items():
        assert {name: line[name] for name in ("accuracy", "digest", "num_kept", "total_epochs")} == {
            name: getattr(expected[method], name) for name in ("accuracy", "digest", "num_kept", "total_epochs")
        }
    assert found["imp"]["total_epochs"] == 2 * 2 + 6
    assert found["imp"]["num_kept"] == 2_382
    assert (found["imp"]["data"], found["imp"]["train_images"], found["imp"]["test_images"]) == ("digits", 600, 450)
    assert found["imp"]["overrides"] == list(SHORT)
    assert all(line["accuracy"] > 0.3 for line in found.values())  # chance is 0.1

    with pytest.raises(SystemExit, match="Use the same, or another --results"):
        run.main(words("killed.jsonl", "dense", "imp", more=("--protocol.epochs=7",)))


def is_running(group: int) -> bool:
    """Whether any process of a group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["ctrl_c", "terminated"])
def test_run__interrupted(tmp_path: Path, alone: bool) -> None:
    """Ctrl+C, and SIGTERM to the runner alone, end what is under way at once, and what waits is not begun."""
    started = start(tmp_path, "r.jsonl", "dense", "snip", "synflow", "imp", jobs=2, more=("--protocol.epochs=5000",))
    wait_for(tmp_path / "r.jsonl.checkpoints", "*dense*/epoch=[2-9].ckpt", started)
    if alone:
        started.process.terminate()
    else:
        started.send(signal.SIGINT)
    group = started.process.pid
    stopped = started.finish(timeout=30)
    assert stopped.returncode == 1
    assert "The same command continues from here." in stopped.stderr
    assert not (tmp_path / "r.jsonl").exists()
    deadline = time.monotonic() + 30
    while is_running(group):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_run__failure(tmp_path: Path) -> None:
    """A run that fails is told, and the others are done."""
    some = start(
        tmp_path, "r.jsonl", "snip", "magnitude", more=("--pruning.exclude=[network.0.weight]", "--data.batch_size=600")
    ).finish()
    assert some.returncode == 1
    assert "1 runs failed" in some.stderr
    assert "magnitude, 90%, seed 0: failed" in some.stdout
    assert "exclude" in some.stderr  # which that callback does not have
    assert read(tmp_path / "r.jsonl").keys() == {"snip"}


# Every experiment runs to the end, with every network by every method of the paper.

PRUNED_IN = {"drive": 1, "imp": 1, "snip": 0, "synflow": 0}  # epoch
WHOLE = ("alexnet_cifar10", "vgg16_cifar10", "resnet18_cifar10")  # others: the methods that prune in a later epoch

KEPT = {  # a tenth of the prunable weights
    "alexnet_cifar10": 2_345_952,
    "vgg16_cifar10": 1_471_558,
    "resnet18_cifar10": 1_116_435,
    "vgg16_cifar100": 1_476_166,
    "resnet18_cifar100": 1_121_043,
    "vgg16_tinyimagenet": 1_481_286,
    "resnet18_tinyimagenet": 1_126_163,
    "resnet18_imagenet32": 1_167_123,
}
FEW = (
    *("--protocol.epochs=2", "--protocol.warmup_epochs=1", "--protocol.cycles=1", "--protocol.epochs_per_cycle=1"),
    *("--pruning.sparsity=0.9", "--data.root=here", "--data.batch_size=2", "--trainer.limit_train_batches=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"),
    *("--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"),
)


def write_images(experiment: str, monkeypatch: pytest.MonkeyPatch, source: Any) -> None:
    """Write a few images in the layout in which the experiment's data is published."""
    root = Path("here")
    if source is not None:
        for name, value in paper_images.write_cifar(root, source).items():
            monkeypatch.setattr(source, name, value)
    elif experiment.endswith("tinyimagenet"):
        paper_images.write_tiny_imagenet(root)
    else:
        root.mkdir()
        for name in ("train_data_batch_1", "val_data"):
            batch = {"data": paper_images.rows_of([0, 7, 3, 5]), "labels": [1, 8, 4, 6]}
            (root / name).write_bytes(pickle.dumps(batch))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer collapse:UserWarning", "ignore:The network is cut off:UserWarning")
@pytest.mark.parametrize("experiment", ROWS)
def test_end_to_end(
    paper: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    experiment: str,
) -> None:
    """The command of `main.py` trains, prunes exactly, trains on with the masks, and measures accuracy."""
    main, images = paper("main"), paper("images")
    monkeypatch.setattr("lightning_drive.trainer.cycle_checks.check_paths", lambda *_: None)  # in one cycle
    cifar = {"cifar10": images.CIFAR10, "cifar100": images.CIFAR100}.get(experiment.rpartition("_")[2])
    write_images(experiment, monkeypatch, cifar and cifar.source)
    for method, epoch in PRUNED_IN.items():
        if not epoch and experiment not in WHOLE:
            continue
        more = [] if method in ("snip", "imp") else ["--pruning.rounds=2"]
        configs = ["--config", f"{experiment}.yaml", "--config", f"{method}.yaml"]
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", *configs, *FEW, *more])
        cli = main.main()
        assert cli.trainer.current_epoch == (3 if method == "imp" else 2)
        pruning = cli.trainer.callbacks[0]
        assert pruning.report.method.lower().startswith(method)
        assert pruning.report.epoch == epoch
        assert pruning.masks.num_kept == KEPT[experiment]
        weights = dict(cli.model.named_parameters())
        assert all(not weights[name][~mask].any() for name, mask in pruning.masks.items())
        assert sum(int(weights[name].count_nonzero()) for name in pruning.masks) > 0.9 * KEPT[experiment]
        assert 0 <= cli.trainer.callback_metrics["val_accuracy"] <= 1


# Speed-up over IMP.


def test_speedup(paper: Callable[[str], ModuleType]) -> None:
    """Where a round costs a step and all else nothing, it is the protocol's limit, as the design has it."""
    speedup = paper("speedup")
    rows = {name: (row[1], row[5:]) for name, row in ROWS.items()}
    limits = {}
    for name, (batch_size, (warmup_epochs, cycles, epochs_per_cycle)) in rows.items():
        steps = -(-speedup.TRAIN_IMAGES[name.rpartition("_")[2]] // batch_size)
        protocol = {"warmup_epochs": warmup_epochs, "cycles": cycles, "epochs_per_cycle": epochs_per_cycle}
        ideal = speedup.Speedup(
            *(name, "noise", batch_size, steps, protocol, 8, 10),
            seconds_per_step=0.5,
            seconds_per_round=0.5,
            seconds_of_pruning=5.0,
            seconds_per_cut=0.0,
            **{"versions": {}, "hardware": "", "revision": "", "date": ""},
        )
        assert ideal.imp / ideal.drive == pytest.approx(ideal.limit)
        limits[name] = round(ideal.limit)
        slow = replace(ideal, seconds_of_pruning=5.0 + 100.0)
        assert slow.drive == pytest.approx(ideal.drive + 100)
        assert replace(ideal, seconds_per_cut=2.0).imp == pytest.approx(ideal.imp + 2 * cycles)
    assert limits["resnet18_cifar10"] == 190
    assert limits["resnet18_imagenet32"] == 980


@pytest.mark.slow
def test_speedup__measured(
    paper: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speedup = paper("speedup")
    few = ["--experiments", "alexnet_cifar10", "--steps", "4", "--rounds", "3", "--results", "s.jsonl"]
    start = time.perf_counter()
    with warnings.catch_warnings():
        speedup.main([*few, "--", "--data.batch_size=8", "--trainer.accelerator=cpu"])
    seconds = time.perf_counter() - start
    found = speedup.Speedup(**json.loads((tmp_path / "s.jsonl").read_text()))
    assert (found.timed_steps, found.timed_rounds, found.data) == (2 * (4 - 2), 3, "noise")
    assert found.protocol == {"epochs": 50, "warmup_epochs": 5, "cycles": 50, "epochs_per_cycle": 20}
    assert found.steps_per_epoch == 6250
    assert 0 < found.seconds_per_round < found.seconds_of_pruning < seconds
    assert 0 < found.seconds_per_step < seconds
    assert 0 < found.seconds_per_cut < seconds
    assert f"{found.imp / found.drive:.0f}x" in capsys.readouterr().out


# Who cuts a network off.


def test_collapse(paper: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest initial weights are those of layers with few inputs, so that others lose all of theirs."""
    collapse, results = paper("collapse"), paper("results")
    few = ["--experiments", "digits", "--sparsities", "0.5", "0.98", "--seeds", "4", "--results", "c.jsonl"]
    with warnings.catch_warnings():
        collapse.main([*few, "--methods", "SNIP", "Magnitude", "--", "--data.batch_size=32"])
    found = results.read_file(tmp_path / "c.jsonl", results.Collapse)
    assert [(line.method, line.sparsity, line.num_kept, line.is_cut_off) for line in found] == [
        ("SNIP", 0.5, 11_912, False),
        ("SNIP", 0.98, 476, False),
        ("Magnitude", 0.5, 11_912, False),
        ("Magnitude", 0.98, 476, True),
    ]
    assert [bool(line.empty_layers) for line in found] == [False, False, False, True]
    assert {(line.seed, line.data, line.batch_size) for line in found} == {(4, "digits", 32)}
    assert "digits, Magnitude, 98.0%, seed 4: cut off" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["SNIP", "SNIP, BatchNorm by running statistics", "iterative SNIP, 20 rounds"])
def test_collapse__methods(paper: Callable[[str], ModuleType], method: str) -> None:
    """What a method is called is what it does."""
    collapse, run = paper("collapse"), paper("run")
    name, more = collapse.METHODS[method]
    pruning = run.build(run.Wanted("digits", name, "none", 0.9, 0), more).config_init.pruning
    assert (pruning.method.mode == "eval") == ("running" in method)
    assert pruning.method.rounds == (20 if "20" in method else 1)
    assert pruning.warmup_epochs == 0
