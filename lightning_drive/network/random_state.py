"""The random state of torch (CPU and CUDA), numpy and Python, and the return to it."""

import random
import sys
from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def preserved_rng() -> Generator[None]:
    """Put the random state of torch (CPU and CUDA), numpy and Python back on exit."""
    state = RandomState()
    try:
        try:
            yield
        finally:
            state.put_back()
    finally:
        state.put_back()  # once more, should an interrupt have cut it short


class RandomState:
    """The random state of torch (CPU and CUDA), numpy and Python at the time this was made."""

    def __init__(self) -> None:
        self._numpy = sys.modules.get("numpy")  # never imported for this alone
        self._states = random.getstate(), self._numpy and self._numpy.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def put_back(self) -> None:
        """Restore this random state; a second call changes nothing."""
        random.setstate(self._states[0])
        if self._numpy:
            self._numpy.random.set_state(self._states[1])
        torch.set_rng_state(self._states[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
