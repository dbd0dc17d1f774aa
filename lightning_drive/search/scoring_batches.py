"""The batches to score on, in order and cycled; batches with nothing to score by are skipped and counted."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

from lightning_drive.network.repeated_batches import Passes, endless

_MOST_IN_A_ROW = 10_000
"""How many batches in a row may be skipped where the length of a pass over the data is not known."""


class NothingToScoreByError(ValueError):
    """All batches of a whole pass over the data have no loss, or one that depends on no prunable parameter."""


class ScoringBatches:
    """The batches of one search.

    Args:
        batches: A finite or endless iterable; a finite one is cycled.

    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._passes = batches if isinstance(batches, Passes) else Passes(batches)
        self._batches = self._remembering_first(endless(self._passes))
        self._first: Any = None
        self._skipped_in_a_row = 0
        self._reason = ""  # why the last batch was skipped
        self.num_skipped = 0
        """The number of batches that were skipped."""

    @property
    def num_in_pass(self) -> int | None:
        """The number of batches in a whole pass over the data; ``None`` before the end of the first pass."""
        return self._passes.length

    def first(self) -> Any:
        """Return the first batch, and read it if none was read so far."""
        if self._first is None:
            next(self._batches)
        return self._first

    def take(self, number: float) -> Iterator[Any]:
        """Yield batches until ``number`` of them were not skipped; raise ValueError if a whole pass is skipped."""
        while number:
            batch = next(self._batches)
            if self._skipped_in_a_row >= (self._passes.length or _MOST_IN_A_ROW):
                where = ", a whole pass over the data" if self._passes.length else ""
                raise NothingToScoreByError(
                    f"{self._reason} This was the case for {self._skipped_in_a_row:,} batches in a row{where}: there is"
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
        """Repeat the next batch from here on, so that scores can be compared."""
        self._batches = repeat(next(self._batches))

    def _remembering_first(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._first is None:
                self._first = batch
            yield batch
