"""Show progress in the Trainer's own bar, and messages and reports above it, in a terminal, a notebook or a log."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core import rank_zero

from lightning_drive.report.pruning_report import PruningReport


@contextmanager
def progress(trainer: pl.Trainer, description: str, total: int) -> Generator[Callable[[], None]]:
    """Show a bar within the Trainer's progress bar, Rich or tqdm; one line of text where nobody could watch one.

    Yield a function to call after each of ``total`` steps. A single step shows nothing.
    """
    bar = _bar(trainer)
    if total == 1:
        yield lambda: None
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and _is_watched(bar.progress.console.file):
        rich = bar.progress
        style = bar.theme.description
        task = rich.add_task(f"[{style}]{description}" if style else description, total=total)
        try:
            yield lambda: rich.update(task, advance=1, refresh=True)
        finally:
            rich.update(task, visible=False)  # not removed: Lightning finds its own tasks by their position
    elif isinstance(bar, TQDMProgressBar) and _is_watched(sys.stdout):
        position = 2 * bar.process_position + 1
        settings = {"position": position, "leave": False, "dynamic_ncols": True, "file": sys.stdout}
        with Tqdm(desc=description, total=total, **settings) as tqdm:
            yield lambda: tqdm.update() and None
    else:
        with above_bar(trainer):
            rank_zero_info(f"{description}: {total} rounds")
        yield lambda: None


def name_epoch(trainer: pl.Trainer, more: str) -> None:
    """Add more to the name of the epoch, which the Trainer's progress bar sets, in place of what was added before."""
    bar = _bar(trainer)
    if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        description = f"{_without_more(bar.train_progress_bar.description)}, {more}"
        bar.progress.update(bar.train_progress_bar_id, description=description)
    elif isinstance(bar, TQDMProgressBar):
        bar.train_progress_bar.set_description(f"{_without_more(bar.train_progress_bar.desc)}, {more}")


def _without_more(description: str) -> str:
    return description.partition(", ")[0].removesuffix(": ").rstrip()


@contextmanager
def above_bar(trainer: pl.Trainer) -> Generator[None]:
    """Keep messages and warnings off the line of the Trainer's progress bar: they go above it, and it is redrawn."""
    bar = _bar(trainer)
    if isinstance(bar, TQDMProgressBar) and _is_watched(sys.stdout):
        with Tqdm.external_write_mode():
            yield
    elif isinstance(bar, TQDMProgressBar):
        print(flush=True)  # the bar's last state is in a file then, without an end of line
        yield
    else:
        with _through_rich():
            yield


def show(trainer: pl.Trainer, message: PruningReport | str) -> None:
    """Log a report or a line of text; a report is a table by rich where the log goes to a terminal and nowhere else."""
    console = _console(trainer) if isinstance(message, PruningReport) else None
    if console is None:
        rank_zero_info(f"\n{message}" if isinstance(message, PruningReport) else message)
    elif trainer.is_global_zero and rank_zero.log.isEnabledFor(logging.INFO):
        console.print()
        console.print(message)


def _bar(trainer: pl.Trainer) -> pl.callbacks.ProgressBar | None:
    """Return the Trainer's progress bar, if there is one in this process and it is on."""
    bar = trainer.progress_bar_callback
    return bar if isinstance(bar, (RichProgressBar, TQDMProgressBar)) and bar.is_enabled else None


def _is_watched(stream: Any) -> bool:
    """Whether a stream can show a bar that moves: a terminal, or a notebook, which sets a prompt like a shell."""
    return stream.isatty() or hasattr(sys, "ps1")


@contextmanager
def _through_rich() -> Generator[None]:
    """Let the rich bar of a terminal print what is logged there, over which it would write otherwise."""
    # While the bar runs, it stands in for the standard streams; handlers of logs have the streams themselves.
    proxies = {getattr(stream, "rich_proxied_file", None): stream for stream in (sys.stdout, sys.stderr)}
    handlers = [
        (handler, handler.stream)
        for handler in _handlers(rank_zero.log)
        if isinstance(handler, logging.StreamHandler) and handler.stream in proxies
    ]
    for handler, stream in handlers:
        handler.setStream(proxies[stream])
    try:
        yield
    finally:
        for handler, stream in handlers:
            handler.setStream(stream)


def _console(trainer: pl.Trainer) -> Any:
    """Return the rich console of the terminal, if logs go to one and to nothing else, and rich is installed."""
    if not is_installed("rich"):
        return None
    from rich.console import Console

    streams = [getattr(handler, "stream", None) for handler in _handlers(rank_zero.log)]
    if not streams or not all(stream is not None and stream.isatty() for stream in streams):
        return None
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        return bar.progress.console  # which knows how to print above the bar
    return Console(file=streams[0])


def _handlers(logger: logging.Logger | None) -> Iterator[logging.Handler]:
    """Yield the handlers that get the messages of a logger, those of its parents included."""
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return sys.modules.get(package, ...) is not None and importlib.util.find_spec(package) is not None
