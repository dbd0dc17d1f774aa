"""The history of pruning rounds, small enough to keep: what each removed from where, and the last scores in bins."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_drive.core import grouped_tensors
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.core.scores import in_full

NUM_BINS = 60
"""Bins of a :class:`ScoreHistogram`."""

_OUTLIERS = 1e-3
"""Fraction of the scores, the lowest, that do not stretch a histogram."""

_SAMPLE = 1 << 15
"""About the most scores that are looked at to find the lowest edge."""

_MARGIN = 1e-3
"""Decades between the edges and what lies just within them: more than a logarithm is rounded by."""


@dataclass(frozen=True)
class Round:
    """One pruning round.

    Args:
        index: Its number, from 1; in iterative magnitude pruning every cycle has one.
        threshold: The lowest score that was kept; ``None`` where every parameter was ranked by itself.
        removed: How many weights it removed from each prunable parameter, in their order.

    """

    index: int
    threshold: float | None
    removed: tuple[int, ...]


@dataclass(frozen=True)
class ScoreHistogram:
    """The distribution of the scores of one round, in bins of equal width on a logarithmic axis.

    Only weights that earlier rounds had left have a score here.

    Args:
        low: log10 of the lowest edge.
        high: log10 of the highest edge; no score is higher.
        kept: How many scores in each bin were kept.
        pruned: How many scores in each bin were pruned.
        kept_below: How many scores lower than the lowest edge, zeros included, were kept.
        pruned_below: How many of them were pruned.

    """

    low: float
    high: float
    kept: tuple[int, ...]
    pruned: tuple[int, ...]
    kept_below: int
    pruned_below: int


def removed_by_round(
    first: int, thresholds: Sequence[float | None], counts: Sequence[Iterable[int]]
) -> tuple[Round, ...]:
    """Return the rounds from number ``first`` on, from the lowest score that each kept and from counts of weights.

    The counts are those of every parameter before each round, and after the last one: one more than there are rounds.

    Example:
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
    thresholds: Iterable[float],
    ranks: Ranks = ALONE,
) -> ScoreHistogram | None:
    """Count the scores that one round kept, and those that it pruned, in bins; ``None`` if no score is above zero.

    All counts are exact, and over all ranks. It takes two passes over the scores, and memory for some chunks of them.

    Args:
        scores: Parameter name to scores; those that are alive are finite and not negative.
        alive: Parameter name to the mask before the round.
        kept: Parameter name to the mask after it.
        thresholds: The lowest score that each ranking of the round kept: the axis goes down to them.
        ranks: Processes that each hold a part of every tensor.

    """
    lowest, highest = _range(scores, alive, ranks)
    if not highest > 0:
        return None
    lowest = min(lowest, highest, *(threshold for threshold in thresholds if threshold > 0))
    low, high = math.log10(lowest) - _MARGIN, math.log10(highest) + _MARGIN
    counts = torch.zeros(3, NUM_BINS + 1, dtype=torch.int64)
    for score, before, after in _chunks(scores, alive, kept):
        place = score.clamp(lowest / 2, highest).log10_()  # of 0 it would be slow, and below the lowest edge as well
        place = place.sub_(low).mul_(NUM_BINS / (high - low)).add_(1).nan_to_num_(0).clamp_(0).to(torch.int32)
        place.add_(before.view(torch.int8) + after.view(torch.int8), alpha=NUM_BINS + 1)  # pruned before: 0, now: 1
        counts += torch.bincount(place, minlength=counts.numel()).view_as(counts).cpu()
    _, (pruned_below, *pruned), (kept_below, *kept_in_bins) = ranks.sum(counts).tolist()
    return ScoreHistogram(low, high, tuple(kept_in_bins), tuple(pruned), kept_below, pruned_below)


def _range(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], ranks: Ranks) -> tuple[float, float]:
    """Return the highest of the scores that are alive, and below it the lowest one above zero but for outliers.

    The latter is estimated from a sample, if there are many scores. Both are the same on all ranks.
    """
    highest, sampled = 0.0, [torch.zeros(0)]
    stride = max(1, sum(score.numel() for score in scores.values()) // _SAMPLE)
    for score, mask in _chunks(scores, alive):
        highest = max(highest, score.mul(mask.view(torch.int8)).nan_to_num_(0).amax().item())  # inf * 0 is NaN
        sampled.append(score[::stride][mask[::stride]].cpu())
    sample = torch.cat(sampled)
    sample = sample[sample > 0]
    lowest = sample.kthvalue(1 + int(_OUTLIERS * len(sample))).values.item() if len(sample) else math.inf
    ends = ranks.gather(torch.tensor([lowest, highest], dtype=torch.float64))
    return ends[:, 0].min().item(), ends[:, 1].max().item()


def _chunks(scores: Mapping[str, Tensor], *masks: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Return flat chunks of all scores, each with the same chunk of the masks; small tensors are joined before."""
    values = [in_full(score) for score in scores.values()]
    named = [values, *([mask[name] for name in scores] for mask in masks)]
    for group in grouped_tensors.groups(values):
        flat = [grouped_tensors.joined(tensors[group]) for tensors in named]
        if len(flat[0]):
            yield from map(list, zip(*map(grouped_tensors.chunks, flat), strict=True))
