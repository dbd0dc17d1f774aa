"""Of weights with equal scores, let those that are 0 already go before live ones; then position decides.

A weight of 0 and a live weight without a gradient both score 0. A network that is sparse already would lose the live
one, and keep a zero that then trains.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_drive.core import counting, selection
from lightning_drive.core.processes import Ranks
from lightning_drive.core.selection import Ranking


def decided(
    ranking: Ranking,
    scores: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    num_alive: Mapping[str, int],
    holders: Ranks,
) -> Ranking:
    """Return a ranking in which live weights come before zeros where scores equal the threshold.

    Nothing changes where all or none of these are kept, or no weight is 0. Where position decides between zeros only,
    or between live weights only, the counts are as before; where it decides nothing, just those that are kept count
    as tied.

    Args:
        ranking: The ranking by score and position.
        scores: Parameter name to scores; of those that were ranked, at least.
        weights: Parameter name to weights.
        alive: Parameter name to a boolean mask of the weights that are not pruned yet.
        num_alive: Parameter name to how many these are on all ranks.
        holders: The processes that hold parts of every tensor.

    """
    if ranking.num_above + ranking.num_tied == ranking.num_kept:
        return ranking
    names = [*ranking.masks]
    live = {name: (weights[name] != 0).logical_and_(alive[name]) for name in names}
    if sum(counting.count_each(live.values(), holders)) == sum(num_alive[name] for name in names):
        return ranking
    is_double = any(scores[name].dtype == torch.float64 for name in names)
    dtype = torch.float64 if is_double else torch.float32  # in which the selection compares
    levels = {name: _levels(scores[name].to(dtype), ranking.threshold, live[name]) for name in names}
    again = selection.keep_highest(levels, ranking.num_kept, alive, holders)
    if again.num_above + again.num_tied > again.num_kept:
        return ranking._replace(masks=again.masks)
    return ranking._replace(masks=again.masks, num_tied=ranking.num_kept - ranking.num_above)


def _levels(score: Tensor, threshold: float, live: Tensor) -> Tensor:
    """Return 3 for scores above the threshold, 2 for live weights on it, 1 for zeros on it, and 0 for all others."""
    levels = live.float().add_(1)
    return levels.masked_fill_(score > threshold, 3).masked_fill_(score < threshold, 0)
