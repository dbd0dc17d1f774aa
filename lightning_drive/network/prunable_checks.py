"""Checks that a parameter can be pruned weight by weight: it has real values of its own that can be set to 0."""

from collections.abc import Container, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_drive.core import shards


def check_numbers(parameters: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` if the numbers of a parameter cannot be scored and set to 0 one by one.

    That is one on the meta device, in float8, not a plain dense tensor, or not to be written to (named, with what to
    do).
    """
    for name, parameter in parameters.items():
        if trouble := _trouble(parameter):
            raise ValueError(f"{name!r} {trouble}, or leave it out with `exclude=[{name!r}]`.")


def check_kinds(parameters: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` if a parameter is lazy or complex (named, with what to do)."""
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name!r} is not initialised yet: run one batch through the lazy module before pruning.")
        if parameter.is_complex():
            raise ValueError(
                f"{name!r} is complex ({parameter.dtype}), and scores are defined for real weights. Leave it out with"
                f" `exclude=[{name!r}]`."
            )


def check_memory(selected: Container[str], parameters: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` if a selected parameter shares a number in memory with another one, or with itself.

    A mask of one weight would prune both. Parameters may lie in one storage as long as no number is in both.
    """
    storages: dict[tuple[torch.device, int], list[str]] = {}
    for name, parameter in parameters.items():
        if type(parameter) is nn.Parameter and parameter.layout == torch.strided and parameter.device.type != "meta":
            storage = parameter.untyped_storage()
            if storage.data_ptr():  # what is fake, or empty, has none
                storages.setdefault((parameter.device, storage.data_ptr()), []).append(name)
    for names in storages.values():
        if any(name in selected for name in names) and not _are_apart([parameters[name] for name in names]):
            _check_places({name: parameters[name] for name in names}, selected)


def _trouble(parameter: Tensor) -> str:
    """Return why the numbers of a parameter cannot be pruned one by one, and what to do; empty if they can."""
    numbers = shards.local(parameter)
    if numbers.is_meta:
        return (
            "is on the meta device, so it has no values to score. Give the module memory and values first"
            " (`module.to_empty(device=...)`, then initialise or load it)"
        )
    if numbers.is_nested or numbers.layout != torch.strided:
        kind = "a nested tensor" if numbers.is_nested else f"stored as {numbers.layout}"
        return f"is {kind}, and only dense tensors can be pruned weight by weight. Make it dense (`.to_dense()`)"
    if numbers.is_inference():
        return "was made in `torch.inference_mode()`, so nothing can be written to it. Make the module outside of it"
    if numbers.is_floating_point() and numbers.itemsize == 1:
        return f"is in {numbers.dtype}, which torch cannot compute with. Prune it in torch.bfloat16, and convert after"
    if type(numbers) not in (Tensor, nn.Parameter) and not _can_be_zeroed(numbers):
        kind = type(numbers).__name__
        return f"is a {kind}, which cannot be copied and set to 0 weight by weight. Make it a plain tensor"
    return ""


def _can_be_zeroed(numbers: Tensor) -> bool:
    """Whether a tensor of a class of its own can be copied and takes zeros as plain ones do."""
    try:
        with torch.no_grad():
            twin = deepcopy(numbers.detach())
            twin.masked_fill_(torch.ones(twin.shape, dtype=torch.bool, device=twin.device), 0)
            return not bool(twin.any())
    except Exception:  # such classes raise anything for operations that they lack
        return False


def _check_places(sharing: Mapping[str, Tensor], selected: Container[str]) -> None:
    """Raise if a selected parameter has a number in common with another one of the same storage."""
    unit = min(weights.itemsize for weights in sharing.values())
    owners = torch.full((next(iter(sharing.values())).untyped_storage().nbytes() // unit,), -1, dtype=torch.int32)
    names = sorted(sharing, key=lambda name: name in selected)  # stable; who comes later is the one that minds
    for index, name in enumerate(names):
        weights, scale = sharing[name], sharing[name].itemsize // unit
        shape = [size if stride else 1 for size, stride in zip(weights.shape, weights.stride(), strict=True)]
        strides = [scale * stride for stride in weights.stride()]
        places = owners.as_strided(shape, strides, scale * weights.storage_offset())
        other = int(places.max()) if places.numel() else -1
        places.fill_(index)
        if name in selected and other >= 0:
            raise ValueError(
                f"{names[other]!r} and {name!r} are two parameters over one memory, so a mask of one would prune both."
                " Tie them by assigning the parameter itself (`second.weight = first.weight`, not its `.data`), give"
                f" each its own memory (`.clone()`), or leave both out with `exclude=[{names[other]!r}, {name!r}]`."
            )
        if name in selected and int((owners == index).sum()) < weights.numel():
            raise ValueError(
                f"Several weights of {name!r} are one number in memory (it was expanded, say), so a mask of one would"
                f" prune them all. Give it its own memory (`.clone()`), or use `exclude=[{name!r}]`."
            )


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one storage plainly lie one behind the other there, as slices of a flat buffer do."""
    spans = sorted(
        (start := tensor.storage_offset() * tensor.itemsize, start + tensor.numel() * tensor.itemsize)
        for tensor in tensors
    )
    return all(map(_is_dense, tensors)) and all(before[1] <= after[0] for before, after in pairwise(spans))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie one after the other, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
