"""Find the k-th highest of many numbers digit by digit, from histograms: on any device, and over many processes.

Floats without a sign sort like their bit patterns read as integers, and negative ones in the opposite order below them.
So the k-th highest of any number of tensors is found by a radix select: two passes for float32, four for float64.
Tensors are never joined into one, and of several processes only the histograms are exchanged.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from lightning_drive.core.grouped_tensors import chunk_size, chunks
from lightning_drive.core.processes import Ranks
from lightning_drive.core.ranked_parts import Cut, Part

_DIGIT = 16
"""Bits of a digit. The first one has the sign, the exponent and what fits of the mantissa."""

_BINS = 1 << _DIGIT
_SIGN = _BINS >> 1
"""The lowest first digit of negative numbers."""

_NON_FINITE = {torch.float32: 0x7F80, torch.float64: 0x7FF0}
"""The lowest first digit of infinities and NaN without a sign; with one it is higher by ``_SIGN``."""

_FEW = 8
"""Entries are copied out where they are at most one in so many, so that copies take no more memory than the masks."""

_PRUNED = _BINS - 1
"""Where pruned entries are counted: their bits are all set, as those of a negative NaN are."""


def cut(parts: Sequence[Part], dtype: torch.dtype, num_kept: int, ranks: Ranks) -> Cut | None:
    """Find the ``num_kept``-th highest of the numbers that are alive, over all ranks.

    Args:
        parts: What this rank holds, in float32 or float64.
        dtype: Which of the two.
        num_kept: Which number to find, in ``1..number of alive ones``.
        ranks: The processes that hold the numbers.

    Returns:
        The number, or ``None`` if an alive one is NaN or infinite.

    """
    key_dtype = torch.int64 if dtype == torch.float64 else torch.int32
    copies = [_survivors(part) for part in parts]
    first = dtype.itemsize * 8 - _DIGIT
    prefix = digit = 0
    is_negative = False
    remaining, own = num_kept, torch.zeros(_BINS, dtype=torch.int64)
    candidates: list[Tensor] = []
    for shift in range(first, -1, -_DIGIT):
        keys: Iterable[Tensor] = candidates or _joined(
            key for part, copied in zip(parts, copies, strict=True) for key in _keys(part, copied, key_dtype)
        )
        if shift < first:
            keys = (key[key >> shift + _DIGIT == prefix] for key in keys)
            if own[digit] * _FEW < sum(part.num_alive for part in parts):
                keys = candidates = list(_joined(keys))
        own = _histogram((key >> shift).to(torch.int32).bitwise_and_(_BINS - 1) for key in keys)
        if shift == first:
            marked = (part for part, copied in zip(parts, copies, strict=True) if not copied)
            own[_PRUNED] -= sum(len(part.flat) - part.num_alive for part in marked)
        histogram = ranks.sum(own)
        if shift == first:
            by_sign = histogram.view(2, _SIGN)
            if by_sign[:, _NON_FINITE[dtype] :].any():
                return None
            num_others = int(by_sign[0].sum())
            is_negative = remaining > num_others
            digit, remaining = _digit(by_sign[int(is_negative)], remaining - num_others * is_negative, is_negative)
            prefix = digit - _SIGN * is_negative  # as integers have it
            digit += _SIGN * is_negative
        else:
            digit, remaining = _digit(histogram, remaining, is_negative)
            prefix = prefix << _DIGIT | digit
    threshold = torch.tensor(prefix, dtype=key_dtype).view(dtype).item()
    return Cut(threshold, num_kept - remaining, int(histogram[digit]))


def _survivors(part: Part) -> list[Tensor]:
    """Copy out the alive numbers, in chunks, if they are few; marking the others costs less if they are not."""
    if part.alive is None or part.num_alive * _FEW > len(part.flat):
        return []
    return [chunk[mask] for chunk, mask in zip(chunks(part.flat), chunks(part.alive), strict=True)]


def _keys(part: Part, survivors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Return the bit patterns, some at a time; those of pruned entries have all bits set."""
    numbers = survivors or chunks(part.flat)
    masks = repeat(None) if survivors or part.alive is None else chunks(part.alive)
    for number, mask in zip(numbers, masks):  # noqa: B905 - one of them may be endless
        key = (number + 0.0).view(dtype)  # adding 0.0 makes -0.0, whose sign bit is set, a zero
        yield key if mask is None else key.bitwise_or_(mask.view(torch.int8) - 1)


def _joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Join flat tensors of a device up to the size of a chunk, since every histogram has a price of its own."""
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        size += tensor.numel()
        if waiting and (tensor.device != waiting[0].device or size > chunk_size(tensor.device)):
            yield torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            waiting, size = [], tensor.numel()
        waiting.append(tensor)
    yield from [torch.cat(waiting)] if waiting else []


def _histogram(digits: Iterator[Tensor]) -> Tensor:
    """Count the digits of all chunks where they are, and bring only the sum to the CPU."""
    total = torch.zeros(_BINS, dtype=torch.int64)
    for digit in digits:
        total = total.to(digit.device) + torch.bincount(digit, minlength=_BINS)
    return total.cpu()


def _digit(histogram: Tensor, num_kept: int, descends: bool) -> tuple[int, int]:
    """Find the bin that holds the ``num_kept``-th entry from the top, and that entry's place within the bin.

    ``descends`` says that higher digits are of lower numbers, as those of negative ones are.
    """
    from_top = (histogram if descends else histogram.flip(0)).cumsum(0)
    position = int((from_top < num_kept).count_nonzero())
    above = int(from_top[position - 1]) if position else 0
    return position if descends else len(histogram) - 1 - position, num_kept - above
