"""What pruning rounds did, small enough to keep: what each one removed from where, and how the last scores lay."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_drive.core import selection
from lightning_drive.core.selection import Ranking

NUM_BINS = 60
"""Bins of a :class:`ScoreHistogram`."""

_OUTLIERS = 1e-3
"""Fraction of the scores, the lowest, that do not stretch a histogram."""


@dataclass(frozen=True)
class Round:
    """One pruning round.

    Args:
        index: Which one, from 1; in iterative magnitude pruning every cycle has one.
        threshold: The lowest score that was kept; ``None`` where every parameter was ranked by itself.
        removed: How many weights it removed from each prunable parameter, in their order.

    """

    index: int
    threshold: float | None
    removed: tuple[int, ...]


@dataclass(frozen=True)
class ScoreHistogram:
    """How the scores of one round lay, in bins of equal width on a logarithmic axis.

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
    """Say what each of some rounds, one after the other, removed.

    Args:
        first: The index of the first one.
        thresholds: The lowest score that each round kept.
        counts: How many weights every parameter had before each round, and after the last one: one more than rounds.

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


def score_histogram(rankings: Iterable[Ranking]) -> ScoreHistogram | None:
    """Draw together the histograms that ranking made anyway, without a look at the scores.

    Args:
        rankings: The rankings of one round.

    Returns:
        The histogram, exact in its sums, and at its inner edges to about a hundredth of a decade (a fortieth with
        float64); ``None`` if no score is above zero.

    """
    parts = [part for part in map(_Part.of, rankings) if part.high > part.low]
    if not parts:
        return None
    low, high = min(part.low for part in parts), max(part.high for part in parts)
    edges = torch.linspace(low, high, NUM_BINS + 1, dtype=torch.float64)
    kept = torch.stack([part.below(edges, part.kept) for part in parts]).sum(0).round().long()
    pruned = torch.stack([part.below(edges, part.every - part.kept) for part in parts]).sum(0).round().long()
    return ScoreHistogram(
        low, high, tuple(kept.diff().tolist()), tuple(pruned.diff().tolist()), int(kept[0]), int(pruned[0])
    )


class _Part(NamedTuple):
    """The scores of one ranking, counted up to every edge of its bins."""

    edges: Tensor
    """log10, from the lowest edge above zero on."""
    kept: Tensor
    """How many scores below each edge were kept."""
    every: Tensor
    """How many scores there are below each edge."""
    low: float
    high: float

    @classmethod
    def of(cls, ranked: Ranking) -> "_Part":
        assert ranked.histogram is not None
        values = selection.bin_edges(ranked.dtype)[1:]
        edges = values.double().clamp(max=torch.finfo(ranked.dtype).max).log10()
        every = ranked.histogram.cumsum(0).double()
        pruned = every.clamp(max=every[-1].item() - ranked.num_kept)  # those with the lowest scores
        positive = every - every[0]
        lows = int((positive <= _OUTLIERS * positive[-1]).count_nonzero())
        lows = min(lows, int((values <= ranked.threshold).count_nonzero()) or lows)
        highs = ranked.histogram[1:].nonzero()
        low, high = (lows - 1, int(highs[-1]) + 1) if len(highs) else (0, 0)
        return cls(edges, every - pruned, every, edges[low].item(), edges[high].item())

    def below(self, edges: Tensor, counts: Tensor) -> Tensor:
        """Count what is below other edges, as if it lay evenly within bins."""
        left = (torch.searchsorted(self.edges, edges, right=True) - 1).clamp(0, len(self.edges) - 2)
        share = (edges - self.edges[left]) / (self.edges[left + 1] - self.edges[left])
        return torch.lerp(counts[left], counts[left + 1], share.clamp(0, 1))
