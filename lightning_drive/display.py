"""What a person sees: progress in the Trainer's own bar, the report in a terminal or a log, pictures in a logger."""

import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core import rank_zero

from lightning_drive.report import PruningReport


@contextmanager
def progress(trainer: pl.Trainer, description: str, total: int) -> Generator[Callable[[], None]]:
    """Show a bar within the Trainer's progress bar, Rich or tqdm; one line of text if there is none.

    A single step shows nothing.

    Args:
        trainer: The running Trainer.
        description: What is being done.
        total: How many steps there are.

    Yields:
        A function to call after each step.

    """
    bar = trainer.progress_bar_callback
    if total == 1:
        yield lambda: None
    elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        rich = bar.progress
        style = bar.theme.description
        task = rich.add_task(f"[{style}]{description}" if style else description, total=total)
        try:
            yield lambda: rich.update(task, advance=1, refresh=True)
        finally:
            rich.update(task, visible=False)  # not removed: Lightning finds its own tasks by their position
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        position = 2 * bar.process_position + 1
        with Tqdm(desc=description, total=total, position=position, leave=False, file=sys.stdout) as tqdm:
            yield lambda: tqdm.update() and None
    else:
        rank_zero_info(f"{description}: {total} rounds")
        yield lambda: None


def show(trainer: pl.Trainer, what: PruningReport | str) -> None:
    """Log a report or a line of text; a report is a table by rich where the log goes to a terminal and nowhere else.

    Args:
        trainer: The running Trainer.
        what: The report or text.

    """
    console = _console(trainer) if isinstance(what, PruningReport) else None
    if console is None:
        rank_zero_info(f"\n{what}")  # the cursor may be at the end of a progress bar
    elif trainer.is_global_zero and rank_zero.log.isEnabledFor(logging.INFO):
        console.print()
        console.print(what)


def log_pictures(trainer: pl.Trainer, report: PruningReport) -> None:
    """Give all pictures that there are to those loggers that take some, if matplotlib is installed.

    Args:
        trainer: The running Trainer.
        report: The report.

    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, (TensorBoardLogger, WandbLogger))]
    if not loggers or not trainer.is_global_zero or not _is_installed("matplotlib"):
        return
    try:
        for kind in report.pictures:
            for logger in loggers:
                _log_picture(logger, f"pruning/{kind}", report.figure(kind), trainer.global_step)
    except Exception as error:  # a picture is not worth a training
        rank_zero_warn(f"The pictures of the pruning could not be logged ({type(error).__name__}: {error}).")


def _log_picture(logger: Logger, name: str, figure: Any, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(name, figure, step)
    elif isinstance(logger, WandbLogger):
        from PIL import Image  # matplotlib needs it, too

        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150)
        logger.log_image(name, [Image.open(file)], step=step)


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
