"""The objects that a function holds in its closure, its defaults and its attributes, and a copy that holds others."""

import types
from collections.abc import Callable
from typing import Any


def held_by(function: types.FunctionType) -> tuple[Any, ...]:
    """Return the objects that a function holds in its closure and in its defaults."""
    cells = (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    return (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())


def empty_copy(function: types.FunctionType) -> types.FunctionType:
    """Return a function of the same code that holds nothing yet, see :func:`fill`."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)


def fill(copy: types.FunctionType, function: types.FunctionType, counterpart: Callable[[Any], Any]) -> None:
    """Let a copy of :func:`empty_copy` hold the counterparts of the objects that the function holds."""
    for new, old in zip(copy.__closure__ or (), function.__closure__ or (), strict=True):
        if _is_filled(old):
            new.cell_contents = counterpart(old.cell_contents)
    copy.__defaults__ = function.__defaults__ and tuple(map(counterpart, function.__defaults__))
    keywords = function.__kwdefaults__
    copy.__kwdefaults__ = keywords and {name: counterpart(value) for name, value in keywords.items()}
    vars(copy).update({name: counterpart(value) for name, value in vars(function).items()})


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
