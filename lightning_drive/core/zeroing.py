"""Write zeros where masks prune: filled in, never multiplied in, which would keep NaN and make -0.0."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_drive.core import flat_tensors, shards, tensor_kinds
from lightning_drive.core.bits import INTEGERS

_CHUNK = 1 << 19
"""Numbers masked together where masks are bytes, so that what they are widened to stays in the processor's cache."""


@torch.no_grad()
def zero_(tensor: Tensor, mask: Tensor, name: str = "a tensor") -> None:
    """Set what a mask prunes to exactly 0, once.

    Args:
        tensor: A parameter, which may be split over ranks, or any other tensor.
        mask: Boolean tensor of the same shape, on any device; ``True`` keeps.
        name: What to call the tensor in the message.

    Raises:
        TypeError: If zeros cannot be written into it, and it is not 0 already where the mask prunes.

    """
    mask, tensor = shards.part(mask, of=tensor).to(tensor.device), shards.local(tensor)
    if not tensor_kinds.is_plain(tensor):
        tensor_kinds.zero_(tensor, ~mask, name)
        return
    if tensor.device.type != "cpu" or not tensor.is_floating_point() or not tensor.ndim:
        tensor.masked_fill_(~mask, 0)
        return
    rows = max(1, _CHUNK * len(tensor) // max(1, tensor.numel()))
    bits = tensor.view(INTEGERS[tensor.itemsize])
    for values, kept in zip(torch.split(bits, rows), torch.split(mask, rows), strict=True):
        values.bitwise_and_(kept.view(torch.int8).neg())  # -1 has all bits set


@torch.no_grad()
def zero_each_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Do :func:`zero_` to many tensors, with few operations for those that are small.

    Args:
        tensors: Dense tensors, none of them split over ranks.
        masks: A mask for each, on its device.

    """
    for each in flat_tensors.groups(tensors):
        group = [*tensors[each]]
        if len(group) == 1:
            zero_(group[0], masks[each.start])
        else:
            flat = flat_tensors.joined(group)
            zero_(flat, flat_tensors.joined(masks[each]))
            torch._foreach_copy_(group, [*flat_tensors.parted(flat, group)])


def where_pruned(mask: Tensor, parameter: Tensor) -> Tensor:
    """Say which entries of a parameter, or of this rank's part of it, a mask prunes."""
    return ~shards.part(mask, of=parameter).to(parameter.device)
