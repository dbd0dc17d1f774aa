"""OneLineErrorsCLI: LightningCLI with an error of one line for a wrong setting."""

import os
import re
import traceback
from argparse import ArgumentError
from types import NoneType
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override


class OneLineErrorsCLI(LightningCLI):
    """LightningCLI that prints one line for a setting that is wrong.

    LightningCLI itself prints the usage of all arguments for a wrong value, or a traceback through jsonargparse with
    the reason somewhere inside. This class prints one line for all errors of parsing, and for all settings that this
    package rejects, such as ``sparsity=90`` or a warm-up that is as long as the training. All other errors keep their
    traceback, and so do these with the environment variable ``JSONARGPARSE_DEBUG=true``.

    Use it as ``LightningCLI`` itself: ``OneLineErrorsCLI(YourModule, YourData)``.

    """

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except ArgumentError as error:
            self._exit(error)
        except MisconfigurationException as error:  # settings that do not go together, found when a run is set up
            if not _is_ours(error):
                raise
            self._exit(error)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that raises errors; the one of LightningCLI prints them."""
        return super().init_parser(**{"exit_on_error": False, **kwargs})

    @override
    def instantiate_classes(self) -> None:
        """Print one line and exit if a constructor of this package rejects an argument."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            if not _is_ours(_causes(error)[-1]):
                raise
            self._exit(error)

    def _exit(self, error: Exception) -> NoReturn:
        if "JSONARGPARSE_DEBUG" in os.environ:
            raise error
        line = _one_line(error)
        # jsonargparse before 4.52 names `NoneType` as the cause of every error.
        self.parser.exit(2, f"error: {error if NoneType.__name__ in line else line}\n")


def _causes(error: BaseException) -> list[BaseException]:
    """List an error, the error that caused it, and so on."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


_PLACE = re.compile(r"""(?:Parser key "|Problem with given class_path ')([^"']+)["']""")

_NO_FUNCTION = re.compile(r"Type .* expects a function or a callable class: .*")


def _one_line(error: BaseException) -> str:
    """Return where the error is and what it is, without the lists of everything that was tried."""
    places: dict[str, None] = {}  # as an ordered set: jsonargparse repeats them
    text, no_function = str(error), _NO_FUNCTION.search(str(error))
    for text in map(str, _causes(error)):
        if "Does not validate against any of the Union" not in text:
            break
        if place := _PLACE.match(text):
            places[place[1]] = None
    if no_function:  # of several kinds of values, jsonargparse names the first in the end, and not what was meant
        text = f"{no_function[0]}. Got value:{text.rpartition('Got value:')[2]}"
    return ": ".join([*places, " ".join(_PLACE.sub(r"\1", text).split())])


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised in this package."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(names) and names[-1].split(".")[0] == __name__.split(".")[0]
