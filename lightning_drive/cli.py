"""OneLineErrorsCLI: LightningCLI with an error of one line for a wrong setting."""

import dis
import os
from argparse import ArgumentError
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

import lightning_drive
from lightning_drive import cli_messages

for _name in lightning_drive.__all__:  # so that callbacks are known by their short names
    if _name.endswith("Callback"):
        getattr(lightning_drive, _name)


class OneLineErrorsCLI(LightningCLI):
    """LightningCLI that prints one line for a setting that is wrong.

    LightningCLI itself prints the usage of all arguments for a wrong value, or a traceback through jsonargparse with
    the reason somewhere inside. This class prints one line, and exits with status 2, for all errors of parsing, and
    for all settings and files that this package rejects, such as ``sparsity=90``, a pattern that matches no parameter,
    or a warm-up that is as long as the training. All other errors keep their traceback, and so do these with the
    environment variable ``JSONARGPARSE_DEBUG=true``.

    Use it as ``LightningCLI`` itself: ``OneLineErrorsCLI(YourModule, YourData)``.

    """

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except ArgumentError as error:
            self._exit(error, cli_messages.one_line(str(error), _class_names()))
        except _REFUSALS as error:  # found when callbacks are made, when a run is set up, or within it
            refused = next(filter(_is_refused, _causes(error)), None)
            if refused is None:
                raise
            self._exit(error, str(refused))

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that raises errors; the one of LightningCLI prints them."""
        return super().init_parser(**{"exit_on_error": False, **kwargs})

    def _exit(self, error: Exception, text: str) -> NoReturn:
        if "JSONARGPARSE_DEBUG" in os.environ:
            raise error
        self.parser.exit(2, f"error: {' '.join(text.split())}\n")


_REFUSALS = (MisconfigurationException, ValueError, TypeError, OSError, ModuleNotFoundError)
"""The kinds of errors for settings and files that this package rejects."""


def _causes(error: BaseException) -> list[BaseException]:
    """List an error, the error that caused it, and so on."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def _is_refused(error: BaseException) -> bool:
    """Whether an error comes from a ``raise`` in this package, not from a mistake in it or in other code."""
    frames = [trace for trace in _traces(error) if trace.tb_frame.f_globals.get("__name__")]
    if not frames:
        return False
    code, place = frames[-1].tb_frame.f_code.co_code, frames[-1].tb_lasti
    of_us = str(frames[-1].tb_frame.f_globals["__name__"]).split(".")[0] == __name__.split(".")[0]
    return of_us and dis.opname[code[place]] == "RAISE_VARARGS"


def _traces(error: BaseException) -> Iterator[TracebackType]:
    """Yield the places that an error went through, the one where it was raised last."""
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _class_names() -> set[str]:
    """Name the classes that LightningCLI knows without their module: all that are imported, of the kinds it takes."""
    known, ahead = set(), [pl.Callback, Logger, pl.LightningModule, pl.LightningDataModule, Optimizer, LRScheduler]
    while ahead:
        kind: type = ahead.pop()
        if "<locals>" not in kind.__qualname__:
            known.add(kind.__name__)
        ahead += kind.__subclasses__()
    return {name for name in known if not name.startswith("_")}
