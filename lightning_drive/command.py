"""The command ``lightning-drive``: runs it, and prints errors as one line.

Nothing is imported here but the standard library: torch takes seconds, and the help must not wait for it.
"""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_drive import command_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after ``lightning-drive``; by default those of this process.

    Returns:
        The exit status: 0, or 2 for an error, which is one line on the error stream; without arguments it is the help.

    """
    _open_streams()
    try:
        with _flushed():
            return command_options.run(sys.argv[1:] if arguments is None else arguments)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        return 0
    except (OSError, ValueError, TypeError, ModuleNotFoundError, RuntimeError) as error:  # torch raises the last one
        with suppress(OSError):  # nobody reads errors, either
            print(f"lightning-drive: error: {_line(error)}", file=sys.stderr)
        return 2


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open_streams() -> None:
    """Open the null device for each standard stream that is closed, or a file to write would take its place.

    Letters that standard output cannot write, such as bytes of a file name that are no text, get a backslash.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  # to the end of the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _flushed() -> Iterator[None]:
    """Write all that was printed at the end, even where argparse exits, so that errors of it are raised here."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = None  # or Python would try again at its end, and complain
            raise


if __name__ == "__main__":
    sys.exit(main())
