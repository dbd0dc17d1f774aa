"""Copies of single values of training data for ``data_copies``: arrays, random generators, open files, classes.

:mod:`lightning_drive.trainer.data_copies` takes the data apart and calls these functions.
"""

import copy
import random
import types
from collections import deque
from multiprocessing import sharedctypes
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

CONTAINERS = (list, dict, set, tuple, deque)

_GENERATORS = (random.Random, torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState)
_GLOBAL_GENERATORS = (getattr(random, "_inst", None), np.random.mtrand._rand, torch.default_generator)
"""Whoever scores puts these back."""

MOVING = (Tensor, np.ndarray, *_GENERATORS, sharedctypes.SynchronizedBase)
"""What :func:`moving_copy` is for."""

MANY = 10_000
"""Containers and texts of more entries are taken for data, not for a place in them."""

_LARGE = 2**26
"""Bytes of an array, or of the arrays in a container, from which on they are taken for data, too."""


def is_data(container: Any) -> bool:
    """Whether a container is so large that it is taken for data, whose entries need no copies."""
    return len(container) > MANY or (not isinstance(container, tuple) and _nbytes_in(container) > _LARGE)


def _nbytes_in(container: Any, depth: int = 4) -> int:
    """Count the bytes of the arrays in a container, without entries that are taken for data themselves."""
    nbytes = (_nbytes(value, depth) for value in (container.values() if isinstance(container, dict) else container))
    return sum(number for number in nbytes if number <= _LARGE)


def _nbytes(value: Any, depth: int) -> int:
    if isinstance(value, Tensor):
        return value.nbytes if value.layout == torch.strided else 0
    if isinstance(value, np.ndarray):
        return value.nbytes
    is_searched = depth > 0 and type(value) in CONTAINERS and len(value) <= MANY
    return _nbytes_in(value, depth - 1) if is_searched else 0


def moving_copy(value: Any, memo: dict[int, Any]) -> Any:
    """Copy an array or a random generator; large arrays, and generators that are not the data's own, stay as they are.

    ``memo`` is that of ``copy.deepcopy``, so that tensors that share memory share it in their copies, too.
    """
    if any(value is generator for generator in (*_GLOBAL_GENERATORS, *torch.cuda.default_generators)):
        return value
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, sharedctypes.SynchronizedBase):
        return sharedctypes.synchronized(sharedctypes.copy(value.get_obj()), value.get_lock())
    if isinstance(value, _GENERATORS):
        return copy.deepcopy(value)
    if isinstance(value, np.ndarray):
        return value.copy() if type(value) is np.ndarray and value.nbytes <= _LARGE else value
    is_plain = type(value) is Tensor and value.layout == torch.strided and not value.requires_grad
    if not is_plain or value.untyped_storage().nbytes() > _LARGE:
        return value
    is_shared = not value.is_cuda and value.is_shared()
    twin = copy.deepcopy(value, memo)
    return twin.share_memory_() if is_shared else twin


def reopened(file: Any) -> IO[Any] | None:
    """Open a file that is being read once more, at the same place; ``None`` where that cannot be done."""
    name, mode = getattr(file, "name", None), getattr(file, "mode", None)
    if not isinstance(name, str) or mode not in ("r", "rt", "rb"):
        return None
    text = {} if mode == "rb" else {"encoding": file.encoding, "errors": file.errors}
    twin: IO[Any] | None = None
    try:
        place = file.tell()
        twin = open(name, mode, **text)  # noqa: PTH123, SIM115
        twin.seek(place)
    except OSError:  # no longer there, no plain file, or in the middle of a loop over lines
        if twin is not None:
            twin.close()
        return None
    return twin


def without_end(kind: type) -> type:
    """Return the class of a copy, whose end must not close or delete what is shared."""
    if not isinstance(getattr(kind, "__del__", None), types.FunctionType):
        return kind
    names = {"__del__": lambda _: None, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(names))


def is_python(kind: type) -> bool:
    """Whether objects of a class are made by ``object.__new__``, and are nothing but their attributes."""
    try:
        object.__new__(without_end(kind))
    except TypeError:
        return False
    return True


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object: its own, its slots, and random generators that its class holds."""
    of_classes = {
        name: getattr(value, name)
        for kind in reversed(type(value).__mro__)
        for name, member in vars(kind).items()
        if isinstance(member, _GENERATORS) or (isinstance(member, types.MemberDescriptorType) and hasattr(value, name))
    }
    return of_classes | getattr(value, "__dict__", {})


def set_attributes(owner: Any, attributes: dict[str, Any]) -> None:
    """Set attributes, slots included, whatever the class does when they are set."""
    for name, value in attributes.items():
        is_slot = isinstance(getattr(type(owner), name, None), types.MemberDescriptorType)
        if is_slot or isinstance(owner, types.FunctionType):
            object.__setattr__(owner, name, value)
        else:
            vars(owner)[name] = value


def cell_contents(cell: types.CellType) -> tuple[Any, ...]:
    """Return what a closure's cell holds, as a tuple; an empty one holds nothing."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def fill_cell(cell: types.CellType, contents: tuple[Any, ...]) -> None:
    """Put what :func:`cell_contents` returned into a cell."""
    for value in contents:
        cell.cell_contents = value
