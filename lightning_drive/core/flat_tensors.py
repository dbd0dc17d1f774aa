"""Many small tensors as one: what would take operations for each of them takes a few for all.

To start an operation costs about as much as to work through some thousands of numbers. So neighbours that are small
are copied into one flat tensor, and large ones are left where they are.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

_SMALL = 1 << 14
"""The most entries of a tensor that is joined with others; to copy more than these costs more than it saves."""

_TOGETHER = 1 << 19
"""The most entries that are joined, so that copies stay small however many tensors there are."""

_ADDED = 128
"""Marks, each 0 or 1, that are added up in a byte."""


def groups(tensors: Sequence[Tensor]) -> list[slice]:
    """Return which neighbours to treat as one: small ones of one device and type, everything else by itself.

    Args:
        tensors: Any tensors.

    Returns:
        Slices that cover all of them, in order.

    Example:
        >>> groups([torch.ones(2), torch.ones(3, 3), torch.ones(1000, 1000), torch.ones(4)])
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]

    """
    found: list[slice] = []
    begin = size = 0
    before = None
    for index, tensor in enumerate(tensors):
        number = tensor.numel()
        kind = (tensor.device, tensor.dtype) if 0 < number <= _SMALL and _is_plain(tensor) else None
        size += number
        if index and (kind is None or kind != before or size > _TOGETHER):
            found.append(slice(begin, index))
            begin, size = index, number
        before = kind
    return [*found, slice(begin, len(tensors))] if tensors else []


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of a group, one tensor after the other.

    Args:
        tensors: One of the :func:`groups`.

    Returns:
        A flat tensor: a copy, unless there is only one tensor and it is contiguous.

    """
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]


def parted(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return views of a flat tensor in the shapes of a group that has as many entries.

    Args:
        flat: A flat tensor, such as :func:`joined` returns, of any type.
        like: The group.

    """
    return [flat.view(like[0].shape)] if len(like) == 1 else torch._utils._unflatten_dense_tensors(flat, like)  # type: ignore[no-untyped-call]


def counts(masks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Count what every mask keeps.

    Args:
        masks: Boolean masks.

    Returns:
        Their counts, in order, in tensors on their devices.

    """
    for group in map(masks.__getitem__, groups(masks)):
        if len(group) == 1:
            yield count(group[0]).view(1)
        else:
            ends = torch.tensor([mask.numel() for mask in group], device=group[0].device).cumsum(0)
            upto = joined(group).cumsum(0, dtype=torch.int32)[ends - 1].long()
            yield upto.diff(prepend=upto.new_zeros(1))


def count(mask: Tensor) -> Tensor:
    """Count what a mask keeps.

    A mask has a byte for each entry. So eight bytes are added at once, as one number, as often as no byte overflows.

    Args:
        mask: A boolean mask.

    Returns:
        The count, in a tensor on the mask's device.

    """
    flat = mask.contiguous().view(-1)
    if flat.device.type != "cpu" or flat.storage_offset() % 8:
        return flat.count_nonzero()
    even = len(flat) - len(flat) % (8 * _ADDED)
    sums = flat[:even].view(torch.int64).view(-1, _ADDED).sum(1).view(torch.uint8)
    return sums.sum() + flat[even:].count_nonzero()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
