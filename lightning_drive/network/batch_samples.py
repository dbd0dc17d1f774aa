"""The samples of a batch: how many there are, and a batch of the first one alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_drive.core import containers


def parts_of(batch: Any) -> list[Any]:
    """Return the entries of a batch, such as images and labels."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, list | tuple) else [batch]


def batch_size(parts: list[Any]) -> int | None:
    """Return the number of samples that all parts of a batch have; ``None`` if they differ or cannot be told."""
    sizes = {size for part in parts for size in _sizes(part)}
    return next(iter(sizes))[0] if len(sizes) == 1 and () not in sizes else None


def first_sample(part: Any) -> Any:
    """Return a part of a batch with its first sample alone."""
    return part[:1] if _is_list_of_samples(part) else containers.mapped(lambda tensor: tensor[:1], part)


def _sizes(part: Any) -> set[tuple[int, ...]]:
    """Return the length of a list of samples, or the first dimensions of all tensors."""
    if _is_list_of_samples(part):
        return {(len(part),)}
    return {tuple(tensor.shape[:1]) if tensor.layout == torch.strided else () for tensor in containers.leaves(part)}


def _is_list_of_samples(part: Any) -> bool:
    """Return whether entries are samples, as images of several sizes and their boxes are, and not what all share."""
    if not isinstance(part, list | tuple) or not part:
        return False
    if all(isinstance(entry, Tensor) and entry.ndim == 3 and len(entry) in (1, 3) for entry in part):  # images
        return True
    kinds = {entry.ndim if isinstance(entry, Tensor) else isinstance(entry, Mapping) or None for entry in part}
    return len(kinds) == 1 and len({tensor.shape[:1] for tensor in containers.leaves(part)}) > 1
