"""Time pieces of work against one another on this machine, briefly."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Name = TypeVar("Name")

_SECONDS = 0.02
"""How long the repetitions of one comparison take in all, if that is enough for the least number of them."""
_LEAST, _MOST = 2, 9
_MARGIN = 0.95
"""A sparse form is taken if it needs less than this part of the dense time: what is closer is noise."""


def least_seconds(works: Mapping[Name, Callable[[], object]], runs: int | None = None) -> dict[Name, float]:
    """Return the least seconds of several runs of each piece of work, in turn; the first run of each does not count.

    They are compared on a machine that others use too: what another process slows down is slow once, not each time.
    What took twice as long as another one is not run again, and the comparison ends when nothing else is left. With
    ``runs`` each is run so often, as several processes that wait for one another must do.
    """
    for work in works.values():
        work()
    seconds = dict.fromkeys(works, float("inf"))
    begin = time.perf_counter()
    least = runs or _LEAST
    for repetition in range(runs or _MOST):
        open_works = [name for name in works if repetition < least or seconds[name] <= 2 * min(seconds.values())]
        is_over = time.perf_counter() - begin > _SECONDS or len(open_works) == 1
        if repetition >= least and is_over:
            break
        for name in open_works:
            start = time.perf_counter()
            works[name]()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def is_faster(seconds: float, dense_seconds: float) -> bool:
    """Whether a time is so much shorter than that of the dense form that it is no chance."""
    return seconds < _MARGIN * dense_seconds
