"""Find submodules that are copies of other submodules: mean teachers, target networks, momentum encoders."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeAlias

import lightning.pytorch as pl
from torch import Tensor

from lightning_drive.trainer import network_copies
from lightning_drive.trainer.network_copies import Copy, branches_of, joined, size

_Structure: TypeAlias = frozenset[tuple[str, tuple[int, ...]]]
"""Names and shapes of the matrices in a submodule."""


def copies_in_submodules(
    pl_module: pl.LightningModule, names: Iterable[str], trained: Collection[Tensor]
) -> list[Copy]:
    """Find untrained submodules that have all weights of another one, under the same names and in the same shapes.

    There are none where those that have copies hold less than half of what is pruned, whose names are given: so little
    may well be one of many equal layers.
    """
    pruned = network_copies.prunable(pl_module, names)
    copies = list(_copies(pl_module, pruned, trained))
    covered = {name: pruned[name] for copy in copies for name in copy.tensors}
    return copies if 2 * size(covered) >= size(pruned) else []


def _copies(pl_module: pl.LightningModule, pruned: Mapping[str, Tensor], trained: Collection[Tensor]) -> Iterator[Copy]:
    """Find the copies of any size, the outermost submodules first, and no more within those."""
    matrices = {name: tensor for name, tensor in pl_module.named_parameters() if tensor.ndim > 1 and pruned}
    branches = branches_of(matrices)
    originals: dict[_Structure, list[str]] = {}
    for path, branch in branches.items():
        if any(joined(path, name) in pruned for name in branch):
            originals.setdefault(_structure(branch), []).append(path)
    copied: list[str] = []
    for path, branch in sorted(branches.items(), key=lambda item: item[0].count(".")):  # a stable sort
        is_within_another = any(f"{path}.".startswith(f"{outer}.") for outer in copied)
        if not path or is_within_another or any(tensor in trained for tensor in branch.values()):
            continue
        the_rest = [""] if _is_copy_of_the_rest(path, branch, matrices) else []
        candidates = {
            of: {name: matrices[joined(of, name)] for name in branch}
            for of in originals.get(_structure(branch), the_rest)
        }
        close = {of: tensors for of, tensors in candidates.items() if _is_copy(path, branch, of, tensors, pruned)}
        if close:
            equal = (of for of, tensors in close.items() if network_copies.are_equal(branch, tensors))
            copied.append(path)
            yield _copy(path, branch, next(equal, next(iter(close))), pruned, type(pl_module).__name__)


def _is_copy_of_the_rest(path: str, branch: Mapping[str, Tensor], matrices: Mapping[str, Tensor]) -> bool:
    """Whether a submodule has the structure of all that is around it."""
    if 2 * len(branch) != len(matrices):
        return False
    rest = {name: tensor for name, tensor in matrices.items() if not name.startswith(f"{path}.")}
    return _structure(rest) == _structure(branch)


def _is_copy(
    path: str, branch: Mapping[str, Tensor], of: str, original: Mapping[str, Tensor], pruned: Mapping[str, Tensor]
) -> bool:
    """Whether two submodules of one structure are a copy and its original, and not two equal layers of a network."""
    has_many_weights = sum(joined(of, name) in pruned for name in branch) > 1
    are_named_apart = re.sub(r"\d+", "", path) != re.sub(r"\d+", "", of)
    return (has_many_weights and are_named_apart) or network_copies.are_equal(branch, original)


def _copy(path: str, branch: Mapping[str, Tensor], of: str, pruned: Mapping[str, Tensor], kind: str) -> Copy:
    tensors = {joined(of, name): tensor for name, tensor in branch.items() if joined(of, name) in pruned}
    name = joined(of, "{name}")
    mapping = f'{{f"{name}": tensor for name, tensor in pl_module.{path}.named_parameters()}}'
    return Copy(repr(path), repr(of) if of else kind, mapping, tensors)


def _structure(branch: Mapping[str, Tensor]) -> _Structure:
    return frozenset((name, tuple(tensor.shape)) for name, tensor in branch.items())
