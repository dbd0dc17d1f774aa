"""The batches to score on: in order, again and again; batches that give nothing to score by are skipped and counted."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

from lightning_drive.network import gradients
from lightning_drive.network.gradients import Passes

_MOST_IN_A_ROW = 10_000
"""How many batches to skip one after another before that is an error, where the end of the data is not known."""


class ScoringBatches:
    """Batches of one search.

    Args:
        batches: A finite or endless iterable; a finite one is cycled.

    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._passes = batches if isinstance(batches, Passes) else Passes(batches)
        self._batches = self._remembering_first(gradients.endless(self._passes))
        self._first: Any = None
        self._skipped_in_a_row = 0
        self._reason = ""  # why the last batch was skipped
        self.num_skipped = 0
        """How many batches gave nothing to score by."""

    @property
    def num_in_pass(self) -> int | None:
        """How many batches a whole pass over the data has; ``None`` before the end of the first one."""
        return self._passes.length

    def first(self) -> Any:
        """Return the first batch, which is read if none was read so far."""
        if self._first is None:
            next(self._batches)
        return self._first

    def take(self, number: int) -> Iterator[Any]:
        """Yield the next batches until so many of them were not skipped; raise if a whole pass over the data was."""
        while number:
            batch = next(self._batches)
            if self._skipped_in_a_row >= (self._passes.length or _MOST_IN_A_ROW):
                where = ", a whole pass over the data" if self._passes.length else ""
                raise ValueError(
                    f"{self._reason} This was so for {self._skipped_in_a_row:,} batches in a row{where}: there is"
                    " nothing to score by."
                )
            before = self.num_skipped
            yield batch
            if self.num_skipped == before:
                number -= 1
                self._skipped_in_a_row = 0

    def skip(self, reason: str) -> None:
        """Count the batch that was taken last as skipped."""
        self._reason = reason
        self._skipped_in_a_row += 1
        self.num_skipped += 1

    def stand_still(self) -> None:
        """Yield the next batch again and again from here on, so that scores can be compared."""
        self._batches = repeat(next(self._batches))

    def _remembering_first(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._first is None:
                self._first = batch
            yield batch
