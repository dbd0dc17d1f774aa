"""Settings of the thread and of the process that scoring changes, and the return to them."""

import sys
import threading
from typing import Any

import torch

from lightning_drive.network.random_state import RandomState


class Settings:
    """Gradients, autocast, modes of torch, compiled functions and random state as they are when this is made."""

    def __init__(self, device_types: list[str]) -> None:
        self._random = RandomState()
        self._grad = torch.is_grad_enabled()
        self._autocast = {kind: torch.is_autocast_enabled(kind) for kind in device_types}
        self._modes = torch._C._len_torch_function_stack()

    def change(self) -> None:
        """Enable gradients, turn autocast off, and have compiled functions run as plain Python."""
        _PLAIN_PYTHON.enter(self)
        torch.set_grad_enabled(True)
        for device_type in self._autocast:
            torch.set_autocast_enabled(device_type, False)

    def put_back(self) -> None:
        """Restore the settings; a second call changes nothing."""
        while torch._C._len_torch_function_stack() > self._modes:  # an interrupt kept one from leaving
            torch._C._pop_torch_function_stack()
        for device_type, is_on in self._autocast.items():
            torch.set_autocast_enabled(device_type, is_on)
        torch.set_grad_enabled(self._grad)
        _PLAIN_PYTHON.leave(self)
        self._random.put_back()


class _PlainPython:
    """Makes compiled functions run as plain Python, in all threads, until the last search has left."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._searches: set[object] = set()
        self._stance: Any = None

    def enter(self, search: object) -> None:
        if "torch._dynamo" not in sys.modules:
            return  # nothing was compiled, and it takes a second to import
        with self._lock:
            self._searches.add(search)
            if self._stance is None:
                self._stance = torch.compiler.set_stance("force_eager")

    def leave(self, search: object) -> None:
        with self._lock:
            self._searches.discard(search)
            if not self._searches and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_PLAIN_PYTHON = _PlainPython()
