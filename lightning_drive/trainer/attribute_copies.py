"""Find copies of the network in attributes of the module and of callbacks, in buffers and in frozen parameters."""

from collections.abc import Iterable, Iterator
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_drive.trainer import lightning_internals, network_copies
from lightning_drive.trainer.network_copies import Branches, Copy, branches_of, joined, size

_HOLDERS = lightning_internals.HOLDERS | {"_buffers", "_modules", "_parameters"}
"""Attributes that hold live parameters, or averages that are pruned along."""

_PASSED_OVER = (type, FunctionType, MethodType, ModuleType, Tensor, pl.Trainer, pl.Callback)
"""Objects whose attributes hold no copies."""

_MOST = 1000
"""Longer lists and dictionaries are data."""


class AttributeCopy(NamedTuple):
    """A copy in an attribute, and what tells an average from a record of the weights."""

    copy: Copy
    sums: tuple[float, ...]
    """What the numbers of each tensor add up to, by which a copy is seen to change."""
    equals_module: bool
    """Whether those of the module add up to the same now."""


def copies_in_attributes(
    pl_module: pl.LightningModule, callbacks: Iterable[pl.Callback], names: Iterable[str]
) -> Iterator[AttributeCopy]:
    """Find copies of what holds at least half of the parameters that are pruned, whose names are given.

    They may be modules, dictionaries of tensors, lists of them as ``torch_ema`` has them, or one vector.
    """
    pruned = network_copies.prunable(pl_module, names)
    branches = {
        path: branch for path, branch in branches_of(pruned).items() if branch and 2 * size(branch) >= size(pruned)
    }
    holders = (pl_module, *callbacks)
    for copy in chain(_in_attributes(pl_module, holders, branches), _in_layers(pl_module, branches)):
        sums = _sums(copy.tensors.values())
        yield AttributeCopy(copy, sums, sums == _sums(pruned[name] for name in copy.tensors))


def _sums(tensors: Iterable[Tensor]) -> tuple[float, ...]:
    return tuple(tensor.detach().sum(dtype=torch.float64).item() for tensor in tensors)


def _in_attributes(pl_module: pl.LightningModule, holders: Iterable[object], branches: Branches) -> Iterator[Copy]:
    """Find the first copy in each attribute that has one, unless that is of live parameters of the module."""
    own = {id(parameter) for parameter in pl_module.parameters()}
    for holder in holders:
        for attribute, value in vars(holder).items():
            if attribute in _HOLDERS:
                continue
            for path, thing in _things(value, attribute, set()):
                of, tensors = _match(thing, branches, pl_module)
                if tensors and own.isdisjoint(map(id, tensors.values())):
                    yield _copy(f"`{path}` of {type(holder).__name__}", of, tensors, pl_module)
                    break


def _in_layers(pl_module: pl.LightningModule, branches: Branches) -> Iterator[Copy]:
    """Find copies in buffers and frozen parameters of a layer's own, as averages have them whose names have no dots."""
    for path, layer in pl_module.named_modules():
        own = [*layer._parameters.values(), *layer._buffers.values()]
        untrained = [tensor for tensor in own if tensor is not None and not tensor.requires_grad and tensor.ndim]
        for thing in (untrained, *untrained):
            of, tensors = _match(thing, branches, pl_module)
            if tensors:
                name = f"What {repr(path) if path else type(pl_module).__name__} keeps in buffers or frozen parameters"
                yield _copy(name, of, tensors, pl_module)


def _copy(name: str, of: str, tensors: dict[str, Tensor], pl_module: pl.LightningModule) -> Copy:
    return Copy(name, repr(of) if of else type(pl_module).__name__, "", tensors)


# Possible copies.


def _things(value: Any, path: str, seen: set[int], depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Yield what may be a copy: a module, a vector, or a dictionary or list of tensors, also within other objects."""
    if id(value) in seen or not depth:
        return
    seen.add(id(value))
    if isinstance(value, (Tensor, nn.Module)):
        yield path, value
    elif isinstance(value, (list, tuple, dict)):
        if not isinstance(value, dict) and 0 < len(value) <= _MOST and all(map(_is_named, value)):
            value = dict(value)
        inner = list(value.values() if isinstance(value, dict) else value)
        if 0 < len(inner) <= _MOST and all(isinstance(item, Tensor) for item in inner):
            yield path, value if all(isinstance(name, str) for name in value) else inner
        elif len(inner) <= _MOST:
            for item in inner:
                yield from _things(item, path, seen, depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, _PASSED_OVER) and "param_groups" not in vars(value):
        for name, item in vars(value).items():
            yield from _things(item, f"{path}.{name}", seen, depth - 1)


def _is_named(value: Any) -> bool:
    """Whether something is a name and a tensor, as of ``named_parameters()``."""
    return isinstance(value, tuple) and tuple(map(type, value))[:1] == (str,) and isinstance(value[-1], Tensor)


# Recognise copies.


def _match(thing: Any, branches: Branches, pl_module: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """Find the submodule that something is a copy of, and the tensors of a :class:`Copy`; no tensors if it is none."""
    is_vector, is_list = isinstance(thing, Tensor), isinstance(thing, (list, tuple))
    named = {} if is_vector or is_list else _with_names(thing)
    for of, original in branches.items():
        submodule = pl_module.get_submodule(of)
        in_order = _parted(thing, submodule) if is_vector else _in_order(list(thing), submodule) if is_list else ()
        for tensors in (*in_order, *named.values()):
            if all(_is_like(tensors.get(name), parameter) for name, parameter in original.items()):
                copy = {name: tensors[name] for name in original}
                if is_vector or len(copy) > 1 or network_copies.are_equal(copy, original):
                    return of, {joined(of, name): tensor for name, tensor in copy.items()}
    return "", {}


def _with_names(thing: Any) -> Branches:
    """Return the tensors of a module or a dictionary, as a whole and by submodule."""
    tensors = dict(thing.named_parameters()) if isinstance(thing, nn.Module) else thing
    return branches_of({name: tensor for name, tensor in tensors.items() if isinstance(name, str)})


def _in_order(tensors: list[Tensor], module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Name tensors after the parameters of a module whose shapes they have."""
    for parameters in _selections(module):
        if [tensor.shape for tensor in tensors] == [parameter.shape for parameter in parameters.values()]:
            yield dict(zip(parameters, tensors, strict=True))


def _parted(vector: Tensor, module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Part a vector into tensors named after the parameters of a module that it points in the direction of."""
    if vector.ndim != 1 or not vector.is_floating_point():
        return
    for parameters in _selections(module):
        sizes = [parameter.numel() for parameter in parameters.values()]
        if len(vector) == sum(sizes) and _points_alike(vector, parameters.values()):
            parts = zip(parameters.items(), torch.split(vector.detach(), sizes), strict=True)
            yield {name: part.view(parameter.shape) for (name, parameter), part in parts}


def _points_alike(vector: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether a vector has the direction of parameters, as an average of them has: others may be as long by chance."""
    flat = torch.cat([parameter.detach().flatten().to(vector) for parameter in parameters])
    return torch.cosine_similarity(vector.detach().float(), flat.float(), 0).item() > 0.5


def _selections(module: nn.Module) -> list[dict[str, Tensor]]:
    """Return the parameters that a list or vector may have copies of: all of them, or those that require a gradient."""
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    return [parameters, {name: value for name, value in parameters.items() if value.requires_grad}]


def _is_like(copy: Tensor | None, original: Tensor) -> bool:
    return copy is not None and copy.shape == original.shape and copy.is_floating_point()
