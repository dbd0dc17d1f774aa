"""Time pieces of work against one another on this machine, briefly."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")

_SECONDS = 0.02
"""How long the repetitions of one comparison take in all, at least two of each."""
_MOST = 9
_MARGIN = 0.95
"""A sparse form is taken if it needs less than this part of the dense time: what is closer is noise."""


def least_seconds(works: Mapping[Name, Callable[[], object]], runs: int | None = None) -> dict[Name, float]:
    """Return the least seconds of several runs of each piece of work, in turn; the first run of each does not count.

    With ``runs`` each is run so often, as several processes at once must do; else as often as there is time.

    They are compared on a machine that others use too: what another process slows down is slow once, not each time.
    What took twice as long as another one is not run again.
    """
    for work in works.values():
        work()
    seconds = dict.fromkeys(works, float("inf"))
    begin = time.perf_counter()
    for repetition in range(runs or _MOST):
        fastest = min(seconds.values())
        for name, work in works.items():
            if runs or seconds[name] <= 2 * fastest:
                start = time.perf_counter()
                work()
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        if not runs and repetition and time.perf_counter() - begin > _SECONDS:
            break
    return seconds


def is_faster(seconds: float, dense_seconds: float) -> bool:
    """Whether a time is so much shorter than that of the dense form that it is no chance."""
    return seconds < _MARGIN * dense_seconds
