"""The type of a copy of the network, and what both ways of finding one share: tensors sorted by submodule."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_drive.core import shards
from lightning_drive.network.masks import Masks

Branches: TypeAlias = dict[str, dict[str, Tensor]]
"""Path of a submodule, the name of a parameter there, and the parameter."""


class Copy(NamedTuple):
    """A copy of the network, or of a part of it."""

    name: str
    """Where it is, in quotes."""
    of: str
    """What it is a copy of, in quotes."""
    mapping: str
    """How to return it from ``averages``; empty where that cannot be written down."""
    tensors: dict[str, Tensor]
    """Name of a prunable parameter, as in the module, to the copy of it."""

    def is_sparse(self, masks: Masks) -> bool:
        """Whether it is 0 wherever the masks prune."""
        return bool(masks) and all(
            name in masks and not tensor.detach()[~masks[name].to(tensor.device)].any()
            for name, tensor in self.tensors.items()
        )


def prunable(pl_module: pl.LightningModule, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the parameters that have these names; none where they are split over ranks and cannot be compared."""
    parameters = dict(pl_module.named_parameters())
    selected: dict[str, Tensor] = {name: parameters[name] for name in names if name in parameters}
    return {} if any(map(shards.is_sharded, selected.values())) else selected


def branches_of(tensors: Mapping[str, Tensor]) -> Branches:
    """Sort tensors by the submodules that they are in, from the module itself, with an empty path, inwards."""
    branches: Branches = {"": dict(tensors)}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            branches.setdefault(".".join(parts[:end]), {})[".".join(parts[end:])] = tensor
    return branches


def size(branch: Mapping[str, Tensor]) -> int:
    """Count the numbers in the tensors of a submodule."""
    return sum(tensor.numel() for tensor in branch.values())


def joined(path: str, name: str) -> str:
    """Return the full name of a parameter that has a name within a submodule."""
    return f"{path}.{name}" if path else name


def are_equal(copy: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> bool:
    """Whether all tensors of a copy have the numbers and the device of those of the same name in the original."""
    return all(
        tensor.device == original[name].device and torch.equal(tensor.detach(), original[name].detach())
        for name, tensor in copy.items()
    )
