"""Scores in, keep masks out: the exact number of highest scores, with ties settled by position.

Non-negative floats sort like their bit patterns read as integers. So the k-th highest score of any number of
tensors is found digit by digit from histograms (a radix select): three passes for float32, five for float64, most
of them over a small remainder, and the scores of different tensors are never joined into one.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Entries looked at together: temporaries stay this small however large a tensor is."""

_SHIFTS = {torch.int32: (20, 10, 0), torch.int64: (52, 39, 26, 13, 0)}
"""Where each digit starts. The first digit is 12 bits wide: the sign, the exponent and what fits of the mantissa."""

_FIRST_NON_FINITE = {torch.int32: 0x7F8, torch.int64: 0x7FF}
_FIRST_NEGATIVE = 0x800


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


def keep_highest(scores: Mapping[str, Tensor], num_kept: int, alive: Mapping[str, Tensor] | None = None) -> Ranking:
    """Rank the entries of all tensors together and keep exactly the ``num_kept`` highest.

    Ties go to the earlier tensor in ``scores``, then to the lower flat index, so equal scores give equal masks on
    every device and every rank.

    Args:
        scores: Parameter name to finite scores >= 0 of any shape; higher is more worth keeping. Float64 scores are
            compared in float64, all others exactly in float32.
        num_kept: How many entries to keep, in ``1..number of (alive) entries``.
        alive: Parameter name to a boolean mask; entries that are ``False`` are pruned already and cannot return.

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
    total = sum(int(alive[name].count_nonzero()) if name in alive else score.numel() for name, score in scores.items())
    if not 1 <= num_kept <= total:
        raise ValueError(f"`num_kept` must be in 1..{total}, the number of scores to choose from, got {num_kept}.")
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores.values()) else torch.float32
    scores = {name: score.detach().to(dtype).contiguous() for name, score in scores.items()}
    threshold, ties_kept, num_tied = _cut(scores, num_kept, alive, dtype)
    masks = _masks(scores, alive, threshold, ties_kept if ties_kept < num_tied else None)
    return Ranking(masks, threshold, num_kept - ties_kept, num_tied)


def keep_highest_each(
    scores: Mapping[str, Tensor], num_kept: Mapping[str, int], alive: Mapping[str, Tensor] | None = None
) -> dict[str, Ranking]:
    """Rank the entries of each tensor by itself and keep exactly its own ``num_kept`` highest.

    Args:
        scores: Parameter name to finite scores >= 0 of any shape.
        num_kept: Parameter name to how many of its entries to keep.
        alive: Parameter name to a boolean mask; entries that are ``False`` are pruned already and cannot return.

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
        name: keep_highest({name: score}, num_kept[name], {name: alive[name]} if alive else None)
        for name, score in scores.items()
    }


def _cut(
    scores: Mapping[str, Tensor], num_kept: int, alive: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[float, int, int]:
    """Find the threshold, how many scores equal to it are kept, and how many there are."""
    key_dtype = torch.int64 if dtype == torch.float64 else torch.int32
    first, *others = _SHIFTS[key_dtype]
    histogram = _histogram((key >> first & 0xFFF for key in _keys(scores, alive, dtype)), 0x1000)
    if histogram[_FIRST_NON_FINITE[key_dtype] :].any():
        raise ValueError(_unrankable(scores, alive))
    digit, remaining = _digit(histogram, num_kept)
    prefix = digit
    candidates = [key[key >> first == digit] for key in _keys(scores, alive, dtype)]
    shift = first
    for next_shift in others:
        bins = 1 << (shift - next_shift)
        histogram = _histogram((key >> next_shift & bins - 1 for key in candidates), bins)
        digit, remaining = _digit(histogram, remaining)
        prefix, shift = prefix * bins + digit, next_shift
        if next_shift:
            candidates = [key[key >> next_shift == prefix] for key in candidates]
    threshold = torch.tensor(prefix, dtype=key_dtype).view(dtype).item()
    return threshold, remaining, int(histogram[digit])


def _keys(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Go through the bit patterns of all scores that may be kept, some at a time."""
    key_dtype = torch.int64 if dtype == torch.float64 else torch.int32
    for name, score in scores.items():
        chunks = torch.split(score.reshape(-1), CHUNK)
        kept = torch.split(alive[name].reshape(-1), CHUNK) if name in alive else [None] * len(chunks)
        for chunk, mask in zip(chunks, kept, strict=True):
            live = chunk if mask is None else chunk[mask]
            yield (live + 0.0).view(key_dtype)  # adding 0.0 makes -0.0, whose sign bit is set, a zero


def _histogram(digits: Iterator[Tensor], bins: int) -> Tensor:
    """Count the digits of all chunks where they are, and bring only the sum to the CPU."""
    total = torch.zeros(bins, dtype=torch.int64)
    for digit in digits:
        total = total.to(digit.device) + torch.bincount(digit, minlength=bins)
    return total.cpu()


def _digit(histogram: Tensor, num_kept: int) -> tuple[int, int]:
    """Find the bin that holds the ``num_kept``-th entry from the top, and that entry's place within the bin."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top < num_kept).count_nonzero())
    above = int(from_top[position - 1]) if position else 0
    return len(histogram) - 1 - position, num_kept - above


def _masks(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], threshold: float, ties_kept: int | None
) -> dict[str, Tensor]:
    """Keep what is above the threshold, and the first ``ties_kept`` on it (``None``: all)."""
    masks = {}
    for name, score in scores.items():
        mask = score >= threshold if ties_kept is None else score > threshold
        if name in alive:
            mask &= alive[name]
        if ties_kept:
            tied = score == threshold
            if name in alive:
                tied &= alive[name]
            first = tied.view(-1).nonzero().view(-1)[:ties_kept]
            mask.view(-1)[first] = True
            ties_kept -= len(first)
        masks[name] = mask
    return masks


def _unrankable(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor]) -> str:
    """Say which scores cannot be ranked, and why."""
    for name, score in scores.items():
        live = score[alive[name]] if name in alive else score
        bad = int((~live.isfinite()).count_nonzero())
        if bad:
            return f"The scores of {name!r} contain nan or inf ({bad} of {live.numel()}), so they cannot be ranked."
        if (live < 0).any():
            return f"The scores of {name!r} must not be negative, but the lowest is {live.min().item():g}."
    raise AssertionError("a score was out of range, and then was not")
