"""What a callback found out in a process that Lightning spawned or forked, brought back to the one that did so."""

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch


class Handover:
    """A file by which copies of a callback in other processes reach the original.

    Lightning brings the weights back from processes that it spawned or forked, but not what callbacks know. A copy in
    another process leaves its state (:meth:`leave`), and the original takes it (:meth:`take`). The file is in the
    folder for temporary files, and goes with the original.

    Example:
        >>> handover = Handover()
        >>> handover.is_elsewhere, handover.take() is None
        (False, True)

    """

    def __init__(self) -> None:
        self._path = Path(tempfile.gettempdir()) / f"lightning_drive-{uuid4().hex}.pt"
        self._owner = os.getpid()
        weakref.finalize(self, _remove, self._path, self._owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handover":
        """Let a copy in the same process be an original of its own."""
        return Handover()

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a copy in another process than that of the original."""
        return os.getpid() != self._owner

    def leave(self, state: dict[str, Any]) -> None:
        """Leave a state for the original.

        Args:
            state: Plain types and tensors.

        """
        unfinished = self._path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self._path)

    def take(self) -> dict[str, Any] | None:
        """Take the state that a copy has left, or ``None``. Forked again, a copy only reads it."""
        if not self._path.exists():
            return None
        state: dict[str, Any] = torch.load(self._path, weights_only=True)
        _remove(self._path, self._owner)
        return state


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
