"""The tie rule: of scores that equal the threshold, those of earlier tensors are kept, then those of lower flat index.

Where processes hold parts of the tensors, split along the first dimension, lower ranks hold the lower indices.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from lightning_drive.core import counting
from lightning_drive.core.grouped_tensors import chunks
from lightning_drive.core.processes import Ranks
from lightning_drive.core.ranked_parts import Part


def add_first_(masks: Sequence[Tensor], parts: Sequence[Part], threshold: float, number: int, ranks: Ranks) -> None:
    """Add the first ``number`` scores on the threshold, over all parts and ranks, to their flat masks."""
    if ranks.size == 1 and all(mask.device.type == "cpu" for mask in masks):  # where counts are not waited for
        for mask, part in zip(masks, parts, strict=True):
            if number:
                number -= _add_first_(mask, part.masked(part.flat == threshold), number)
        return

    def tied(part: Part) -> Sequence[Tensor]:  # again and again: keeping them would take as much memory as the masks
        return part.views(part.masked(part.flat == threshold))

    num_tied = counting.numbers(count for part in parts for count in counting.counts(tied(part)))
    shares = iter(zip(num_tied, _shares(torch.tensor(num_tied), number, ranks), strict=True))
    for mask, part in zip(masks, parts, strict=True):
        own = [*islice(shares, len(part.scores))]
        if all(share == count for count, share in own):
            mask.copy_(part.masked(part.flat >= threshold))
        elif any(share for _, share in own):
            for (count, share), kept, ties in zip(own, part.views(mask), tied(part), strict=True):
                if share == count:
                    kept.logical_or_(ties)
                elif share:
                    _add_first_(kept.view(-1), ties.view(-1), share)


def _add_first_(mask: Tensor, ties: Tensor, number: int) -> int:
    """Add the first ``number`` ties to a flat mask, or all if there are no more, and return how many were added."""
    added = 0
    for kept, some in zip(chunks(mask), chunks(ties), strict=True):
        count = int(counting.count(some))
        if added + count > number:
            kept[some.nonzero().view(-1)[: number - added]] = True
            return number
        kept.logical_or_(some)
        added += count
    return added


def _shares(num_tied: Tensor, number: int, ranks: Ranks) -> list[int]:
    """Return how many of this rank's ties are kept in each tensor: by tensor first, then by rank, that is by index."""
    everywhere = ranks.gather(num_tied)
    in_order = everywhere.T.flatten()
    before = (in_order.cumsum(0) - in_order).view_as(everywhere.T)[:, ranks.index]
    return (number - before).clamp(min=0).minimum(num_tied).tolist()
