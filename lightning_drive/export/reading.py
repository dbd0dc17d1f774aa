"""Files to read: regular ones only, each opened once, so that another one in its place does not mix with it."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check(path: str | Path) -> None:
    """Raise if there is nothing to read at a path, or something that may have no end; nothing is opened.

    Args:
        path: Any path; a link is followed.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is a device, a pipe or a socket.

    """
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise ValueError(f"{str(path)!r} must be a file, but is {kind}. Copy its content into a file and give that.")


@contextmanager
def held(path: str | Path) -> Iterator[str]:
    """Hold a file open, whatever is put in its place meanwhile.

    Args:
        path: A regular file.

    Yields:
        A path by which the same file can be opened again and again.

    Raises:
        ValueError: If it was written to while it was held.

    """
    with Path(path).open("rb") as file:
        before = os.fstat(file.fileno())
        same = f"/dev/fd/{file.fileno()}"
        try:
            yield same if Path(same).exists() else str(path)  # where there is no such folder, nobody can replace it
        except ValueError as error:
            _check_unchanged(path, before, os.fstat(file.fileno()), error)
            raise
        _check_unchanged(path, before, os.fstat(file.fileno()))


def _check_unchanged(
    path: str | Path, before: os.stat_result, after: os.stat_result, error: Exception | None = None
) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{str(path)!r} was changed while it was read. Try again when it is written.") from error
