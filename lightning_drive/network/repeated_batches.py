"""Batches that can be gone through again and again, also those that an iterator yields only once."""

from collections.abc import Iterable, Iterator
from typing import Any


class Passes:
    """Batches, finite or endless, that can be gone through again; those of an iterator are kept and repeated."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._kept: list[Any] | None = [] if isinstance(batches, Iterator) else None
        self._ended = False
        self.length: int | None = None
        """The number of batches in the last whole pass; ``None`` before its end."""

    def __iter__(self) -> Iterator[Any]:
        length = 0
        for length, batch in enumerate(self._batches if self._kept is None else self._repeated(self._kept), 1):  # noqa: B007
            yield batch
        self.length = length

    def _repeated(self, kept: list[Any]) -> Iterator[Any]:
        yield from kept
        if not self._ended:
            for batch in self._batches:
                kept.append(batch)
                yield batch
        self._ended = True


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches in order, again and again; raise a ``ValueError`` if there are none.

    A loader or a list is read anew each time. An iterator cannot be, so its batches are kept and repeated.

    Examples:
        >>> from itertools import islice
        >>> list(islice(endless([1, 2, 3]), 5)), list(islice(endless(iter([1, 2, 3])), 5))
        ([1, 2, 3, 1, 2], [1, 2, 3, 1, 2])

    """
    passes = batches if isinstance(batches, Passes) else Passes(batches)
    while True:
        yield from passes
        if not passes.length:
            raise ValueError("There is nothing to score on: `batches` is empty.")
