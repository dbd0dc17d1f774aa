"""Write zeros where masks prune: filled in, never multiplied in, which would keep NaN and make -0.0."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_drive.core import grouped_tensors, shards, tensor_kinds
from lightning_drive.core.bits import INTEGERS


@torch.no_grad()
def zero_(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set what masks prune to exactly 0, once; what is masked after every step has a faster way in `MaskedParameters`.

    Args:
        tensors: Name to a parameter, which may be split over ranks, or any other tensor; those without a mask stay.
        masks: Name to a boolean tensor of the same shape, on any device; ``True`` keeps.

    Raises:
        TypeError: If zeros cannot be written into a tensor, and it is not 0 already where its mask prunes (named).

    """
    names = [name for name in masks if name in tensors]
    local = [shards.local(tensors[name]) for name in names]
    own = [shards.part(masks[name], of=tensors[name]).to(local[i].device) for i, name in enumerate(names)]
    for group in grouped_tensors.groups(local):
        together = local[group]
        if len(together) == 1 or _share_memory(together):
            for tensor, mask, name in zip(together, own[group], names[group], strict=True):
                _zero_one_(tensor, mask, name)
        else:
            flat = grouped_tensors.joined(together)
            _zero_one_(flat, grouped_tensors.joined(own[group]), names[group.start])
            torch._foreach_copy_(together, [*grouped_tensors.parted(flat, together)])


def where_pruned(mask: Tensor, parameter: Tensor) -> Tensor:
    """Return which entries of a parameter, or of this rank's part of it, a mask prunes."""
    return ~shards.part(mask, of=parameter).to(parameter.device)


def _share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether two tensors may hold the same numbers: copies of them would undo each other."""
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) < len(tensors)


def _zero_one_(tensor: Tensor, mask: Tensor, name: str) -> None:
    if not tensor_kinds.is_plain(tensor):
        tensor_kinds.zero_(tensor, ~mask, name)
        return
    if tensor.device.type != "cpu" or not tensor.is_floating_point() or not tensor.ndim:
        tensor.masked_fill_(~mask, 0)
        return
    rows = max(1, grouped_tensors.CHUNK * len(tensor) // max(1, tensor.numel()))  # so that masks are widened in caches
    bits = tensor.view(INTEGERS[tensor.itemsize])
    for values, kept in zip(torch.split(bits, rows), torch.split(mask, rows), strict=True):
        values.bitwise_and_(kept.view(torch.int8).neg())  # -1 has all bits set
