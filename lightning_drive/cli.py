"""For LightningCLI: what is wrong with a setting, in one line."""

import os
import re
import traceback
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override


class OneLineErrors(LightningArgumentParser):
    """A parser for LightningCLI that says what is wrong with a setting in one line.

    Without it a wrong value ends in the usage of all arguments, or in a traceback through jsonargparse, with the reason
    somewhere inside. Whatever is refused while arguments are parsed is said in one line, and so is what a constructor
    of this package refuses, such as ``sparsity=90``. Errors of other constructors keep their traceback, and with the
    environment variable ``JSONARGPARSE_DEBUG=true`` all do.

    Example:
        >>> from lightning.pytorch.cli import LightningCLI
        >>> LightningCLI(YourModule, YourData, parser_class=OneLineErrors)  # doctest: +SKIP

    """

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit, where parsing has failed."""
        line = _one_line(ex or ValueError(message))
        as_usual = not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ
        if as_usual or "<class 'NoneType'>" in line:  # jsonargparse before 4.52 gives that for the cause of everything
            super().error(message, ex)
        self.exit(2, f"error: {line}\n")

    @override
    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """Print one line and exit, where a constructor of this package refuses an argument."""
        try:
            return super().instantiate_classes(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if _is_ours(_causes(error)[-1]):
                self.error(str(error), error)
            raise


def _causes(error: BaseException) -> list[BaseException]:
    """List an error, the error that caused it, and so on."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


_PLACE = re.compile(r"""(?:Parser key "|Problem with given class_path ')([^"']+)["']""")


def _one_line(error: BaseException) -> str:
    """Say where the error is and what it is, without the lists of everything that was tried."""
    places: dict[str, None] = {}  # as an ordered set: jsonargparse repeats them
    text = str(error)
    for text in map(str, _causes(error)):
        if "Does not validate against any of the Union" not in text:
            break
        if place := _PLACE.match(text):
            places[place[1]] = None
    return ": ".join([*places, " ".join(_PLACE.sub(r"\1", text).split())])


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised in this package."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(names) and names[-1].split(".")[0] == __name__.split(".")[0]
