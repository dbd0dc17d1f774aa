"""Return masks and report from the processes that Lightning spawned or forked for one ``fit``."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch

from lightning_drive.trainer import lightning_internals


class Handover:
    """The way back for the state of a callback from processes that Lightning's launcher spawned or forked.

    Such a launcher returns the weights to the process that called ``fit``, but not what callbacks know. The copy of a
    callback in the launched process adds a :class:`Parcel` to what the launcher returns (:meth:`send`). Receiving it
    puts the state into the handover of the callback that ``fit`` was called with (:meth:`take`). Other copies of a
    callback, such as those in the workers of a process pool, send nothing and receive nothing.

    ``origin`` is the address of the callback that this one's callback is a copy of; ``None`` for no copy.

    Examples:
        >>> handover = Handover()
        >>> handover.take() is None
        True

    """

    def __init__(self, origin: str | None = None) -> None:
        self.address, self.origin, self._process = uuid4().hex, origin, os.getpid()
        self._received: dict[str, Any] | None = None
        _receivers[self.address] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the address, so that every copy has its own."""
        return Handover, (self.origin,)

    def of_copy(self) -> "Handover":
        """Return the handover for a copy or pickle of the callback."""
        return Handover(self.address)

    def send(self, launcher: Any, state: Callable[[], dict[str, Any]]) -> None:
        """Have the launcher of this process return a state to the callback that ``fit`` was called with.

        Without a launcher (``None``), or with one that returns no results from its processes, nothing is sent.
        ``state`` returns plain types and tensors, and is called when the launcher collects its results.
        """
        is_forked = os.getpid() != self._process
        address = self.address if is_forked else self.origin
        if address is not None:
            lightning_internals.add_result(launcher, address, lambda: Parcel(address, state()))

    def receive(self, state: dict[str, Any]) -> None:
        """Keep a state for :meth:`take`."""
        self._received = state

    def take(self) -> dict[str, Any] | None:
        """Return the received state, once; ``None`` if there is none."""
        received, self._received = self._received, None
        return received

    def discard(self) -> None:
        """Remove the file of a parcel that was sent here and will not be received, after a failure."""
        _file(self.address, os.getpid()).unlink(missing_ok=True)


_receivers: WeakValueDictionary[str, Handover] = WeakValueDictionary()
"""The handovers of this process, by their address."""


class Parcel:
    """A state for one address. Pickling writes it to a file; unpickling delivers it and removes the file.

    The launcher's queue cannot carry it: nobody reads from that before the process has ended, and a pipe holds 64 KiB.
    """

    def __init__(self, address: str, state: dict[str, Any]) -> None:
        self._address, self._state = address, state

    def __reduce__(self) -> tuple[Any, ...]:
        """Write the state to a file, and return how to deliver it."""
        parent = multiprocessing.parent_process()
        file = _file(self._address, os.getpid() if parent is None else parent.pid)
        torch.save(self._state, file)
        return _deliver, (self._address, str(file))


def _deliver(address: str, file: str) -> None:
    state = torch.load(file, weights_only=True)
    Path(file).unlink()
    if (receiver := _receivers.get(address)) is not None:
        receiver.receive(state)


def _file(address: str, receiving_process: int | None) -> Path:
    """Return the file for one receiver; forked receivers share an address, but not the process."""
    return Path(tempfile.gettempdir()) / f"lightning_drive-{address}-{receiving_process}.pt"
