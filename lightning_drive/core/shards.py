"""Parameters that are split over ranks (FSDP2's ``fully_shard``): this rank's part of each, and whole ones again."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core.messages import listed
from lightning_drive.core.processes import ALONE, Ranks


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter, gradient or optimizer state is split over ranks: a ``DTensor``."""
    dtensor = sys.modules.get("torch.distributed.tensor")  # slow to import, and imported already where there is one
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory; the whole tensor if it is not split."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def version(tensor: Tensor) -> int:
    """Return a number that is another one once the tensor, or this rank's part of it, has been written to."""
    if not is_sharded(tensor):
        return tensor._version
    with torch.no_grad():
        return tensor.to_local()._version  # type: ignore[attr-defined,no-any-return]


def part(whole: Tensor, of: Tensor) -> Tensor:
    """Return the view of a whole tensor, such as a mask, that belongs to :func:`local` of another of its shape."""
    ranks = _holders(of)
    if ranks.size == 1:
        return whole
    rows = -(-len(whole) // ranks.size)  # as `torch.chunk` does it
    return whole[ranks.index * rows : (ranks.index + 1) * rows]


def joined(own: Tensor, of: Tensor) -> Tensor:
    """Return, on every rank, the whole tensor of all ranks' parts, such as of a mask, in the full shape of another.

    Each rank's own part is in the shape of :func:`local` of the other tensor.
    """
    ranks = _holders(of)
    if ranks.size == 1:
        return own
    rows = -(-len(of) // ranks.size)
    padded = own.new_zeros(rows, *own.shape[1:])
    padded[: len(own)] = own
    return ranks.gather(padded).flatten(0, 1)[: len(of)]


def holders(parameters: Mapping[str, Tensor]) -> Ranks:
    """Return the ranks that all parameters are split over; ``ALONE`` if none is split.

    Raise a ``ValueError`` if only some are split, or in another way than along their first dimension.
    """
    whole = [name for name, parameter in parameters.items() if not is_sharded(parameter)]
    if len(whole) == len(parameters):
        return ALONE
    if whole:
        raise ValueError(
            f"Either all prunable parameters must be sharded or none, but {listed(whole)} are not: nothing averages"
            " their gradients over the ranks. Apply `fully_shard` to the module that holds them, too, or leave them out"
            " with `exclude`."
        )
    holding = {name: _holders(parameter, name) for name, parameter in parameters.items()}
    first = next(iter(holding.values()))
    others = [name for name, ranks in holding.items() if ranks.group is not first.group]
    if others:
        raise ValueError(f"All prunable parameters must be sharded over the same ranks, but {listed(others)} are not.")
    return first


def reshard_(module: nn.Module) -> None:
    """Split parameters again that a forward pass has joined; FSDP2 leaves some whole until the backward pass."""
    for submodule in module.modules():
        reshard = getattr(submodule, "reshard", None)
        if callable(reshard) and hasattr(submodule, "unshard"):  # an FSDPModule
            reshard()


def _holders(tensor: Tensor, name: str = "a parameter") -> Ranks:
    """Return the ranks that a tensor is split over."""
    if not is_sharded(tensor):
        return ALONE
    spread: Any = tensor
    mesh, placements = spread.device_mesh, tuple(spread.placements)
    split = [index for index, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return ALONE
    if len(split) > 1 or type(placements[split[0]]).__name__ != "Shard" or placements[split[0]].dim != 0:
        raise ValueError(
            f"{name!r} is placed as {placements}: only parameters that are split along their first"
            " dimension, over one dimension of the device mesh, can be pruned. Use `fully_shard` without tensor"
            " parallelism."
        )
    return Ranks.of(mesh.get_group(split[0]), torch.device(mesh.device_type))
