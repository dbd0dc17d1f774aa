"""Count what masks keep, exactly and with few operations."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_drive.core import grouped_tensors
from lightning_drive.core.processes import ALONE, Ranks

_BYTES_OF_A_WORD = 8
_WORDS_ADDED = 128
"""Words whose bytes, each 0 or 1, are added up without an overflow."""


def count(mask: Tensor) -> Tensor:
    """Return how many entries of a boolean mask are set, in a tensor on the mask's device.

    A mask has a byte for each entry. So eight bytes are added at once, as one number, as often as no byte overflows.
    """
    flat = mask.contiguous().view(-1)
    if flat.device.type != "cpu" or flat.storage_offset() % _BYTES_OF_A_WORD:
        return flat.count_nonzero()
    even = len(flat) - len(flat) % (_BYTES_OF_A_WORD * _WORDS_ADDED)
    sums = flat[:even].view(torch.int64).view(-1, _WORDS_ADDED).sum(1).view(torch.uint8)
    return sums.sum() + flat[even:].count_nonzero()


def counts(masks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Return how many entries of every mask are set, in order, in flat tensors on their devices."""
    for group in map(masks.__getitem__, grouped_tensors.groups(masks)):
        if len(group) == 1:
            yield count(group[0]).view(1)
        else:
            ends = torch.tensor([mask.numel() for mask in group], device=group[0].device).cumsum(0)
            upto = grouped_tensors.joined(group).cumsum(0, dtype=torch.int32)[ends - 1].long()
            yield upto.diff(prepend=upto.new_zeros(1))


def numbers(counted: Iterable[Tensor], ranks: Ranks = ALONE) -> list[int]:
    """Return counts, summed over ranks, as Python numbers: the program waits for the device only once."""
    tensors = [*counted]
    if not tensors:
        return []
    joined = torch.cat([tensor.to(tensors[0].device) for tensor in tensors])
    return ranks.sum(joined).tolist()


def count_each(masks: Iterable[Tensor], ranks: Ranks = ALONE) -> list[int]:
    """Return how many entries of every boolean mask are set, summed over ranks that each hold a part of every mask."""
    return numbers(counts([*masks]), ranks)
