"""Copy objects that move when they are used, such as data that know where they are, so that the originals stay."""

import copy
import io
import pickle
import queue
import socket
import subprocess
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from multiprocessing import connection, queues
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_drive.trainer import data_value_copies

_STREAMS = (
    types.GeneratorType,
    _BaseDataLoaderIter,
    threading.Thread,
    queue.Queue,
    queue.SimpleQueue,
    queues.Queue,
    queues.SimpleQueue,
    connection.Connection,
    subprocess.Popen,
    socket.socket,
)
"""What goes on by itself, or from one place only: it has no copy."""

_BUILTIN = ("builtins", "itertools", "functools", "collections")
"""Modules whose objects say themselves how to pickle them."""

_NOT_COPIED = ("threading", "multiprocessing", "concurrent", "asyncio", "logging", "weakref", "pathlib")
"""Packages whose objects are shared, such as locks."""


class _Reader(pickle.Unpickler):
    """Reads what a :class:`Copier` wrote, with what stands for values at their places."""

    def __init__(self, buffer: io.BytesIO, twins: list[Any]) -> None:
        super().__init__(buffer)
        self._twins = twins

    def persistent_load(self, place: int) -> Any:
        """Return what stands for a value."""
        return self._twins[place]


class Copier(pickle.Pickler):
    """Copies objects with all that moves when they are used, so that the originals stay where they are.

    They are pickled in memory, and what is not copied is passed on as it is. New are the objects that Python code
    defines, whatever they say about pickling, their containers, closures, random generators, small arrays and open
    files. Large data, locks and what is not written in Python are shared. What is the same object in the original is
    the same in the copy.

    ``is_shared`` returns whether an object is not copied. ``error`` returns, given the place of something that cannot
    be copied, what to raise where the copy uses it. Afterwards ``has_unusable`` is whether there is such a thing, and
    ``files`` are the files that were opened once more.

    Examples:
        >>> import random
        >>> count = iter([1, 2, 3])
        >>> copied = Copier(lambda value: False, RuntimeError).copy({"count": count, "noise": random.Random(1)})
        >>> next(copied["count"]), next(copied["count"]), next(count)
        (1, 2, 1)

    """

    def __init__(self, is_shared: Callable[[Any], bool], error: Callable[[str], Exception]) -> None:
        self._is_shared, self._error = is_shared, error
        self._in_workers = self.has_unusable = False
        self.files: list[Any] = []
        self._places: dict[int, int] = {}  # id of an original to the place of its substitute
        self._twins: list[Any] = []
        self._originals: list[Any] = []  # keeps their ids from being reused
        self._tensors: dict[int, Any] = {}  # what `copy.deepcopy` knows, such as memory that several share
        self._attribute = "an attribute"

    def copy(self, value: Any) -> Any:
        """Return a copy."""
        buffer = io.BytesIO()
        super().__init__(buffer, protocol=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of iterators of itertools, written and read
            try:
                self.dump(value)
            except RecursionError:
                raise self._error(f"{self._attribute} (nested too deep)") from None
            buffer.seek(0)
            return _Reader(buffer, self._twins).load()

    def copy_for_workers(self, value: Any) -> None:
        """Copy a part of what :meth:`copy` is called with afterwards, as worker processes need it that run it.

        Each of them has its own copy of what cannot be copied here.
        """
        self._in_workers = True
        self._substitute(value, self.copy(value))
        self._in_workers = False

    def persistent_id(self, value: Any) -> int | None:
        """Return the place of what stands for a value, which is then not pickled."""
        if id(value) not in self._places:
            if type(value) in data_value_copies.CONTAINERS and data_value_copies.is_data(value):
                self._substitute(value, copy.copy(value))
            elif type(value) in (str, bytes) and len(value) > data_value_copies.MANY:
                self._share(value)
        return self._places.get(id(value))

    def reducer_override(self, value: Any) -> Any:
        """Return how to pickle whatever is no plain number, text or container."""
        kind = type(value)
        if kind is _Attribute:
            self._attribute = value.place
            return _same, (value.value,)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.CellType:
            return types.CellType, (), data_value_copies.cell_contents(value), None, None, data_value_copies.fill_cell
        if kind is types.MethodType:
            return types.MethodType, (value.__func__, value.__self__)
        if isinstance(value, _STREAMS):
            return self._unusable(value)
        if isinstance(value, io.IOBase):
            return self._file(value)
        if isinstance(value, data_value_copies.MOVING):
            return self._substitute(value, data_value_copies.moving_copy(value, self._tensors))
        if isinstance(value, type):
            return self._substitute(value, value if self._in_workers else data_value_copies.without_end(value))
        if isinstance(value, data_value_copies.CONTAINERS) and data_value_copies.is_data(value):
            return self._substitute(value, copy.copy(value))
        if isinstance(value, data_value_copies.CONTAINERS) or kind.__module__ in _BUILTIN:
            return self._builtin(value)
        return self._object(value)

    # Each of these returns how to pickle a value.

    def _substitute(self, value: Any, twin: Any) -> Any:
        """Have another object stand for a value in the copy."""
        self._places[id(value)] = len(self._twins)
        self._twins.append(twin)
        self._originals.append(value)
        return _same, (value,)

    def _share(self, value: Any) -> Any:
        return self._substitute(value, value)

    def _unusable(self, value: Any) -> Any:
        if self._in_workers:
            return self._share(value)
        self.has_unusable = True
        error = self._error(f"{self._attribute} ({type(value).__name__})")
        self._share(error)
        return _Unusable, (error,)

    def _function(self, function: types.FunctionType) -> Any:
        """Copy a function that holds on to objects, with those."""
        if self._in_workers or not (function.__closure__ or function.__defaults__ or function.__kwdefaults__):
            return self._share(function)
        for shared in (function.__code__, function.__globals__):
            self._share(shared)
        arguments = (function.__code__, function.__globals__, function.__name__, None, function.__closure__)
        names = ("__defaults__", "__kwdefaults__", "__qualname__", "__module__")
        state = {name: getattr(function, name) for name in names} | vars(function)
        return types.FunctionType, arguments, state, None, None, data_value_copies.set_attributes

    def _file(self, file: Any) -> Any:
        if self._in_workers or file.closed:
            return self._share(file)
        if isinstance(file, (io.BytesIO, io.StringIO)):
            return self._substitute(file, copy.copy(file))
        twin = data_value_copies.reopened(file)
        if twin is None:
            return self._unusable(file)
        self.files.append(twin)
        return self._substitute(file, twin)

    def _builtin(self, value: Any) -> Any:
        """Copy objects that define how to pickle them: subclasses of containers, iterators, partial functions."""
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, (types.ModuleType, type)):
            return self._share(value)
        try:
            reduced = value.__reduce_ex__(4)
        except (TypeError, AttributeError):
            return self._opaque(value)
        return self._share(value) if isinstance(reduced, str) else reduced

    def _object(self, value: Any) -> Any:
        """Copy an object of a class that is written in Python by its attributes; share others."""
        kind = type(value)
        if isinstance(value, Enum) or self._is_shared(value) or (self._in_workers and hasattr(kind, "__del__")):
            return self._share(value)
        attributes = data_value_copies.attributes(value)
        if not attributes or kind.__module__.partition(".")[0] in _NOT_COPIED or not data_value_copies.is_python(kind):
            return self._opaque(value)
        state: dict[str, Any] = {
            name: _Attribute(f"`{kind.__name__}.{name}`", attribute) for name, attribute in attributes.items()
        }
        if isinstance(attributes.get("_iterator"), _BaseDataLoaderIter):  # the live one of persistent workers
            state["_iterator"] = None
        return object.__new__, (kind,), state, None, None, data_value_copies.set_attributes

    def _opaque(self, value: Any) -> Any:
        """Share what cannot be looked into, unless it goes on by itself."""
        return self._unusable(value) if isinstance(value, Iterator) else self._share(value)


class _Attribute:
    """An attribute's value on its way through a :class:`Copier`, with its place to name in errors."""

    def __init__(self, place: str, value: Any) -> None:
        self.place, self.value = place, value


class _Unusable:
    """Stands for what cannot be copied: replacing it is fine, but using it raises an error."""

    def __init__(self, error: Exception) -> None:
        vars(self)["error"] = error

    def _raise(self, *_: Any, **__: Any) -> Any:
        raise vars(self)["error"]

    __getattr__ = __setattr__ = __iter__ = __next__ = __call__ = __getitem__ = __enter__ = _raise


def _same(value: Any) -> Any:
    return value
