"""Measure keep masks: how many weights are left, as a fraction, and where nothing is left."""

from collections.abc import Mapping

from torch import Tensor


def num_kept(masks: Mapping[str, Tensor]) -> int:
    """Count the weights that the masks keep.

    Args:
        masks: Parameter name to boolean mask; ``True`` keeps.

    """
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def num_prunable(masks: Mapping[str, Tensor]) -> int:
    """Count the weights that the masks cover, kept or not.

    Args:
        masks: Parameter name to boolean mask.

    """
    return sum(mask.numel() for mask in masks.values())


def density(masks: Mapping[str, Tensor]) -> float:
    """The fraction of prunable weights that is kept, in ``[0, 1]``; 1 where there are no masks.

    Args:
        masks: Parameter name to boolean mask; ``True`` keeps.

    Example:
        >>> import torch
        >>> density({"weight": torch.tensor([True, False, False, False])})
        0.25

    """
    total = num_prunable(masks)
    return num_kept(masks) / total if total else 1.0


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """The fraction of prunable weights that is removed, in ``[0, 1]``; 0 where there are no masks.

    Args:
        masks: Parameter name to boolean mask; ``True`` keeps.

    Example:
        >>> import torch
        >>> sparsity({"weight": torch.tensor([True, False, False, False])})
        0.75

    """
    total = num_prunable(masks)
    return (total - num_kept(masks)) / total if total else 0.0


def collapsed_layers(masks: Mapping[str, Tensor]) -> list[str]:
    """Name the tensors with no survivor: layer collapse (Tanaka et al., 2020, Section 2).

    No empty layer does not mean that a path still leads through;
    :func:`lightning_drive.network.paths.active_masks` tells.

    Args:
        masks: Parameter name to boolean mask; ``True`` keeps.

    Example:
        >>> import torch
        >>> collapsed_layers({"a": torch.tensor([True]), "b": torch.tensor([False])})
        ['b']

    """
    return [name for name, mask in masks.items() if not mask.any()]
