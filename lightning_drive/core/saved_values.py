"""Read values from files that may be damaged or of another program; any unexpected form is a ``ValueError``."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from lightning_drive.core.messages import shown

T = TypeVar("T")

REMEDY = "It is damaged, or of another version or program. Take another copy of the file, or an earlier checkpoint."
"""The end of every message about a value of another form."""

_MOST = 1 << 63
"""Every whole number is less: of shapes, counts and steps."""

_NAMES = {int: "a whole number of at least 0", float: "a number", str: "a text", bool: "True or False"}

_DEEPEST = 100
"""Levels of dictionaries and lists in a state."""

_MOST_BEYOND = 1 << 28
"""Bytes that a tensor may claim beyond those that it has in memory."""


def read(kind: type[T], values: object) -> T:
    """Return a dataclass with the given values, each in the form of its annotation; tuples may come as lists.

    Fields are numbers, texts, literals, tuples, mappings or dataclasses; those with a default may be missing. Raise a
    ``ValueError`` that names a field if it is missing, unknown or of another form.

    Examples:
        >>> from dataclasses import make_dataclass
        >>> Point = make_dataclass("Point", [("place", tuple[int, ...]), ("name", str | None, None)])
        >>> read(Point, {"place": [1, 2]})
        Point(place=(1, 2), name=None)
        >>> read(Point, {"place": [1, None]})
        Traceback (most recent call last):
        ...
        ValueError: `place[1]` of the Point must be a whole number of at least 0, got None. It is damaged, or of \
another version or program. Take another copy of the file, or an earlier checkpoint.

    """
    return _dataclass(kind, values, "")


def check(kind: Any, value: object, what: str) -> Any:
    """Return a value that has the form of an annotation, such as ``dict[str, int]``.

    Raise a ``ValueError`` if it has another form; ``what`` names it there, such as ``"`shape` of the mask"``.
    """
    return _value(kind, value, what, "")


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has values in memory, and not by far fewer than it claims, as an expanded one may have.

    Examples:
        >>> has_memory(torch.ones(1).expand(1000)), has_memory(torch.ones(1).expand(10**12))
        (True, False)

    """
    if tensor.is_meta or tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes() + _MOST_BEYOND


def digest(value: object) -> str:
    """Return a SHA-256, in hexadecimal, of nested dictionaries and lists of numbers, texts and tensors.

    Of values of other types only the type's name counts.

    Examples:
        >>> digest({"lr": 0.1, "momenta": [torch.ones(2)]}) == digest({"lr": 0.1, "momenta": [torch.ones(1)]})
        False

    """
    content = hashlib.sha256()
    _feed(content.update, value, depth=0)
    return content.hexdigest()


def _feed(update: Callable[[bytes], None], value: object, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"A saved state is nested more than {_DEEPEST} deep. {REMEDY}")
    if isinstance(value, dict):
        update(b"{")
        for name, entry in value.items():
            _feed(update, name, depth + 1)
            _feed(update, entry, depth + 1)
        update(b"}")
    elif isinstance(value, (list, tuple)):
        update(b"[")
        for entry in value:
            _feed(update, entry, depth + 1)
        update(b"]")
    elif type(value) is Tensor and value.layout == torch.strided:
        update(f"{value.dtype}{tuple(value.shape)}{has_memory(value)}".encode())
        if has_memory(value):
            update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    elif isinstance(value, (int, str, bytes, float, complex, NoneType)):
        plain = float(value) if isinstance(value, float) else value  # of numpy, too
        text = hex(plain) if isinstance(plain, int) else repr(plain)  # long integers have no decimal text
        update(f"{type(value).__name__}{text},".encode(errors="surrogatepass"))
    else:
        update(type(value).__name__.encode())


def _dataclass(kind: type[T], values: object, path: str) -> T:
    place = f" in `{path}`" if path else ""
    if not isinstance(values, Mapping):
        raise ValueError(f"The {kind.__name__}{place} must be a dictionary, got {shown(values)}. {REMEDY}")
    known: dict[str, Any] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown = [name if isinstance(name, str) else shown(name) for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"The {kind.__name__} has fields that this lightning_drive does not know"
            f" ({', '.join(sorted(unknown)[:8])}){place}: it was written by a newer version, or is none."
        )
    missing = [
        repr(name)
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"The {kind.__name__}{place} is not complete: without {', '.join(missing)}. {REMEDY}")
    hints = get_type_hints(kind)
    prefix = f"{path}." if path else ""
    what = f"the {kind.__name__}" if not path else ""
    return kind(**{name: _value(hints[name], value, what, f"{prefix}{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, what: str, path: str) -> Any:
    """Return a value in the form of an annotation, or raise."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        [kind] = [part for part in parts if part is not NoneType]
        return _value(kind, value, what, path)
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, path)
    if origin is Literal:
        if isinstance(value, str) and value in parts:
            return value
        raise _odd(f"one of {', '.join(map(repr, parts))}", value, what, path)
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_value(parts[0], part, what, f"{path}[{index}]") for index, part in enumerate(value))
        raise _odd("a list", value, what, path)
    if origin is list:
        if isinstance(value, list):
            return [_value(parts[0], part, what, f"{path}[{index}]") for index, part in enumerate(value)]
        raise _odd("a list", value, what, path)
    if origin is not None:  # a mapping
        if not isinstance(value, dict):
            raise _odd("a dictionary", value, what, path)
        return {
            _value(parts[0], name, what, f"name in {path}".rstrip(" in")): _value(
                parts[1], entry, what, f"{path}[{shown(name)}]"
            )
            for name, entry in value.items()
        }
    if kind is Tensor:
        if isinstance(value, Tensor) and has_memory(value):
            return value
        raise _odd("a tensor with all of its values", value, what, path)
    return _plain(kind, value, what, path)


def _plain(kind: Any, value: Any, what: str, path: str) -> Any:
    is_number = type(value) is int and abs(value) < _MOST
    if kind in (object, Any) or (kind is dict and type(value) is dict):
        return value
    if kind is int and is_number and value >= 0:
        return value
    if kind is float and (is_number or type(value) is float):
        return value
    if kind in (str, bool) and type(value) is kind:
        return value
    raise _odd(_NAMES.get(kind, "a dictionary"), value, what, path)


def _odd(expected: str, value: object, what: str, path: str) -> ValueError:
    place = " of ".join(part for part in (f"`{path}`" if path else "", what) if part)
    return ValueError(f"{place[:1].upper()}{place[1:]} must be {expected}, got {shown(value)}. {REMEDY}")
