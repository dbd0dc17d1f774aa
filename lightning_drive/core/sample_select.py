"""Find the k-th highest of many numbers on the CPU with little more than two comparisons for each of them.

A sample gives the narrow range in which it must be. The numbers above that range are counted, those within it are
copied out, and the k-th highest is found among these few: exactly, or not at all where the sample misled.
"""

from collections.abc import Sequence
from itertools import repeat
from math import gcd, inf, sqrt
from typing import Any

import torch
from torch import Tensor

from lightning_drive.core.counting import count
from lightning_drive.core.ranked_parts import Cut

_SAMPLE = 1 << 15
"""The most numbers of a sample; where no more are left than these, all of them are copied out."""

_LEAST_STRIDE = 64
_DEVIATIONS = 3
"""How many standard deviations of a rank in the sample the range goes to either side."""

_CHUNK = 1 << 18
"""Numbers looked at together, so that all is done while they are in the cache."""

_FEW = 4
"""At most one number in so many is copied out, if there are many."""

_WORD = 8
"""Marks that are looked at together, as one number, since few of them are set."""


def cut(pieces: Sequence[tuple[Tensor, Tensor | None]], num_alive: int, num_kept: int) -> Cut | None:
    """Find the ``num_kept``-th highest of the numbers that are alive.

    Args:
        pieces: Flat tensors of one floating-point type on the CPU, each with a mask of what is alive, or ``None``
            if all is.
        num_alive: How many numbers are alive.
        num_kept: Which one to find, in ``1..num_alive``.

    Returns:
        The number, or ``None`` if the sample misled, if much is equal or nearly so, or if a number is NaN or infinite.

    Examples:
        >>> cut([(torch.tensor([0.1, 0.7, 0.3]), None), (torch.tensor([0.3, 0.9]), None)], num_alive=5, num_kept=3)
        Cut(threshold=0.30000001192092896, num_above=2, num_tied=2)

    """
    low, high = _range(pieces, num_alive, num_kept)
    num_above = num_within = 0
    copied: list[Tensor] = []
    for values, alive in _chunks(pieces):
        least, most = values.aminmax()
        if not (least > -inf and most < inf):
            return None
        higher, within = values > high, values >= low
        if alive is not None:
            higher.logical_and_(alive)
            within.logical_and_(alive)
        within.logical_xor_(higher)
        num_above += int(count(higher))
        if low < high:
            copied.append(_marked(values, within))
            num_within += len(copied[-1])
            if num_within > max(_SAMPLE, num_alive // _FEW):
                return None
        else:
            num_within += int(count(within))
    place = num_kept - num_above
    if not 1 <= place <= num_within:
        return None
    if low == high:
        return Cut(low, num_above, num_within)
    within_range = torch.cat(copied)
    threshold = within_range.kthvalue(num_within - place + 1).values
    num_above += int((within_range > threshold).count_nonzero())
    num_tied = int((within_range == threshold).count_nonzero())
    return Cut(threshold.item() + 0.0, num_above, num_tied)  # 0.0 in place of -0.0


def _range(pieces: Sequence[tuple[Tensor, Tensor | None]], num_alive: int, num_kept: int) -> tuple[float, float]:
    """Return the lowest and the highest value that the number may have; all of them if there are few numbers."""
    if num_alive <= _SAMPLE:
        return -inf, inf
    stride = max(_LEAST_STRIDE, sum(values.numel() for values, _ in pieces) // _SAMPLE)
    while gcd(stride, 2 * 3 * 5 * 7) > 1:  # or it could be that of kernels and rows
        stride += 1
    sample = torch.cat(
        [values[::stride] if alive is None else values[::stride][alive[::stride]] for values, alive in pieces]
    )
    size = len(sample)
    place = size * num_kept / num_alive
    reach = _DEVIATIONS * (1 + sqrt(place * max(0.0, size - place) / max(1, size)))
    first, last = int(place - reach), int(place + reach) + 1  # from the highest
    high = sample.kthvalue(size - first + 1).values.item() if first >= 1 else inf
    least = -inf if (sample < 0).any() else 0.0
    low = sample.kthvalue(size - last + 1).values.item() if last <= size else least
    return low, high


def _chunks(pieces: Sequence[tuple[Tensor, Tensor | None]]) -> Any:
    for values, alive in pieces:
        if not values.numel():
            continue
        yield from zip(  # noqa: B905 - one of them may be endless
            torch.split(values, _CHUNK), repeat(None) if alive is None else torch.split(alive, _CHUNK)
        )


def _marked(values: Tensor, marks: Tensor) -> Tensor:
    """Return ``values[marks]`` of a few marks, without looking at one after the other."""
    even = len(values) - len(values) % _WORD
    words = marks[:even].view(torch.int64)
    places = words.nonzero().view(-1)
    near = values[:even].view(-1, _WORD).index_select(0, places).view(-1)
    marked = words.index_select(0, places).view(torch.bool)
    return torch.cat([near[marked], values[even:][marks[even:]]])
