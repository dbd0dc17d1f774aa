"""Handle many small tensors as one: a few operations for all in place of a few for each.

Starting an operation costs about as much as working through some thousands of numbers. So small neighbours are copied
into one flat tensor, and large tensors are left where they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHUNK = 1 << 19
"""Entries of a flat tensor that are worked on together: temporaries stay this small however large the tensor is."""

_SMALL = 1 << 14
"""The most entries of a tensor that is joined with others; copying more than these costs more than it saves."""

_TOGETHER = 1 << 19
"""The most entries that are joined, so that copies stay small however many tensors there are."""


def groups(tensors: Sequence[Tensor]) -> list[slice]:
    """Return which neighbours to treat as one: small ones of one device and type, everything else by itself.

    The slices cover all tensors, in order.

    Examples:
        >>> groups([torch.ones(2), torch.ones(3, 3), torch.ones(1000, 1000), torch.ones(4)])
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]

    """
    slices: list[slice] = []
    begin = size = 0
    before = None
    for index, tensor in enumerate(tensors):
        number = tensor.numel()
        kind = (tensor.device, tensor.dtype) if 0 < number <= _SMALL and _is_plain(tensor) else None
        size += number
        if index and (kind is None or kind != before or size > _TOGETHER):
            slices.append(slice(begin, index))
            begin, size = index, number
        before = kind
    return [*slices, slice(begin, len(tensors))] if tensors else []


def joined(group: Sequence[Tensor]) -> Tensor:
    """Return the entries of a group, one tensor after the other, as a flat tensor.

    It is a copy, unless the group is a single tensor that is contiguous.
    """
    return group[0].reshape(-1) if len(group) == 1 else torch._utils._flatten_dense_tensors(group)  # type: ignore[no-untyped-call]


def parted(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return views of a flat tensor of any type in the shapes of a group, which has as many entries."""
    return [flat.view(like[0].shape)] if len(like) == 1 else torch._utils._unflatten_dense_tensors(flat, like)  # type: ignore[no-untyped-call]


def chunks(flat: Tensor) -> Sequence[Tensor]:
    """Return views of consecutive entries of a flat tensor, of a size that is worked through the fastest."""
    return torch.split(flat, chunk_size(flat.device))


def chunk_size(device: torch.device) -> int:
    """Return how many entries to work on together: more where starting an operation is what takes the time."""
    return CHUNK if device.type == "cpu" else CHUNK << 5


def _is_plain(tensor: Tensor) -> bool:
    is_dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_dense and not (tensor.is_quantized or tensor.is_nested)
