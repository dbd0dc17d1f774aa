"""Open files safely: read one and the same file to its end, and write one as a whole or not at all."""

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check(path: str | Path) -> None:
    """Raise if a path, links followed, leads nowhere or to a device, a pipe or a socket; nothing is opened."""
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise ValueError(f"{str(path)!r} must be a file, but is {kind}. Copy its content into a file and give that.")


@contextmanager
def held(path: str | Path) -> Iterator[str]:
    """Hold a regular file open, and yield a path that leads to it whatever is put in its place meanwhile.

    Raise if it was written to while it was held.
    """
    with Path(path).open("rb") as file:
        before = os.fstat(file.fileno())
        same = f"/dev/fd/{file.fileno()}"
        try:
            yield same if Path(same).exists() else str(path)  # without that folder nothing can replace it
        except ValueError as error:
            _check_unchanged(path, before, os.fstat(file.fileno()), error)
            raise
        _check_unchanged(path, before, os.fstat(file.fileno()))


def _check_unchanged(
    path: str | Path, before: os.stat_result, after: os.stat_result, error: Exception | None = None
) -> None:
    """Raise if a file has another size or time of change than before."""
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{str(path)!r} was changed while it was read. Try again when it is written.") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a file to write to beside its place, and move it there when it is complete; remove it if that fails.

    The permissions of a file that is replaced stay as they are; those of a new one are the usual ones. Raise if the
    folder is missing, or something else than a file is at that place.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        raise ValueError(f"{str(path)!r} must be a file, but is a folder or a device. Choose another name.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(target.parent)!r} to write a file in. Make it first.")
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.open("xb").close()
    mode = (target if target.exists() else temporary).stat().st_mode  # safetensors makes files private
    try:
        yield temporary
        temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
