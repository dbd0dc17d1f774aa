"""Parameters that are split over ranks (FSDP2's ``fully_shard``): this rank's part of each, and the way back."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core.messages import listed
from lightning_drive.core.processes import ALONE, Ranks


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is split over ranks: a ``DTensor``.

    Args:
        tensor: A parameter, gradient or optimizer state.

    """
    dtensor = sys.modules.get("torch.distributed.tensor")  # heavy, and loaded by whoever made one
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Give this rank's part of a tensor, in the same memory; a tensor that is not split as a whole.

    Args:
        tensor: A parameter, gradient or optimizer state.

    """
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part(whole: Tensor, of: Tensor) -> Tensor:
    """Cut out of a whole tensor what belongs to this rank's part of another one of the same shape.

    Args:
        whole: A plain tensor, such as a mask.
        of: A tensor that may be split over ranks.

    Returns:
        A view, in the shape of :func:`local` of the other one.

    """
    ranks = _holders(of)
    if ranks.size == 1:
        return whole
    rows = -(-len(whole) // ranks.size)  # as `torch.chunk` does it
    return whole[ranks.index * rows : (ranks.index + 1) * rows]


def joined(own: Tensor, of: Tensor) -> Tensor:
    """Put the parts of all ranks together again; every rank gets the whole.

    Args:
        own: A plain tensor, such as a mask, in the shape of :func:`local` of the other one.
        of: A tensor that may be split over ranks.

    Returns:
        A plain tensor in the other one's full shape, on the device of ``own``.

    """
    ranks = _holders(of)
    if ranks.size == 1:
        return own
    rows = -(-len(of) // ranks.size)
    padded = own.new_zeros(rows, *own.shape[1:])
    padded[: len(own)] = own
    return ranks.gather(padded).flatten(0, 1)[: len(of)]


def holders(parameters: Mapping[str, Tensor]) -> Ranks:
    """Find the ranks that the parameters are split over.

    Args:
        parameters: Parameter name to live parameter.

    Returns:
        ``ALONE`` if none of them is split.

    Raises:
        ValueError: If only some are split, or they are split in another way than along their first dimension.

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
    found = {name: _holders(parameter, name) for name, parameter in parameters.items()}
    first = next(iter(found.values()))
    others = [name for name, ranks in found.items() if ranks.group is not first.group]
    if others:
        raise ValueError(f"All prunable parameters must be sharded over the same ranks, but {listed(others)} are not.")
    return first


def reshard_(module: nn.Module) -> None:
    """Make parameters that a forward pass has put together be parts again; FSDP2 leaves some whole until backward.

    Args:
        module: Any module.

    """
    for submodule in module.modules():
        reshard = getattr(submodule, "reshard", None)
        if callable(reshard) and hasattr(submodule, "unshard"):  # an FSDPModule
            reshard()


def _holders(tensor: Tensor, name: str = "a parameter") -> Ranks:
    """Find the ranks that a tensor is split over."""
    if not is_sharded(tensor):
        return ALONE
    spread: Any = tensor
    mesh, split = spread.device_mesh, [index for index, each in enumerate(spread.placements) if not each.is_replicate()]
    if not split:
        return ALONE
    if len(split) > 1 or type(spread.placements[split[0]]).__name__ != "Shard" or spread.placements[split[0]].dim != 0:
        raise ValueError(
            f"{name!r} is placed as {tuple(spread.placements)}: only parameters that are split along their first"
            " dimension, over one dimension of the device mesh, can be pruned. Use `fully_shard` without tensor"
            " parallelism."
        )
    return Ranks.of(mesh.get_group(split[0]), torch.device(mesh.device_type))
