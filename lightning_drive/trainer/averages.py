"""Copies of the network that are pruned along with it: what a user's ``averages`` returns, as tensors by name."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_drive.core import zeroing
from lightning_drive.core.masks import Masks
from lightning_drive.core.messages import listed


def tensors(averages: object, module: nn.Module) -> list[dict[str, Tensor]]:
    """Return the tensors of copies, by the names that they have in the module.

    Args:
        averages: What ``averages`` of a callback returned: modules, or mappings from names to tensors.
        module: The module that they are copies of.

    Raises:
        TypeError: If they are no list of copies, or one is neither a module nor such a mapping.
        ValueError: If a name is not in the module, or a tensor has another shape than there (named).

    """
    if not isinstance(averages, Iterable) or isinstance(averages, (nn.Module, Mapping, str)):
        raise TypeError(f"`averages` must return a list, with every copy in it, got {type(averages).__name__}.")
    own = _named(module)
    return [_checked(average, own, type(module).__name__) for average in averages]


@torch.no_grad()
def mask_(averages: Iterable[Mapping[str, Tensor]], masks: Masks) -> None:
    """Set the pruned weights of copies to exactly 0.

    Args:
        averages: What :func:`tensors` returned.
        masks: The masks.

    """
    for average in averages:
        zeroing.zero_(average, masks)


@torch.no_grad()
def load_batch_norm_statistics(
    averages: Iterable[Mapping[str, Tensor]], statistics: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write new statistics of BatchNorm into copies that have these layers.

    Args:
        averages: What :func:`tensors` returned.
        statistics: Name of a BatchNorm layer to the names and values of its buffers.

    """
    values = {f"{path}.{name}".lstrip("."): value for path, each in statistics.items() for name, value in each.items()}
    for average in averages:
        for name in average.keys() & values.keys():
            average[name].copy_(values[name])


@torch.no_grad()
def restart_(averages: Iterable[Mapping[str, Tensor]], module: nn.Module) -> None:
    """Let copies begin again with the module as it is now.

    Args:
        averages: What :func:`tensors` returned.
        module: The module.

    """
    own = _named(module)
    for average in averages:
        for name, tensor in average.items():
            tensor.copy_(own[name])


def _checked(average: object, own: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    found = _named(average) if isinstance(average, nn.Module) else average
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise TypeError(
            "`averages` must return a list of modules, or of mappings from the names of parameters to tensors, got"
            f" {type(average).__name__} in it."
        )
    unknown = [name for name in found if name not in own]
    if unknown:
        raise ValueError(
            f"`averages` returned a copy with {listed(map(repr, unknown))}, but {kind} has no parameter or buffer of"
            " that name. Return a mapping from the names that they have there, such as"
            ' `{f"student.{name}": tensor for name, tensor in pl_module.teacher.named_parameters()}`.'
        )
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"`averages` returned {name!r} with shape {tuple(value.shape)}, but it has shape"
                f" {tuple(own[name].shape)} in {kind}: it must be a copy of it."
            )
    return dict(found)


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
