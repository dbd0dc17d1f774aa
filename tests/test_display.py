"""The rounds show up in the Trainer's own progress bar, the report where a person looks, and pictures in loggers."""

import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import fits
import pytest
from fits import ConvModule
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning_utilities.core import rank_zero

from lightning_drive import display


def test_progress__rich(tmp_path: Path) -> None:
    """A task with a step for each round runs full and is hidden afterwards; the bar's own task stays its own."""
    seen: list[tuple[str, float, float | None]] = []

    class Bar(RichProgressBar):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            self.left_over = [task.visible for task in self.progress.tasks if "Pruning" in task.description]

    class Loss:
        def __call__(self, module: Any, batch: Any) -> Any:
            tasks = [task for task in bar.progress.tasks if "Pruning" in task.description]
            seen.extend((task.description, task.completed, task.total) for task in tasks)
            return module.training_step(batch, 0)

    bar = Bar()
    callback = fits.drive(warmup_epochs=0, loss_fn=Loss(), bn_batches=0)
    fits.trainer(tmp_path, callback, bar, enable_progress_bar=True, max_epochs=1).fit(ConvModule(), fits.loader())
    assert [(completed, total) for _, completed, total in seen] == [(index, 5) for index in range(5)]
    assert "Pruning by DRIVE" in seen[0][0]
    assert bar.left_over == [False]
    assert bar.train_progress_bar.total == 3


def test_progress__tqdm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits.trainer(tmp_path, fits.drive(), TQDMProgressBar(), enable_progress_bar=True).fit(ConvModule(), fits.loader())
    assert "Pruning by DRIVE:" in capsys.readouterr().out


def test_progress__none(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fits.trainer(tmp_path, fits.drive()).fit(ConvModule(), fits.loader())
    assert "Pruning by DRIVE: 5 rounds" in caplog.text
    assert capsys.readouterr().out == ""


def test_progress__disabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar that is switched off stays off."""
    bar = RichProgressBar(refresh_rate=0)
    running = fits.trainer(tmp_path, bar, enable_progress_bar=True)
    with display.progress(running, "Pruning", 3) as advance:
        advance()
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    """What a stream looks like that ends in a terminal, 120 characters wide."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def log_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., logging.Logger]]:
    """Let Lightning's logger, within the test, have its own level and these handlers only, without those of pytest."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level  # the examples, which other tests run, leave another one behind
    logger.setLevel(logging.INFO)
    # `pytorch_lightning`, which another test imports, has all such messages go to its own logger from there on.
    monkeypatch.setattr(rank_zero, "log", logging.getLogger("lightning.pytorch.utilities.rank_zero"))

    def log_to(*handlers: logging.Handler, propagate: bool = False) -> logging.Logger:
        monkeypatch.setattr(logger, "handlers", list(handlers))
        monkeypatch.setattr(logger, "propagate", propagate)
        monkeypatch.setenv("COLUMNS", "120")
        return logger

    yield log_to
    logger.setLevel(level)


LogTo: TypeAlias = Callable[..., logging.Logger]


def shown(tmp_path: Path, *callbacks: Any, **settings: Any) -> str:
    """Train, and give the report as plain text."""
    callback = fits.drive(warmup_epochs=0, rounds=2)
    fits.trainer(tmp_path, callback, *callbacks, max_epochs=1, **settings).fit(ConvModule(), fits.loader())
    return str(callback.report)


def test_show__terminal(tmp_path: Path, log_to: LogTo) -> None:
    pytest.importorskip("rich")
    log_to(logging.StreamHandler(stream := Terminal()))
    plain = shown(tmp_path)
    assert "─────" in stream.getvalue()
    assert plain not in stream.getvalue()
    assert "features.4.weight" in stream.getvalue()


def test_show__rich_bar(tmp_path: Path, log_to: LogTo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the bar's own console, above the bar."""
    log_to(logging.StreamHandler(stream := Terminal()))
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    shown(tmp_path, RichProgressBar(), enable_progress_bar=True)
    assert "features.4.weight" in screen.getvalue()
    assert "features.4.weight" not in stream.getvalue()


@pytest.mark.parametrize("also", ["stream", "file", "root"])
def test_show__log(also: str, tmp_path: Path, log_to: LogTo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain text wherever the log goes, if any of that is no terminal."""
    stream, terminal = io.StringIO(), Terminal()
    handler = logging.FileHandler(tmp_path / "log.txt") if also == "file" else logging.StreamHandler(stream)
    if also == "root":
        monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
        log_to(logging.StreamHandler(terminal), propagate=True)
    else:
        log_to(handler, logging.StreamHandler(terminal))
    plain = shown(tmp_path)
    handler.close()
    text = (tmp_path / "log.txt").read_text() if also == "file" else stream.getvalue()
    assert plain in text
    assert plain in terminal.getvalue()
    assert "─────" not in text + terminal.getvalue()


def test_show__without_rich(tmp_path: Path, log_to: LogTo, monkeypatch: pytest.MonkeyPatch) -> None:
    log_to(logging.StreamHandler(stream := Terminal()))
    monkeypatch.setitem(sys.modules, "rich", None)
    assert shown(tmp_path) in stream.getvalue()


def test_show__silenced(tmp_path: Path, log_to: LogTo) -> None:
    """Whoever wants no messages from Lightning gets no table either."""
    log_to(logging.StreamHandler(stream := Terminal())).setLevel(logging.WARNING)
    shown(tmp_path)
    assert "features.4.weight" not in stream.getvalue()


def images_of(logger: TensorBoardLogger) -> dict[str, list[Any]]:
    """Read TensorBoard's files back: tag to its images."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


@pytest.mark.parametrize(
    ("name", "kinds"), [("DRIVE", ["density", "rounds", "scores"]), ("IMP", ["density", "rounds", "scores", "cycles"])]
)
def test_log_pictures__tensorboard(name: str, kinds: list[str], tmp_path: Path) -> None:
    """The real logger has every picture once, at the step of the (last) cut, as an image that can be read."""
    pytest.importorskip("tensorboard")
    logger, callback = TensorBoardLogger(tmp_path), fits.CALLBACKS[name]()
    fits.trainer(tmp_path, callback, logger=logger).fit(ConvModule(), fits.loader())
    images = images_of(logger)
    assert list(images) == [f"pruning/{kind}" for kind in kinds]
    assert callback.report is not None
    for [image] in images.values():
        assert image.step == callback.report.step
        assert image.width == 800
        read = pytest.importorskip("matplotlib.image").imread(io.BytesIO(image.encoded_image_string))
        assert read.std() > 0.05


def test_log_pictures__wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real logger, offline, where it is installed."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fits.trainer(tmp_path, fits.drive(), logger=logger).fit(ConvModule(), fits.loader())
    logger.experiment.finish()
    files = {path.name.split("_")[0] for path in tmp_path.glob("wandb/offline-run-*/files/media/images/pruning/*.png")}
    assert files == {"density", "rounds", "scores"}


@pytest.mark.parametrize("missing", ["matplotlib", None])
def test_log_pictures__not_possible(missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib there are none; one that cannot be drawn is a warning, and training goes on."""
    pytest.importorskip("tensorboard")
    logger, callback = TensorBoardLogger(tmp_path), fits.drive(warmup_epochs=0)
    running = fits.trainer(tmp_path, callback, logger=logger, max_epochs=1)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
        running.fit(ConvModule(), fits.loader())
    else:
        monkeypatch.setattr(type(logger.experiment), "add_figure", lambda *_: 1 / 0)
        with pytest.warns(UserWarning, match=r"pictures of the pruning could not be logged \(ZeroDivisionError"):
            running.fit(ConvModule(), fits.loader())
    assert running.current_epoch == 1
    assert images_of(logger) == {}
