"""The history of pruning rounds, small enough to keep: what each removed from where, and the last scores in bins."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_drive.core import grouped_tensors
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.core.scores import in_full

Unit: TypeAlias = Literal["round", "cycle", "cut"]
"""What a method calls its rounds."""

NUM_BINS = 60
"""Bins of a :class:`ScoreHistogram`."""

_OUTLIERS = 1e-3
"""Fraction of the scores, the lowest, that do not stretch a histogram."""

_SAMPLE = 1 << 15
"""About the most scores that are looked at to find the lowest edge."""

_MARGIN = 1e-3
"""Decades between the edges and what lies just within them: more than a logarithm is rounded by."""

_JUST_BELOW = 1e-9
"""How far below the threshold its edge is on the axis: more than the edge is rounded by, and less than one can see."""

_MOST_DECADES = 30
"""How far below the largest score the linear part of an axis for scores of both signs begins at the most."""


@dataclass(frozen=True)
class Round:
    """One pruning round.

    Args:
        index: Its number, from 1; in iterative magnitude pruning every cycle has one.
        threshold: The lowest score that was kept; ``None`` where there was more than one ranking, such as one for
            every parameter.
        removed: How many weights it removed from each prunable parameter, in their order.

    """

    index: int
    threshold: float | None
    removed: tuple[int, ...]


@dataclass(frozen=True)
class ScoreHistogram:
    """The distribution of the scores of one round, in bins of equal width on an axis for many orders of magnitude.

    Only weights that earlier rounds had left have a score here. The axis is logarithmic, or, where scores are negative,
    that of the inverse hyperbolic sine: linear around 0 and logarithmic to both sides. If the round had one threshold,
    it is the edge between two bins: all that is below it was pruned, and all that is above it was kept.

    Args:
        low: The place of the lowest edge on the axis: its log10, or asinh of its ratio to ``width``.
        high: The place of the highest edge; no score is higher.
        kept: How many scores in each bin were kept.
        pruned: How many scores in each bin were pruned.
        kept_below: How many scores lower than the lowest edge, zeros included, were kept.
        pruned_below: How many of them were pruned.
        width: The score up to which, on both sides of 0, the axis is about linear; ``None`` if it is logarithmic.

    """

    low: float
    high: float
    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    kept_below: int
    pruned_below: int
    width: float | None = None

    @property
    def edges(self) -> list[float]:
        """The edges of the bins, as scores."""
        step = (self.high - self.low) / len(self.kept)
        places = [self.low + step * index for index in range(len(self.kept) + 1)]
        return [10**place if self.width is None else self.width * math.sinh(place) for place in places]


def removed_by_round(
    first: int, thresholds: Sequence[float | None], counts: Sequence[Iterable[int]]
) -> tuple[Round, ...]:
    """Return the rounds from number ``first`` on, from the lowest score that each kept and from counts of weights.

    The counts are those of every parameter before each round, and after the last one: one more than there are rounds.

    Examples:
        >>> removed_by_round(1, [0.5, 0.7], [(4, 4), (4, 2), (1, 1)])
        (Round(index=1, threshold=0.5, removed=(0, 2)), Round(index=2, threshold=0.7, removed=(3, 1)))

    """
    return tuple(
        Round(index, threshold, tuple(had - has for had, has in zip(before, after, strict=True)))
        for index, threshold, before, after in zip(
            range(first, first + len(thresholds)), thresholds, counts[:-1], counts[1:], strict=True
        )
    )


@torch.no_grad()
def score_histogram(
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    thresholds: Sequence[float],
    ranks: Ranks = ALONE,
) -> ScoreHistogram | None:
    """Count the scores that one round kept, and those that it pruned, in bins; ``None`` if all scores are zero.

    All counts are exact, and over all ranks. It takes two passes over the scores, and memory for some chunks of them.

    Args:
        scores: Parameter name to scores; those that are alive are finite.
        alive: Parameter name to the mask before the round.
        kept: Parameter name to the mask after it.
        thresholds: The lowest score that each ranking of the round kept: the axis goes down to them, and a single one
            is an edge.
        ranks: Processes that each hold a part of every tensor.

    """
    ends = _range(scores, alive, ranks)
    if not (ends.highest > 0 or ends.least < 0):
        return None
    axis = _logarithmic(ends, thresholds) if ends.least >= 0 else _of_both_signs(ends)
    if len(thresholds) == 1 and (thresholds[0] > 0 or axis.width is not None):
        axis = axis.with_edge_at(thresholds[0])
    counts = torch.zeros(3, NUM_BINS + 1, dtype=torch.int64)
    for score, before, after in _chunks(scores, alive, kept):
        place = axis.bins(score)
        place.add_(before.view(torch.int8) + after.view(torch.int8), alpha=NUM_BINS + 1)  # pruned before: 0, now: 1
        counts += torch.bincount(place, minlength=counts.numel()).view_as(counts).cpu()
    _, (pruned_below, *pruned), (kept_below, *kept_in_bins) = ranks.sum(counts).tolist()
    return ScoreHistogram(axis.low, axis.high, tuple(kept_in_bins), tuple(pruned), kept_below, pruned_below, axis.width)


class _Range(NamedTuple):
    """The range of the scores that are alive, the same on all ranks."""

    lowest: float
    """The lowest one above zero but for outliers, estimated from a sample if there are many scores."""
    highest: float
    """The highest one, or 0."""
    least: float
    """The lowest one of any sign, or 0."""
    typical: float
    """The size of the median one that is not 0, estimated likewise."""


class _Axis(NamedTuple):
    """An axis from ``low`` to ``high``, as in a :class:`ScoreHistogram`."""

    low: float
    high: float
    width: float | None
    ends: tuple[float, float]
    """Scores are moved to between these before their places are computed."""
    edge: tuple[int, float] | None = None
    """How many bins are below a threshold, and the threshold."""

    def with_edge_at(self, threshold: float) -> "_Axis":
        """Return an axis that is longer by a bin, and has an edge at the threshold."""
        step = (self.high - self.low) / (NUM_BINS - 1)
        place = self.places(torch.tensor([threshold], dtype=torch.float64)).item() - _JUST_BELOW
        num_below = math.ceil((place - self.low - _MARGIN) / step)
        low = place - num_below * step
        return self._replace(low=low, high=low + NUM_BINS * step, edge=(num_below, threshold))

    def places(self, score: Tensor) -> Tensor:
        """Return the places of scores on the axis, in new memory."""
        if self.width is None:
            return score.clamp(*self.ends).log10_()
        return score.double().clamp(*self.ends).div_(self.width).asinh_()

    def bins(self, score: Tensor) -> Tensor:
        """Return which bins scores are in, counted from 1; 0 is for those below the lowest edge."""
        place = self.places(score).sub_(self.low).mul_(NUM_BINS / (self.high - self.low)).add_(1)
        place = place.nan_to_num_(0).clamp_(0, NUM_BINS).to(torch.int32)
        if self.edge is None:
            return place
        num_below, threshold = self.edge  # compared, since places are rounded
        return torch.where(score >= threshold, place.clamp(min=num_below + 1), place.clamp(max=num_below))


def _logarithmic(ends: _Range, thresholds: Iterable[float]) -> _Axis:
    """Return an axis down to the thresholds."""
    lowest = min(ends.lowest, ends.highest, *(threshold for threshold in thresholds if threshold > 0))
    low, high = math.log10(lowest) - _MARGIN, math.log10(ends.highest) + _MARGIN
    return _Axis(low, high, None, (lowest / 2, ends.highest))  # log10 of 0 would be slow, and is below `low` as well


def _of_both_signs(ends: _Range) -> _Axis:
    """Return an axis that is linear up to about the median score, with all scores on it."""
    largest = max(ends.highest, -ends.least)
    width = min(max(ends.typical, largest * 10.0**-_MOST_DECADES), largest)
    low, high = math.asinh(ends.least / width) - _MARGIN, math.asinh(ends.highest / width) + _MARGIN
    return _Axis(low, high, width, (ends.least, ends.highest))


def _range(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], ranks: Ranks) -> _Range:
    """Return the range of the scores that are alive, over all ranks."""
    highest, least, sampled = 0.0, 0.0, [torch.zeros(0)]
    stride = max(1, sum(score.numel() for score in scores.values()) // _SAMPLE)
    for score, mask in _chunks(scores, alive):
        low, high = score.mul(mask.view(torch.int8)).nan_to_num_(0).aminmax()  # inf * 0 is NaN
        highest, least = max(highest, high.item()), min(least, low.item())
        sampled.append(score[::stride][mask[::stride]].cpu())
    sample = torch.cat(sampled)
    above = sample[sample > 0]
    lowest = above.kthvalue(1 + int(_OUTLIERS * len(above))).values.item() if len(above) else math.inf
    sizes = sample[sample != 0].abs()
    typical = sizes.median().item() if len(sizes) else math.inf
    found = ranks.gather(torch.tensor([lowest, -highest, least, typical], dtype=torch.float64)).amin(0).tolist()
    return _Range(found[0], -found[1], found[2], found[3])


def _chunks(scores: Mapping[str, Tensor], *masks: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Return flat chunks of all scores, each with the same chunk of the masks; small tensors are joined before."""
    values = [in_full(score) for score in scores.values()]
    named = [values, *([mask[name] for name in scores] for mask in masks)]
    for group in grouped_tensors.groups(values):
        flat = [grouped_tensors.joined(tensors[group]) for tensors in named]
        if len(flat[0]):
            yield from map(list, zip(*map(grouped_tensors.chunks, flat), strict=True))
