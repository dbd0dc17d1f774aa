"""Find copies of the network that training keeps beside it: averages, target networks, momentum encoders."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_drive.core import shards
from lightning_drive.core.masks import Masks
from lightning_drive.trainer import facts

_Branches = dict[str, dict[str, Tensor]]
"""Path of a submodule, the name of a parameter there, and the parameter."""

_HOLDERS = facts.HOLDERS | {"_buffers", "_modules", "_parameters"}
"""Attributes that hold live parameters, or averages that are pruned along."""

_PASSED_OVER = (type, FunctionType, MethodType, ModuleType, Tensor, pl.Trainer, pl.Callback)
"""What no copies are looked for in."""

_MOST = 1000
"""Longer lists and dictionaries are data."""


class Copy(NamedTuple):
    """A copy of the network, or of a part of it."""

    name: str
    """What it is called, in quotes."""
    of: str
    """What it is a copy of, in quotes."""
    mapping: str
    """How to return it from ``averages``; empty where that cannot be written down."""
    pairs: dict[str, Tensor]
    """Name of a prunable parameter, as in the module, to the copy of it."""


def inside(pl_module: pl.LightningModule, names: Iterable[str], trained: Collection[Tensor]) -> list[Copy]:
    """Find copies of what is pruned among the submodules.

    A copy has all weights of a submodule, under the same names and in the same shapes, and nothing trains it. The
    submodules that have copies must hold half of what is pruned: less may well be one of many equal layers.

    Args:
        pl_module: The module.
        names: The parameters that are pruned.
        trained: The parameters that are trained.

    """
    pruned = _pruned(pl_module, names)
    found = list(_inside(pl_module, pruned, trained))
    covered = {name: pruned[name] for copy in found for name in copy.pairs}
    return found if 2 * _size(covered) >= _size(pruned) else []


def outside(
    pl_module: pl.LightningModule, callbacks: Iterable[pl.Callback], names: Iterable[str]
) -> Iterator[tuple[Copy, tuple[float, ...], bool]]:
    """Find copies in attributes of the module and of callbacks: modules, dictionaries of tensors, and lists of them.

    Args:
        pl_module: The module.
        callbacks: Callbacks that may hold copies.
        names: The parameters that are pruned.

    Yields:
        A copy, what its numbers add up to, by which it can be seen to change, and whether that is what those of the
        module add up to: then it may be a record of the weights, and no average.

    """
    pruned = _pruned(pl_module, names)
    branches = {path: each for path, each in _branches(pruned).items() if 2 * _size(each) >= _size(pruned)}
    for copy in _outside(pl_module, (pl_module, *callbacks), branches):
        sums = _sums(copy.pairs.values())
        yield copy, sums, sums == _sums(pruned[name] for name in copy.pairs)


def _pruned(pl_module: pl.LightningModule, names: Iterable[str]) -> dict[str, Tensor]:
    parameters = dict(pl_module.named_parameters())
    pruned: dict[str, Tensor] = {name: parameters[name] for name in names if name in parameters}
    return {} if any(map(shards.is_sharded, pruned.values())) else pruned


def _sums(tensors: Iterable[Tensor]) -> tuple[float, ...]:
    return tuple(each.detach().sum(dtype=torch.float64).item() for each in tensors)


def warning(copy: Copy, callback: str) -> str:
    """Say that a copy stays dense, and what to do.

    Args:
        copy: The copy.
        callback: The class of the pruning callback.

    """
    how = f" by `return [{copy.mapping}]`" if copy.mapping else ""
    return (
        f"{copy.name} has the same names and shapes as {copy.of}, but is not trained, and is not pruned with it. If it"
        " is an average (of a mean teacher or a momentum encoder, say), it stays dense: an average of dense and sparse"
        " weights is dense. A copy that is written anew as a whole, as a target network is, becomes sparse then. To"
        f" prune it along, override `averages(pl_module)` of {callback} and return it{how}."
    )


def is_sparse(copy: Copy, masks: Masks) -> bool:
    """Whether a copy has 0 wherever the masks prune.

    Args:
        copy: The copy.
        masks: The masks.

    """
    return bool(masks) and all(
        name in masks and not value.detach()[~masks[name].to(value.device)].any() for name, value in copy.pairs.items()
    )


def _inside(pl_module: pl.LightningModule, pruned: Mapping[str, Tensor], trained: Collection[Tensor]) -> Iterator[Copy]:
    """Find submodules that are copies of others."""
    matrices = {name: each for name, each in pl_module.named_parameters() if each.ndim > 1 and pruned}
    branches = _branches(matrices)
    originals: dict[Any, list[str]] = {}
    for path, branch in branches.items():
        if any(_joined(path, name) in pruned for name in branch):
            originals.setdefault(_structure(branch), []).append(path)
    found: list[str] = []
    for path, branch in sorted(branches.items(), key=lambda item: item[0].count(".")):  # stable, outermost first
        inner = any(f"{path}.".startswith(f"{outer}.") for outer in found)
        if not path or inner or any(each in trained for each in branch.values()):
            continue
        whole = [""] if _is_all_but(path, branch, matrices) else []
        close = [of for of in originals.get(_structure(branch), whole) if _is_copy(path, branch, of, matrices, pruned)]
        if close:
            of = next((of for of in close if _is_equal(branch, of, matrices)), close[0])
            found.append(path)
            yield _copy_inside(path, branch, of, pruned, type(pl_module).__name__)


def _is_all_but(path: str, branch: Mapping[str, Tensor], matrices: Mapping[str, Tensor]) -> bool:
    """Whether a submodule is a copy of all that is around it."""
    if 2 * len(branch) != len(matrices):
        return False
    return _structure({name: each for name, each in matrices.items() if not name.startswith(f"{path}.")}) == _structure(
        branch
    )


def _copy_inside(path: str, branch: Mapping[str, Tensor], of: str, pruned: Mapping[str, Tensor], kind: str) -> Copy:
    pairs = {_joined(of, name): value for name, value in branch.items() if _joined(of, name) in pruned}
    prefix = f"{of}." if of else ""
    mapping = f'{{f"{prefix}{{name}}": tensor for name, tensor in pl_module.{path}.named_parameters()}}'
    return Copy(repr(path), repr(of) if of else kind, mapping, pairs)


def _is_copy(
    path: str, branch: Mapping[str, Tensor], of: str, matrices: Mapping[str, Tensor], pruned: Mapping[str, Tensor]
) -> bool:
    """Whether two submodules of one structure are a copy and its original, and not two equal layers of a network."""
    weights = [name for name in branch if _joined(of, name) in pruned]
    alike = len(weights) < 2 or _without_numbers(path) == _without_numbers(of)
    return not alike or _is_equal(branch, of, matrices)


def _is_equal(branch: Mapping[str, Tensor], of: str, matrices: Mapping[str, Tensor]) -> bool:
    others = {name: matrices[_joined(of, name)] for name in branch}
    return all(
        value.device == others[name].device and torch.equal(value.detach(), others[name].detach())
        for name, value in branch.items()
    )


def _outside(pl_module: pl.LightningModule, holders: Iterable[object], branches: _Branches) -> Iterator[Copy]:
    """Find copies in attributes: modules, dictionaries of tensors, and lists of them as ``torch_ema`` has them."""
    own = {id(each) for each in pl_module.parameters()}
    branches = {path: each for path, each in branches.items() if each}
    for holder in holders:
        for attribute, value in vars(holder).items():
            if attribute in _HOLDERS:
                continue
            for path, thing in _things(value, attribute, set()):
                of, pairs = _match(thing, branches, pl_module)
                if pairs and own.isdisjoint(map(id, pairs.values())):
                    name = f"`{path}` of {type(holder).__name__}"
                    yield Copy(name, repr(of) if of else type(pl_module).__name__, "", pairs)
                    break
    for path, layer in pl_module.named_modules():
        untrained = _untrained(layer)
        for thing in (untrained, *untrained):
            of, pairs = _match(thing, branches, pl_module)
            if pairs:
                name = f"What {repr(path) if path else type(pl_module).__name__} keeps in buffers or frozen parameters"
                yield Copy(name, repr(of) if of else type(pl_module).__name__, "", pairs)


def _untrained(layer: nn.Module) -> list[Tensor]:
    """Return buffers and frozen parameters of a layer's own, as averages have them whose names have no dots."""
    own = [*layer._parameters.values(), *layer._buffers.values()]
    return [each for each in own if each is not None and not each.requires_grad and each.ndim]


def _things(value: Any, path: str, seen: set[int], depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Give what may be a copy: a module, a vector, or a dictionary or list of tensors, also in other objects."""
    if id(value) in seen or not depth:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (list, tuple, dict)):
        if not isinstance(value, dict) and 0 < len(value) <= _MOST and all(map(_is_named, value)):
            value = dict(value)
        inner = list(value.values() if isinstance(value, dict) else value)
        if 0 < len(inner) <= _MOST and all(isinstance(each, Tensor) for each in inner):
            yield path, value if all(isinstance(name, str) for name in value) else inner
        elif len(inner) <= _MOST:
            for each in inner:
                yield from _things(each, path, seen, depth - 1)
    elif isinstance(value, nn.Module):
        yield path, value
    elif hasattr(value, "__dict__") and not isinstance(value, _PASSED_OVER) and "param_groups" not in vars(value):
        for name, each in vars(value).items():
            yield from _things(each, f"{path}.{name}", seen, depth - 1)


def _is_named(value: Any) -> bool:
    """Whether something is a name and a tensor, as of ``named_parameters()``."""
    return isinstance(value, tuple) and tuple(map(type, value))[:1] == (str,) and isinstance(value[-1], Tensor)


def _match(thing: Any, branches: _Branches, pl_module: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Find the submodule that something is a copy of, and the pairs of a :class:`Copy`; no pairs if it is none."""
    if isinstance(thing, Tensor):
        return _match_flat(thing, branches, pl_module)
    ordered = isinstance(thing, (list, tuple))
    named = {} if ordered else dict(thing.named_parameters()) if isinstance(thing, nn.Module) else thing
    inner = _branches({name: each for name, each in named.items() if isinstance(name, str)})
    for of, original in branches.items():
        for branch in _in_order(list(thing), pl_module.get_submodule(of)) if ordered else inner.values():
            if all(_is_like(branch.get(name), each) for name, each in original.items()):
                found = {name: branch[name] for name in original}
                if len(found) > 1 or _is_equal(found, "", original):
                    return of, {_joined(of, name): each for name, each in found.items()}
    return "", {}


def _match_flat(vector: Tensor, branches: _Branches, pl_module: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Find the submodule whose parameters, one behind the other, a vector is a copy of."""
    if vector.ndim == 1 and vector.is_floating_point():
        for of, original in branches.items():
            for parameters in _selections(pl_module.get_submodule(of)):
                sizes = [each.numel() for each in parameters.values()]
                if len(vector) == sum(sizes) and _points_alike(vector, parameters.values()):
                    parts = zip(parameters.items(), torch.split(vector.detach(), sizes), strict=True)
                    pairs = {name: part.view(each.shape) for (name, each), part in parts}
                    return of, {_joined(of, name): pairs[name] for name in original}
    return "", {}


def _points_alike(vector: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether a vector has the direction of parameters, as an average of them has: others may be as long by chance."""
    joined = torch.cat([each.detach().flatten().to(vector) for each in parameters])
    return torch.cosine_similarity(vector.detach().float(), joined.float(), 0).item() > 0.5


def _selections(module: nn.Module) -> list[dict[str, Tensor]]:
    """Return the parameters of a module: all of them, and those that require a gradient."""
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    return [parameters, {name: each for name, each in parameters.items() if each.requires_grad}]


def _in_order(values: list[Tensor], module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Name tensors after the parameters of a module, all of them or those that require a gradient."""
    for parameters in _selections(module):
        if [each.shape for each in values] == [each.shape for each in parameters.values()]:
            yield dict(zip(parameters, values, strict=True))


def _is_like(copy: Tensor | None, original: Tensor) -> bool:
    return copy is not None and copy.shape == original.shape and copy.is_floating_point()


def _branches(tensors: Mapping[str, Tensor]) -> _Branches:
    """Sort tensors by the submodules that they are in, the outermost of which is the module itself."""
    branches: _Branches = {"": dict(tensors)}
    for name, tensor in tensors.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            branches.setdefault(".".join(parts[:end]), {})[".".join(parts[end:])] = tensor
    return branches


def _structure(branch: Mapping[str, Tensor]) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset((name, tuple(each.shape)) for name, each in branch.items())


def _size(branch: Mapping[str, Tensor]) -> int:
    return sum(each.numel() for each in branch.values())


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _without_numbers(path: str) -> str:
    return re.sub(r"\d+", "", path)
