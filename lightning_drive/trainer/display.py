"""What a person sees: progress in the Trainer's own bar, the report in a terminal or a log, numbers and pictures."""

import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core import rank_zero

from lightning_drive.report.pruning_report import PruningReport
from lightning_drive.trainer import facts

_SHOW_PICTURES = (TensorBoardLogger, WandbLogger, MLFlowLogger)


@contextmanager
def progress(trainer: pl.Trainer, description: str, total: int) -> Generator[Callable[[], None]]:
    """Show a bar within the Trainer's progress bar, Rich or tqdm; one line of text where nobody could watch one.

    A single step shows nothing.

    Args:
        trainer: The running Trainer.
        description: What is being done.
        total: How many steps there are.

    Yields:
        A function to call after each step.

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


def name_epoch(trainer: pl.Trainer, suffix: str) -> None:
    """Say more about the running epoch in the Trainer's progress bar.

    Args:
        trainer: The running Trainer, after ``on_train_epoch_start``, where its bar puts its own name of the epoch.
        suffix: What to add to it.

    """
    bar = _bar(trainer)
    if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        description = f"{bar.train_progress_bar.description.rstrip()}{suffix}"
        bar.progress.update(bar.train_progress_bar_id, description=description)
    elif isinstance(bar, TQDMProgressBar):
        bar.train_progress_bar.set_description(f"{bar.train_progress_bar.desc.removesuffix(': ')}{suffix}")


@contextmanager
def above_bar(trainer: pl.Trainer) -> Generator[None]:
    """Keep messages and warnings off the line of the Trainer's progress bar: they go above it, and it is drawn again.

    Args:
        trainer: The Trainer.

    """
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


def show(trainer: pl.Trainer, what: PruningReport | str) -> None:
    """Log a report or a line of text; a report is a table by rich where the log goes to a terminal and nowhere else.

    Args:
        trainer: The running Trainer.
        what: The report or text.

    """
    console = _console(trainer) if isinstance(what, PruningReport) else None
    if console is None:
        rank_zero_info(f"\n{what}" if isinstance(what, PruningReport) else what)
    elif trainer.is_global_zero and rank_zero.log.isEnabledFor(logging.INFO):
        console.print()
        console.print(what)


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Give numbers to all loggers at once, with the step and epoch that Lightning gives to its own.

    Args:
        trainer: The running Trainer.
        metrics: Name to value.

    """
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=facts.logged_step(trainer))


def log_pictures(trainer: pl.Trainer, report: PruningReport) -> None:
    """Give all pictures that there are to those loggers that take some, if matplotlib is installed.

    Args:
        trainer: The running Trainer.
        report: The report.

    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, _SHOW_PICTURES)]
    if not loggers or not trainer.is_global_zero or not _is_installed("matplotlib"):
        return
    for logger in loggers:
        try:
            _log_pictures(logger, report, facts.logged_step(trainer))
        except Exception as error:  # a picture is not worth a training
            rank_zero_warn(
                f"The pictures of the pruning could not be logged by {type(logger).__name__}"
                f" ({type(error).__name__}: {error})."
            )


def _log_pictures(logger: Logger, report: PruningReport, step: int) -> None:
    for kind in report.pictures:
        name = f"pruning/figures/{kind}"  # "pruning/density" is a number: W&B would have one take the other's place
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, report.figure(kind), step)
        elif isinstance(logger, WandbLogger):
            from PIL import Image  # matplotlib needs it, too

            file = io.BytesIO()
            report.figure(kind).savefig(file, format="png", dpi=150)
            logger.log_image(name, [Image.open(file)], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, report.figure(kind), f"{name}.png")


def _bar(trainer: pl.Trainer) -> pl.callbacks.ProgressBar | None:
    """Give the Trainer's progress bar, if there is one in this process and it is on."""
    bar = trainer.progress_bar_callback
    return bar if isinstance(bar, (RichProgressBar, TQDMProgressBar)) and bar.is_enabled else None


def _is_watched(stream: Any) -> bool:
    """Whether a stream can show a bar that moves: a terminal, or a notebook, which sets the prompt as a shell does."""
    return stream.isatty() or hasattr(sys, "ps1")


@contextmanager
def _through_rich() -> Generator[None]:
    """Have what is logged to a terminal printed by the rich bar there, which would write over it otherwise."""
    # While it runs, it stands in for the standard streams; handlers of logs have the streams themselves.
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
    """Give the rich console of the one terminal that logs go to; ``None`` if there is no such, or no rich."""
    if not _is_installed("rich"):
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
    """Go through all that a logger hands its messages to."""
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def _is_installed(package: str) -> bool:
    return sys.modules.get(package, ...) is not None and importlib.util.find_spec(package) is not None
