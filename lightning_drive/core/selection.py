"""Scores in, keep masks out: the exact number of highest scores, with ties settled by position.

Where one process has all of them on the CPU, :mod:`lightning_drive.brackets` finds the k-th highest. Everywhere else:
non-negative floats sort like their bit patterns read as integers. So the k-th highest score of any number of
tensors is found digit by digit from histograms (a radix select): two passes for float32, four for float64. The scores
of different tensors are never joined into one, and nothing of their size is kept but the masks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_drive.core import flat_tensors, sampled_threshold
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.core.sampled_threshold import Cut

CHUNK = 1 << 19
"""Entries looked at together: temporaries stay this small however large a tensor is."""

_DIGIT = 16
"""Bits of a digit. The first one has the sign, the exponent and what fits of the mantissa."""

_BINS = 1 << _DIGIT
_FIRST_NON_FINITE = {torch.float32: 0x7F80, torch.float64: 0x7FF0}
_FEW = 8
"""Entries are copied out where they are at most one in so many, so that copies take no more memory than the masks."""

_PRUNED = _BINS - 1
"""Where entries are counted that are pruned already: their bits are all set, as those of a negative NaN are."""


class Ranking(NamedTuple):
    """Masks, and how the line between kept and pruned was drawn."""

    masks: dict[str, Tensor]
    """Parameter name to a boolean mask with the shape and device of its scores; ``True`` keeps."""
    threshold: float
    """The lowest score that is kept."""
    num_above: int
    """How many scores are higher than the threshold, all kept."""
    num_tied: int
    """How many scores equal the threshold; of these, the first ones by position are kept."""
    num_kept: int
    """How many are kept in all; where ranks hold parts of the tensors, these numbers are for all of them together."""
    histogram: Tensor | None
    """How many scores begin with which 16 bits, from the lowest to the highest, see :func:`bin_edges`; ``None`` if
    nobody asked for it."""
    dtype: torch.dtype
    """In which the scores were compared."""


@torch.no_grad()
def keep_highest(
    scores: Mapping[str, Tensor],
    num_kept: int,
    alive: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
    *,
    num_alive: Mapping[str, int] | None = None,
    histogram: bool = True,
) -> Ranking:
    """Rank the entries of all tensors together and keep exactly the ``num_kept`` highest.

    Ties go to the earlier tensor in ``scores``, then to the lower flat index, so equal scores give equal masks on
    every device and every rank.

    Args:
        scores: Parameter name to finite scores >= 0 of any shape; higher is more worth keeping. Float64 scores are
            compared in float64, all others exactly in float32.
        num_kept: How many entries to keep, in ``1..number of (alive) entries``.
        alive: Parameter name to a boolean mask; entries that are ``False`` are pruned already and cannot return.
        ranks: Processes that each hold a part of every tensor, split along the first dimension in the order of ranks.
            Scores are then ranked over all of them, and only histograms are exchanged.
        num_alive: Parameter name to how many entries its mask keeps here, if that is known.
        histogram: Whether to give a histogram, too. Without one, the ranking is often quicker.

    Returns:
        The masks and where the line was drawn.

    Raises:
        ValueError: If ``num_kept`` is out of range, or a score is negative, infinite or NaN (names the tensor).

    Example:
        >>> ranking = keep_highest({"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.7, 0.8])}, num_kept=2)
        >>> ranking.masks
        {'a': tensor([False,  True]), 'b': tensor([False,  True])}

        A threshold alone could not split these ties:

        >>> keep_highest({"a": torch.ones(2), "b": torch.ones(2)}, num_kept=3).masks
        {'a': tensor([True, True]), 'b': tensor([ True, False])}

    """
    alive = alive or {}
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores.values()) else torch.float32
    parts = _parts({name: _comparable(score, dtype) for name, score in scores.items()}, alive, num_alive)
    total = int(ranks.sum(torch.tensor(sum(part.num_alive for part in parts))))
    if not 1 <= num_kept <= total:
        raise ValueError(f"`num_kept` must be in 1..{total}, the number of scores to choose from, got {num_kept}.")
    found = None
    if not histogram and ranks.size == 1 and all(part.flat.device.type == "cpu" for part in parts):
        found = sampled_threshold.cut([(part.flat, part.alive) for part in parts], total, num_kept)
    cut, distribution = (found, None) if found else _cut(parts, dtype, num_kept, ranks)
    ties_kept = num_kept - cut.num_above
    masks = _masks(parts, cut.threshold, ties_kept if ties_kept < cut.num_tied else None, ranks)
    return Ranking(masks, cut.threshold, cut.num_above, cut.num_tied, num_kept, distribution, dtype)


def keep_highest_each(
    scores: Mapping[str, Tensor],
    num_kept: Mapping[str, int],
    alive: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
    *,
    num_alive: Mapping[str, int] | None = None,
    histogram: bool = True,
) -> dict[str, Ranking]:
    """Rank the entries of each tensor by itself and keep exactly its own ``num_kept`` highest.

    Args:
        scores: Parameter name to finite scores >= 0 of any shape.
        num_kept: Parameter name to how many of its entries to keep.
        alive: Parameter name to a boolean mask; entries that are ``False`` are pruned already and cannot return.
        ranks: Processes that each hold a part of every tensor, as in :func:`keep_highest`.
        num_alive: As in :func:`keep_highest`.
        histogram: Whether to give histograms, too.

    Returns:
        Parameter name to its ranking, each as by :func:`keep_highest` on that tensor alone.

    Raises:
        ValueError: As :func:`keep_highest`.

    Example:
        >>> scores = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([8.0, 9.0])}
        >>> [ranking.masks for ranking in keep_highest_each(scores, {"a": 1, "b": 1}).values()]
        [{'a': tensor([False,  True])}, {'b': tensor([False,  True])}]

    """
    return {
        name: keep_highest(
            {name: score},
            num_kept[name],
            {name: alive[name]} if alive else None,
            ranks,
            num_alive=num_alive,
            histogram=histogram,
        )
        for name, score in scores.items()
    }


def bin_edges(dtype: torch.dtype) -> Tensor:
    """Give the lowest score of every bin of :attr:`Ranking.histogram` for finite scores, and the end of the last one.

    Args:
        dtype: In which the scores were compared.

    """
    key_dtype = torch.int64 if dtype == torch.float64 else torch.int32
    keys = torch.arange(_FIRST_NON_FINITE[dtype] + 1, dtype=key_dtype) << dtype.itemsize * 8 - _DIGIT
    return keys.view(dtype)


class _Part(NamedTuple):
    """Tensors that are ranked as one: small neighbours, of which this has a copy, or a large tensor by itself."""

    scores: Mapping[str, Tensor]
    flat: Tensor
    """All scores, in order."""
    alive: Tensor | None
    """Their masks likewise; ``None`` where nothing is pruned yet."""
    num_alive: int

    def masked(self, mask: Tensor) -> Tensor:
        """Leave out of a flat mask what is pruned already."""
        return mask if self.alive is None else mask.logical_and_(self.alive)

    def each(self, flat: Tensor) -> Sequence[Tensor]:
        """Return views of a flat tensor in the shapes of the scores."""
        return flat_tensors.parted(flat, [*self.scores.values()])

    def survivors(self) -> list[Tensor]:
        """Copy out what is not pruned, in chunks, if that is little; to mark what is pruned costs less if it is not."""
        if self.alive is None or self.num_alive * _FEW > len(self.flat):
            return []
        return [chunk[mask] for chunk, mask in self._chunks()]

    def keys(self, survivors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """Go through the bit patterns, some at a time; those of pruned entries have all bits set."""
        for chunk, mask in zip(survivors, repeat(None)) if survivors else self._chunks():
            key = (chunk + 0.0).view(dtype)  # adding 0.0 makes -0.0, whose sign bit is set, a zero
            yield key if mask is None else key.bitwise_or_(mask.view(torch.int8) - 1)

    def _chunks(self) -> Iterator[tuple[Tensor, Any]]:
        size = _chunk_size(self.flat.device)
        masks = repeat(None) if self.alive is None else torch.split(self.alive, size)
        return zip(torch.split(self.flat, size), masks)  # noqa: B905 - one of them may be endless


def _comparable(score: Tensor, dtype: torch.dtype) -> Tensor:
    return score if score.dtype == dtype and score.is_contiguous() else score.to(dtype).contiguous()


def _parts(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], num_alive: Mapping[str, int] | None
) -> list[_Part]:
    """Divide what is to be ranked into parts, and count the survivors of each, waiting for the devices only once."""
    names = [*scores]
    groups = [names[each] for each in flat_tensors.groups([*scores.values()])]
    pruned = [group for group in groups if not alive.keys().isdisjoint(group)]
    masks = [
        [alive[name] if name in alive else torch.ones_like(scores[name], dtype=torch.bool) for name in group]
        for group in pruned
    ]
    joined = [flat_tensors.joined(each) for each in masks]
    if num_alive is None:
        counts = _numbers(flat_tensors.count(mask).view(1) for mask in joined)
    else:
        counts = [sum(num_alive[name] for name in group) for group in pruned]
    survivors = {group[0]: each for group, each in zip(pruned, zip(joined, counts, strict=True), strict=True)}
    found = []
    for group in groups:
        own = {name: scores[name] for name in group}
        flat = flat_tensors.joined([*own.values()])
        mask, count = survivors.get(group[0], (None, len(flat)))
        found.append(_Part(own, flat, mask if count < len(flat) else None, count))
    return found


def _cut(parts: Sequence[_Part], dtype: torch.dtype, num_kept: int, ranks: Ranks) -> tuple[Cut, Tensor]:
    """Find the threshold, and how all scores are distributed."""
    key_dtype = torch.int64 if dtype == torch.float64 else torch.int32
    survivors = [part.survivors() for part in parts]
    first = dtype.itemsize * 8 - _DIGIT
    prefix = digit = 0
    remaining, own = num_kept, torch.zeros(_BINS, dtype=torch.int64)
    candidates: list[Tensor] = []
    for shift in range(first, -1, -_DIGIT):
        keys: Iterable[Tensor] = candidates or _joined(
            key for part, copied in zip(parts, survivors, strict=True) for key in part.keys(copied, key_dtype)
        )
        if shift < first:
            keys = (key[key >> shift + _DIGIT == prefix] for key in keys)
            if own[digit] * _FEW < sum(part.num_alive for part in parts):
                keys = candidates = list(_joined(keys))
        own = _histogram((key >> shift).to(torch.int32).bitwise_and_(_BINS - 1) for key in keys)
        if shift == first:
            marked = (part for part, copied in zip(parts, survivors, strict=True) if not copied)
            own[_PRUNED] -= sum(len(part.flat) - part.num_alive for part in marked)
        histogram = ranks.sum(own)
        if shift == first:
            if histogram[_FIRST_NON_FINITE[dtype] :].any():
                raise ValueError(_unrankable(parts))
            distribution = histogram[: _FIRST_NON_FINITE[dtype]]
        digit, remaining = _digit(histogram, remaining)
        prefix = prefix << _DIGIT | digit
    threshold = torch.tensor(prefix, dtype=key_dtype).view(dtype).item()
    return Cut(threshold, num_kept - remaining, int(histogram[digit])), distribution


def _chunk_size(device: torch.device) -> int:
    return CHUNK if device.type == "cpu" else CHUNK << 5  # where starting an operation is what takes the time


def _joined(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Join flat tensors of a device up to the size of a chunk, since every histogram has a price of its own."""
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        size += tensor.numel()
        if waiting and (tensor.device != waiting[0].device or size > _chunk_size(tensor.device)):
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


def _digit(histogram: Tensor, num_kept: int) -> tuple[int, int]:
    """Find the bin that holds the ``num_kept``-th entry from the top, and that entry's place within the bin."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top < num_kept).count_nonzero())
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, num_kept - above


def count_each(masks: Iterable[Tensor], ranks: Ranks = ALONE) -> list[int]:
    """Count what every mask keeps, waiting for the devices only once.

    Args:
        masks: Boolean masks.
        ranks: Processes that each hold a part of every mask.

    """
    return _numbers(flat_tensors.counts([*masks]), ranks)


def _numbers(counts: Iterable[Tensor], ranks: Ranks = ALONE) -> list[int]:
    """Bring counts to the CPU, all at once, added up over ranks."""
    waiting = [*counts]
    if not waiting:
        return []
    found: list[int] = ranks.sum(torch.cat([each.to(waiting[0].device) for each in waiting])).tolist()
    return found


def _masks(parts: Sequence[_Part], threshold: float, ties_kept: int | None, ranks: Ranks) -> dict[str, Tensor]:
    """Keep what is above the threshold, and the first ``ties_kept`` on it (``None``: all)."""
    if ties_kept is None:
        flat = [part.masked(part.flat >= threshold) for part in parts]
    else:
        flat = [part.masked(part.flat > threshold) for part in parts]
        _add_ties_(flat, parts, threshold, ties_kept, ranks)
    return {
        name: mask
        for part, each in zip(parts, flat, strict=True)
        for name, mask in zip(part.scores, part.each(each), strict=True)
    }


def _add_ties_(masks: Sequence[Tensor], parts: Sequence[_Part], threshold: float, ties_kept: int, ranks: Ranks) -> None:
    """Add the first ``ties_kept`` entries on the threshold to the flat masks of the parts."""
    if ranks.size == 1 and all(mask.device.type == "cpu" for mask in masks):  # where counts are not waited for
        for mask, part in zip(masks, parts, strict=True):
            if ties_kept:
                ties_kept -= _add_first_(mask, part.masked(part.flat == threshold), ties_kept)
        return

    def tied(part: _Part) -> Sequence[Tensor]:  # again and again: to keep them would take as much memory as the masks
        return part.each(part.masked(part.flat == threshold))

    num_tied = _numbers(count for part in parts for count in flat_tensors.counts(tied(part)))
    shares = iter(zip(num_tied, _shares(torch.tensor(num_tied), ties_kept, ranks), strict=True))
    for mask, part in zip(masks, parts, strict=True):
        own = [*islice(shares, len(part.scores))]
        if all(share == count for count, share in own):
            mask.copy_(part.masked(part.flat >= threshold))
        elif any(share for _, share in own):
            for (count, share), kept, ties in zip(own, part.each(mask), tied(part), strict=True):
                if share == count:
                    kept.logical_or_(ties)
                elif share:
                    _add_first_(kept.view(-1), ties.view(-1), share)


def _add_first_(mask: Tensor, ties: Tensor, number: int) -> int:
    """Add the first so many of the ties, or all if there are no more; say how many."""
    added = 0
    size = _chunk_size(mask.device)
    for kept, some in zip(torch.split(mask, size), torch.split(ties, size), strict=True):
        count = int(flat_tensors.count(some))
        if added + count > number:
            kept[some.nonzero().view(-1)[: number - added]] = True
            return number
        kept.logical_or_(some)
        added += count
    return added


def _shares(num_tied: Tensor, ties_kept: int, ranks: Ranks) -> list[int]:
    """Say how many of this rank's ties are kept in each tensor: by tensor first, then by rank, which is by position."""
    everywhere = ranks.gather(num_tied)
    in_order = everywhere.T.flatten()
    before = (in_order.cumsum(0) - in_order).view_as(everywhere.T)[:, ranks.index]
    shares: list[int] = (ties_kept - before).clamp(min=0).minimum(num_tied).tolist()
    return shares


def _unrankable(parts: Sequence[_Part]) -> str:
    """Say which scores cannot be ranked, and why."""
    for part in parts:
        masks = repeat(None) if part.alive is None else part.each(part.alive)
        for (name, score), mask in zip(part.scores.items(), masks):  # noqa: B905 - one of them may be endless
            live = score if mask is None else score[mask]
            bad = int((~live.isfinite()).count_nonzero())
            if bad:
                return f"The scores of {name!r} contain nan or inf ({bad} of {live.numel()}), so they cannot be ranked."
            if (live < 0).any():
                return f"The scores of {name!r} must not be negative, but the lowest is {live.min().item():g}."
    return "The scores that another rank holds contain nan, inf or negative numbers, so they cannot be ranked."
