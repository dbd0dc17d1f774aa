"""The scores that are ranked together, in parts that are worth an operation each, and the line drawn through them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_drive.core import counting, grouped_tensors


class Cut(NamedTuple):
    """The k-th highest score, and how many lie on it and above it."""

    threshold: float
    num_above: int
    num_tied: int


class Part(NamedTuple):
    """Scores that are ranked as one tensor: small neighbours, of which this has a copy, or a large tensor by itself."""

    scores: Mapping[str, Tensor]
    flat: Tensor
    """All scores, in order."""
    alive: Tensor | None
    """Their masks likewise; ``None`` where nothing is pruned yet."""
    num_alive: int

    def masked(self, mask: Tensor) -> Tensor:
        """Clear the entries of a flat mask that are pruned already, in place."""
        return mask if self.alive is None else mask.logical_and_(self.alive)

    def views(self, flat: Tensor) -> Sequence[Tensor]:
        """Return views of a flat tensor in the shapes of the scores."""
        return grouped_tensors.parted(flat, [*self.scores.values()])


def divided(
    scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], num_alive: Mapping[str, int] | None
) -> list[Part]:
    """Divide contiguous scores of one type into parts, and count the survivors of each, if the counts are not known."""
    names = [*scores]
    groups = [names[group] for group in grouped_tensors.groups([*scores.values()])]
    masked = [group for group in groups if not alive.keys().isdisjoint(group)]
    masks = [
        grouped_tensors.joined(
            [alive[name] if name in alive else torch.ones_like(scores[name], dtype=torch.bool) for name in group]
        )
        for group in masked
    ]
    if num_alive is None:
        counts = counting.numbers(counting.count(mask).view(1) for mask in masks)
    else:
        counts = [sum(num_alive[name] for name in group) for group in masked]
    survivors = {group[0]: pair for group, pair in zip(masked, zip(masks, counts, strict=True), strict=True)}
    parts = []
    for group in groups:
        own = {name: scores[name] for name in group}
        flat = grouped_tensors.joined([*own.values()])
        mask, count = survivors.get(group[0], (None, len(flat)))
        parts.append(Part(own, flat, mask if count < len(flat) else None, count))
    return parts
