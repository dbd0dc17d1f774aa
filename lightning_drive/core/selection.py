"""Scores in, keep masks out: the exact number of highest scores, with ties settled by position.

The threshold is found in one of two ways: :mod:`~lightning_drive.core.sample_select` where one process has all scores
on the CPU, :mod:`~lightning_drive.core.radix_select` everywhere else. Which of the scores that equal it are kept is
decided in :mod:`~lightning_drive.core.ties`.
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_drive.core import radix_select, sample_select, ties
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.core.ranked_parts import Cut, Part, divided


class Ranking(NamedTuple):
    """Masks, and where the line between kept and pruned was drawn."""

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


@torch.no_grad()
def keep_highest(
    scores: Mapping[str, Tensor],
    num_kept: int,
    alive: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
    *,
    num_alive: Mapping[str, int] | None = None,
) -> Ranking:
    """Rank the entries of all tensors together and keep exactly the ``num_kept`` highest.

    Ties go to the earlier tensor in ``scores``, then to the lower flat index, so equal scores give equal masks on
    every device and every rank.

    Args:
        scores: Parameter name to finite scores of any sign and shape; higher is more worth keeping, and 0 and -0 are
            equal. If any are float64, all are compared in float64, otherwise in float32, exactly for all other types
            of floating-point numbers.
        num_kept: How many entries to keep, in ``1..number of (alive) entries``.
        alive: Parameter name to a boolean mask; entries that are ``False`` are pruned already and cannot return.
        ranks: Processes that each hold a part of every tensor, split along the first dimension in the order of ranks.
            Scores are then ranked over all of them, and only histograms are exchanged.
        num_alive: Parameter name to how many entries its mask keeps here, if that is known.

    Returns:
        The masks and where the line was drawn.

    Raises:
        ValueError: If ``num_kept`` is out of range, or a score is infinite or NaN (names the tensor).

    Examples:
        >>> ranking = keep_highest({"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.7, 0.8])}, num_kept=2)
        >>> ranking.masks
        {'a': tensor([False,  True]), 'b': tensor([False,  True])}

        A threshold alone could not split these ties:

        >>> keep_highest({"a": torch.ones(2), "b": torch.ones(2)}, num_kept=3).masks
        {'a': tensor([True, True]), 'b': tensor([ True, False])}

    """
    dtype = torch.float64 if any(score.dtype == torch.float64 for score in scores.values()) else torch.float32
    parts = divided({name: _comparable(score, dtype) for name, score in scores.items()}, alive or {}, num_alive)
    total = int(ranks.sum(torch.tensor(sum(part.num_alive for part in parts))))
    if not 1 <= num_kept <= total:
        raise ValueError(f"`num_kept` must be in 1..{total}, the number of scores to choose from, got {num_kept}.")
    cut = None
    if ranks.size == 1 and all(part.flat.device.type == "cpu" for part in parts):
        cut = sample_select.cut([(part.flat, part.alive) for part in parts], total, num_kept)
    cut = cut or radix_select.cut(parts, dtype, num_kept, ranks)
    if cut is None:
        raise ValueError(_unrankable(parts))
    return Ranking(_masks(parts, cut, num_kept, ranks), *cut, num_kept)


def _comparable(score: Tensor, dtype: torch.dtype) -> Tensor:
    return score if score.dtype == dtype and score.is_contiguous() else score.to(dtype).contiguous()


def _masks(parts: Sequence[Part], cut: Cut, num_kept: int, ranks: Ranks) -> dict[str, Tensor]:
    """Keep every score above the threshold, and as many of those on it as complete the number."""
    if cut.num_above + cut.num_tied == num_kept:
        flat = [part.masked(part.flat >= cut.threshold) for part in parts]
    else:
        flat = [part.masked(part.flat > cut.threshold) for part in parts]
        ties.add_first_(flat, parts, cut.threshold, num_kept - cut.num_above, ranks)
    return {
        name: mask
        for part, masks in zip(parts, flat, strict=True)
        for name, mask in zip(part.scores, part.views(masks), strict=True)
    }


def _unrankable(parts: Sequence[Part]) -> str:
    """Return a text that names scores that cannot be ranked, and why."""
    for part in parts:
        masks = repeat(None) if part.alive is None else part.views(part.alive)
        for (name, score), mask in zip(part.scores.items(), masks):  # noqa: B905 - one of them may be endless
            live = score if mask is None else score[mask]
            bad = int((~live.isfinite()).count_nonzero())
            if bad:
                return f"The scores of {name!r} contain nan or inf ({bad} of {live.numel()}), so they cannot be ranked."
    return "The scores that another rank holds contain nan or inf, so they cannot be ranked."
