"""The tensors in a batch, or in the arguments and results of a network, whatever container holds them."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_drive.core.function_modes import FunctionMode


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return a tree with a function applied to each of its tensors.

    Containers are what Lightning enters when it moves and converts a batch: lists, tuples, mappings (``UserDict`` and
    others that are no ``dict``, too), dataclasses and subclasses of these, and objects with a ``to`` method, such as a
    batch of graphs; and objects with tensors among their attributes. Everything else is shared, and so is a container
    that cannot be copied. The tree itself is not changed.

    Examples:
        >>> mapped(torch.neg, {"x": [torch.ones(2)], "name": "a"})
        {'x': [tensor([-1., -1.])], 'name': 'a'}

    """
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) in (list, tuple):
        return type(tree)(mapped(function, entry) for entry in tree)
    if type(tree) is dict:
        return {key: mapped(function, entry) for key, entry in tree.items()}
    return _copied(function, tree) if _is_container(tree) else tree


def leaves(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, in order.

    Examples:
        >>> leaves(({"image": torch.zeros(1)}, "label", [torch.ones(1)]))
        [tensor([0.]), tensor([1.])]

    """
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    mapped(note, tree)
    return tensors


def arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments, as Lightning reads them out of an ``example_input_array``.

    That is one argument, a tuple of arguments or a mapping of keyword arguments.
    """
    if isinstance(given, Mapping):
        return (), dict(given)
    return (given if isinstance(given, tuple) else (given,)), {}


def _is_container(thing: object) -> bool:
    if isinstance(thing, (str, bytes, type, nn.Module, torch.device, torch.dtype)):
        return False
    if isinstance(thing, (Mapping, Sequence)) or is_dataclass(thing) or hasattr(thing, "to"):
        return True
    return any(isinstance(value, Tensor) for value in getattr(thing, "__dict__", {}).values())


def _copied(function: Callable[[Tensor], Tensor], thing: Any) -> Any:
    """Copy a container with the tensors in it replaced."""
    on_copy = _OnCopy(function)
    with suppress(Exception), on_copy:  # whatever prevents a copy
        twin = copy.deepcopy(thing)
        if on_copy.has_met_any or not hasattr(type(thing), "__deepcopy__"):  # TensorDict copies in a way of its own
            return twin
    with suppress(Exception):  # a lock among the attributes, say, or a `__getattr__` that loops in an empty object
        twin = object.__new__(type(thing))
        vars(twin).update({name: mapped(function, value) for name, value in vars(thing).items()})
        return twin
    with suppress(Exception):
        return _made_anew(function, thing)
    return thing


def _made_anew(function: Callable[[Tensor], Tensor], thing: Any) -> Any:
    """Return a new container made of its entries, as Lightning does: some take a method for an entry in a copy."""
    kind: Any = type(thing)
    if isinstance(thing, Mapping):
        entries = {key: mapped(function, entry) for key, entry in thing.items()}
        return kind(thing.default_factory, entries) if isinstance(thing, defaultdict) else kind(entries)
    if isinstance(thing, Sequence):
        items = [mapped(function, item) for item in thing]
        return kind(*items) if hasattr(thing, "_fields") else kind(items)
    twin = copy.copy(thing)
    for field in fields(thing):  # a dataclass with slots
        object.__setattr__(twin, field.name, mapped(function, getattr(thing, field.name)))
    return twin


class _OnCopy(FunctionMode):
    """Replaces each tensor that ``copy.deepcopy`` comes to."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function
        self.has_met_any = False

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **kwargs)
        self.has_met_any = True
        return self._function(args[0])
