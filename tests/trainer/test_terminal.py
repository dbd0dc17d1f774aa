"""The rounds show up in the Trainer's own progress bar, and what is said about them where a person looks."""

import io
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import fits
import lightning.pytorch as pl
import pytest
import terminals
from fits import ConvModule
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core import rank_zero

from lightning_drive import PruningReport
from lightning_drive.trainer import terminal


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


class Watched:
    """What there was to see of a training in a pseudo-terminal of 80 columns, where also what is logged goes."""

    def __init__(self, folder: Path, *callbacks: pl.Callback) -> None:
        terminal = terminals.Terminal(columns=80)

        def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
            if "lightning_drive" in filename:
                print(message, file=sys.stderr)

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("always")
            patch.setattr(warnings, "showwarning", show)
            patch.setenv("COLUMNS", "80")
            patch.setenv("TERM", "xterm")
            patch.setattr(sys, "stdout", terminal.stream)
            patch.setattr(sys, "stderr", terminal.stream)
            handler = logging.StreamHandler(terminal.stream)
            patch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
            trainer = fits.trainer(folder, *callbacks, enable_progress_bar=True)
            trainer.fit(ConvModule(), fits.loader())
        assert handler.stream is terminal.stream  # it was given back
        screen = terminal.close()
        self.text, self.moments = screen.text(), screen.moments

    def has(self, message: str) -> bool:
        """Whether a message begins a line, and can be read to its end, wherever its lines were broken."""
        whole = re.sub(r"\s", "", message) in re.sub(r"\s", "", self.text)
        return whole and any(line.startswith(message[:30]) for line in self.text.splitlines())

    def bars(self) -> list[list[str]]:
        """Return the lines with bars that were visible at once, the last two of each moment."""
        lines = [[line for line in moment.splitlines() if BAR.match(line)][-2:] for moment in self.moments]
        return [list(each) for each in dict.fromkeys(map(tuple, lines)) if each]


BAR = re.compile(r"(Epoch|Pruning by).*\d/\d")
BARS: dict[str, Callable[..., pl.Callback]] = {"rich": RichProgressBar, "tqdm": TQDMProgressBar}


def slow_loss(module: Any, batch: Any) -> Any:
    time.sleep(0.12)  # tqdm draws no more often than every tenth of a second
    return module.training_step(batch, 0)


@pytest.mark.parametrize("leave", [False, True], ids=["replaced", "left"])
@pytest.mark.parametrize("name", BARS)
def test_progress(name: str, leave: bool, tmp_path: Path, log_to: LogTo) -> None:
    """The rounds have a bar below that of the epochs, which goes on; nothing of it is left over in the end."""
    log_to()
    watched = Watched(tmp_path, fits.drive(loss_fn=slow_loss, bn_batches=0), BARS[name](leave=leave))
    rounds = [lines for lines in watched.bars() if "Pruning by DRIVE" in lines[-1]]
    assert all(lines[0].startswith("Epoch 1") for lines in rounds)
    assert "3/5" in "".join(lines[-1] for lines in rounds)
    assert "Pruning by" not in watched.text
    assert re.search(r"^Epoch 3.* 3/3 ", watched.text, re.MULTILINE)


@pytest.mark.parametrize("name", BARS)
def test_progress__cycles(name: str, tmp_path: Path, log_to: LogTo) -> None:
    """The epochs' own bar says in which cycle they are, until the last cut."""
    log_to()
    watched = Watched(tmp_path, BARS[name](), fits.CALLBACKS["IMP"]())
    names = {found[0] for lines in watched.bars() for found in [re.match(r"Epoch [^:━╸╺]*", lines[-1])] if found}
    of = "/3" if name == "rich" else ""
    named = {each.strip() for each in names if "cycle" in each}
    assert named == {f"Epoch 0{of}, cycle 1/2", f"Epoch 1{of}, cycle 2/2"}
    last = [line for line in watched.text.splitlines() if BAR.match(line)][-1]
    assert last.startswith(f"Epoch 3{of}")
    assert "cycle" not in last


@pytest.mark.parametrize("name", BARS)
def test_progress__sparsity(name: str, tmp_path: Path, log_to: LogTo) -> None:
    """The epochs' own bar names the sparsity of now, which a later cut replaces, and no other bar is opened."""
    log_to()
    watched = Watched(tmp_path, BARS[name](), fits.gradual(start_epoch=0))
    names = {found[0] for lines in watched.bars() for found in [re.match(r"Epoch [^:━╸╺]*", lines[-1])] if found}
    of = "/3" if name == "rich" else ""
    named = {each.strip() for each in names if "sparsity" in each}
    assert named <= {
        *(f"Epoch 0{of}, sparsity {percent}%" for percent in (33.7, 56.3)),
        *(f"Epoch 1{of}, sparsity {percent}%" for percent in (70.0, 77.1, 79.7)),
    }
    assert any(each.startswith(f"Epoch 1{of}, sparsity") for each in named)
    assert "Pruning by" not in watched.text
    last = [line for line in watched.text.splitlines() if BAR.match(line)][-1]
    assert last.startswith(f"Epoch 3{of}")
    assert "sparsity" not in last


@pytest.mark.parametrize("method", fits.CALLBACKS)
@pytest.mark.parametrize("name", BARS)
def test_messages(name: str, method: str, tmp_path: Path, log_to: LogTo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said while a bar is there can be read in full: it has lines of its own, and no bar is drawn over it."""
    log_to()
    monkeypatch.setattr("lightning_drive.trainer.cycle_checks.check_paths", lambda *_: None)
    callback = fits.CALLBACKS[method](sparsity=0.995)
    watched = Watched(tmp_path, callback, BARS[name](), EarlyStopping("val_loss", patience=9))
    report = callback.report
    assert report is not None
    assert report.warnings
    assert all(watched.has(warning) for warning in report.warnings)
    assert watched.has(f"Pruned by {report.method.partition('(')[0]}(")
    assert watched.has("EarlyStopping (monitor='val_loss'): tracking of the best begins again with the sparse network.")
    if method == "IMP":
        assert watched.has(
            "IMP cycle 1 of 2 is over: 71 of 998 weights are kept (sparsity 92.89%), and training returns to the start"
            " of epoch 0."
        )
    assert sum(line.lstrip().startswith("features.4.weight") for line in watched.text.splitlines()) == 1
    assert max(map(len, watched.text.splitlines())) <= 80


@pytest.mark.parametrize("name", BARS)
def test_progress__log(name: str, tmp_path: Path, log_to: LogTo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the output is a file, as under nohup or in CI, the rounds are one line of text."""
    log_to(logging.StreamHandler(log := io.StringIO()))
    monkeypatch.setattr(sys, "stdout", log)
    fits.trainer(tmp_path, fits.drive(), BARS[name](), enable_progress_bar=True).fit(ConvModule(), fits.loader())
    lines = [line for line in re.split(r"[\r\n]", log.getvalue()) if "Pruning by" in line]
    assert lines == ["Pruning by DRIVE: 5 rounds"]
    assert "\nPruning by DRIVE: 5 rounds\n" in log.getvalue()


def test_progress__notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook is no terminal, and shows bars nevertheless."""
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    fits.trainer(tmp_path, fits.drive(), TQDMProgressBar(), enable_progress_bar=True).fit(ConvModule(), fits.loader())
    assert re.search(r"Pruning by DRIVE: .* 0/5 ", out.getvalue())


def test_progress__none(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fits.trainer(tmp_path, fits.drive()).fit(ConvModule(), fits.loader())
    assert "Pruning by DRIVE: 5 rounds" in caplog.text
    assert capsys.readouterr().out == ""


def test_progress__disabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar that is switched off stays off."""
    bar = RichProgressBar(refresh_rate=0)
    running = fits.trainer(tmp_path, bar, enable_progress_bar=True)
    with terminal.progress(running, "Pruning", 3) as advance:
        advance()
    assert capsys.readouterr().out == ""


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


@pytest.mark.parametrize("logger", [TensorBoardLogger, None])
def test_log_pictures__not_possible(logger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib there are none, and without a logger that takes them nobody draws."""
    drawn: list[str] = []
    monkeypatch.setattr(PruningReport, "figure", lambda _, kind: drawn.append(kind))
    if logger:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    loggers = [CSVLogger(tmp_path), *([logger(tmp_path)] if logger else [])]
    running = fits.trainer(tmp_path, fits.drive(warmup_epochs=0), logger=loggers, max_epochs=1)
    running.fit(ConvModule(), fits.loader())
    assert running.current_epoch == 1
    assert not drawn


def test_show__restored(tmp_path: Path, log_to: LogTo) -> None:
    """A resumed run says that it has its masks again, and how many weights they keep; no other does."""

    def said(callback: pl.Callback, epochs: int, checkpoint: Path | None = None) -> list[str]:
        log_to(logging.StreamHandler(out := io.StringIO()))
        trainer = fits.trainer(tmp_path, callback, max_epochs=epochs)
        trainer.fit(ConvModule(), fits.loader(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return [line for line in out.getvalue().splitlines() if "restored: Masks(" in line]

    callback = fits.drive()
    assert said(callback, 3) == []
    assert said(fits.drive(), 4, tmp_path / "last.ckpt") == [f"The masks were restored: {callback.masks}"]
