"""Copies of objects that move when they are used, such as data that know where they are."""

import copy
import io
import pickle
import queue
import random
import socket
import subprocess
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from multiprocessing import connection, queues, sharedctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.dataloader import _BaseDataLoaderIter

_LARGE = 2**26  # bytes of an array, or of a container of arrays, that are taken for data, not for a place in them
_MANY = 10_000  # entries of a container that are taken for data, too
_CONTAINERS = (list, dict, set, tuple, deque)
_GENERATORS = (random.Random, torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState)
_GLOBAL = (getattr(random, "_inst", None), np.random.mtrand._rand, torch.default_generator)  # the caller's to put back
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
_NOT_COPIED = ("threading", "multiprocessing", "concurrent", "asyncio", "logging", "weakref", "pathlib")


class _Unusable:
    """Stands for what cannot be copied: replacing it is fine, but using it raises an error."""

    def __init__(self, error: Exception) -> None:
        vars(self)["error"] = error

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise vars(self)["error"]

    __getattr__ = __setattr__ = __iter__ = __next__ = __call__ = __getitem__ = __enter__ = _refuse


class _Attribute:
    """An attribute's value on its way through a :class:`Copier`, with the name to blame."""

    def __init__(self, place: str, value: Any) -> None:
        self.place, self.value = place, value


class Copier(pickle.Pickler):
    """Copies objects with all that moves when they are used, so that the originals stay where they are.

    They are pickled in memory, and what is not copied is handed over as it is. New are the objects that Python code
    defines, whatever they say about pickling, their containers, closures, random generators, small arrays and open
    files. Large data, locks and what is not written in Python are shared. What is the same object in the original is
    the same in the copy.

    Args:
        is_shared: Returns whether an object is not copied.
        error: Returns what to raise where something is used that cannot be copied, given its place.

    Attributes:
        has_unusable: Whether there is something that cannot be copied.
        files: The files that were opened once more.

    Example:
        >>> count = iter([1, 2, 3])
        >>> copied = Copier(lambda value: False, RuntimeError).copy({"count": count, "noise": random.Random(1)})
        >>> next(copied["count"]), next(copied["count"]), next(count)
        (1, 2, 1)

    """

    def __init__(self, is_shared: Callable[[Any], bool], error: Callable[[str], Exception]) -> None:
        self._is_shared, self._error = is_shared, error
        self._in_workers = self.has_unusable = False
        self.files: list[Any] = []
        self._places: dict[int, int] = {}  # id of an original to the place of what stands for it
        self._twins: list[Any] = []
        self._originals: list[Any] = []  # which keeps their ids their own
        self._tensors: dict[int, Any] = {}  # what `copy.deepcopy` knows, such as memory that several share
        self._attribute = "an attribute"

    def copy(self, value: Any) -> Any:
        """Return a copy.

        Args:
            value: Any object.

        """
        buffer = io.BytesIO()
        super().__init__(buffer, protocol=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of iterators of itertools
            try:
                self.dump(value)
            except RecursionError:
                raise self._error(f"{self._attribute} (nested too deep)") from None
        buffer.seek(0)
        reader = pickle.Unpickler(buffer)
        reader.persistent_load = self._twins.__getitem__  # type: ignore[method-assign]
        return reader.load()

    def copy_for_workers(self, value: Any) -> None:
        """Copy what worker processes run, each of which has its own copy of what cannot be copied here.

        Args:
            value: A part of what :meth:`copy` is called with afterwards.

        """
        self._in_workers = True
        self._hand_over(value, self.copy(value))
        self._in_workers = False

    def _hand_over(self, value: Any, twin: Any) -> Any:
        """Let something stand for a value, and return how to pickle that."""
        self._places[id(value)] = len(self._twins)
        self._twins.append(twin)
        self._originals.append(value)
        return _same, (value,)

    def persistent_id(self, value: Any) -> int | None:
        """Return the place of what stands for a value, which is then not pickled."""
        if id(value) not in self._places:
            if type(value) in _CONTAINERS and _is_data(value):
                self._hand_over(value, copy.copy(value))
            elif type(value) in (str, bytes) and len(value) > _MANY:
                self._hand_over(value, value)
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
            return types.CellType, (), _contents(value), None, None, _fill
        if kind is types.MethodType:
            return types.MethodType, (value.__func__, value.__self__)
        if isinstance(value, _STREAMS):
            return self._unusable(value)
        if isinstance(value, io.IOBase):
            return self._file(value)
        if isinstance(value, (Tensor, np.ndarray, *_GENERATORS, sharedctypes.SynchronizedBase)):
            return self._hand_over(value, self._moving(value))
        if isinstance(value, type):
            return self._hand_over(value, value if self._in_workers else _without_end(value))
        if isinstance(value, _CONTAINERS) and _is_data(value):
            return self._hand_over(value, copy.copy(value))
        if isinstance(value, _CONTAINERS) or kind.__module__ in ("builtins", "itertools", "functools", "collections"):
            return self._builtin(value)
        return self._object(value)

    def _unusable(self, value: Any) -> Any:
        if self._in_workers:
            return self._hand_over(value, value)
        self.has_unusable = True
        error = self._error(f"{self._attribute} ({type(value).__name__})")
        self._hand_over(error, error)
        return _Unusable, (error,)

    def _opaque(self, value: Any) -> Any:
        return self._unusable(value) if isinstance(value, Iterator) else self._hand_over(value, value)

    def _function(self, function: types.FunctionType) -> Any:
        """Copy a function that holds on to objects, with those."""
        if self._in_workers or not (function.__closure__ or function.__defaults__ or function.__kwdefaults__):
            return self._hand_over(function, function)
        for shared in (function.__code__, function.__globals__):
            self._hand_over(shared, shared)
        arguments = (function.__code__, function.__globals__, function.__name__, None, function.__closure__)
        names = ("__defaults__", "__kwdefaults__", "__qualname__", "__module__")
        state = {name: getattr(function, name) for name in names} | vars(function)
        return types.FunctionType, arguments, state, None, None, _put

    def _file(self, file: Any) -> Any:
        """Open a file once more at the same place."""
        if self._in_workers or file.closed:
            return self._hand_over(file, file)
        if isinstance(file, (io.BytesIO, io.StringIO)):
            return self._hand_over(file, copy.copy(file))
        name, mode = getattr(file, "name", None), getattr(file, "mode", None)
        if not isinstance(name, str) or mode not in ("r", "rt", "rb"):
            return self._unusable(file)
        text = {} if mode == "rb" else {"encoding": file.encoding, "errors": file.errors}
        try:
            place = file.tell()
            self.files.append(open(name, mode, **text))  # noqa: PTH123, SIM115
            self.files[-1].seek(place)
        except OSError:  # no longer there, no plain file, or in the middle of a loop over lines
            return self._unusable(file)
        return self._hand_over(file, self.files[-1])

    def _moving(self, value: Any) -> Any:
        """Copy an array or a random generator."""
        if any(value is each for each in (*_GLOBAL, *torch.cuda.default_generators)):
            return value
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, sharedctypes.SynchronizedBase):
            return sharedctypes.synchronized(sharedctypes.copy(value.get_obj()), value.get_lock())
        if isinstance(value, _GENERATORS):
            return copy.deepcopy(value)
        if isinstance(value, np.ndarray):
            return value.copy() if type(value) is np.ndarray and value.nbytes <= _LARGE else value
        plain = type(value) is Tensor and value.layout == torch.strided and not value.requires_grad
        if not plain or value.untyped_storage().nbytes() > _LARGE:
            return value
        shared = not value.is_cuda and value.is_shared()
        twin = copy.deepcopy(value, self._tensors)
        return twin.share_memory_() if shared else twin

    def _builtin(self, value: Any) -> Any:
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, (types.ModuleType, type)):
            return self._hand_over(value, value)
        try:
            reduced = value.__reduce_ex__(4)
        except (TypeError, AttributeError):
            return self._opaque(value)
        return self._hand_over(value, value) if isinstance(reduced, str) else reduced

    def _object(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Enum) or self._is_shared(value) or (self._in_workers and hasattr(kind, "__del__")):
            return self._hand_over(value, value)
        attributes = _attributes(value)
        if not attributes or kind.__module__.partition(".")[0] in _NOT_COPIED or not _is_python(kind):
            return self._opaque(value)
        named = {name: _Attribute(f"`{kind.__name__}.{name}`", each) for name, each in attributes.items()}
        if isinstance(attributes.get("_iterator"), _BaseDataLoaderIter):  # the live one of persistent workers
            named["_iterator"] = None  # type: ignore[assignment]
        return object.__new__, (kind,), named, None, None, _put


def _same(value: Any) -> Any:
    return value


def _put(owner: Any, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        is_slot = isinstance(getattr(type(owner), name, None), types.MemberDescriptorType)
        if is_slot or isinstance(owner, types.FunctionType):
            object.__setattr__(owner, name, value)
        else:
            vars(owner)[name] = value


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # an empty one
        return ()


def _fill(cell: types.CellType, contents: tuple[Any, ...]) -> None:
    for value in contents:
        cell.cell_contents = value


def _is_data(container: Any) -> bool:
    return len(container) > _MANY or (not isinstance(container, tuple) and _nbytes_in(container) > _LARGE)


def _nbytes_in(container: Any, depth: int = 4) -> int:
    """Count the bytes of the arrays in a container, without entries that are taken for data themselves."""
    found = 0
    for each in container.values() if isinstance(container, dict) else container:
        if isinstance(each, (Tensor, np.ndarray)):
            is_copied = isinstance(each, np.ndarray) or each.layout == torch.strided
            nbytes = each.nbytes if is_copied else 0
        else:
            nbytes = _nbytes_in(each, depth - 1) if depth and type(each) in _CONTAINERS and len(each) <= _MANY else 0
        found += nbytes if nbytes <= _LARGE else 0
    return found


def _without_end(kind: type) -> type:
    """Return the class of a copy, whose end must not close or delete what is shared."""
    if not isinstance(getattr(kind, "__del__", None), types.FunctionType):
        return kind
    names = {"__del__": lambda _: None, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(names))


def _is_python(kind: type) -> bool:
    try:
        object.__new__(_without_end(kind))
    except TypeError:
        return False
    return True


def _attributes(value: Any) -> dict[str, Any]:
    """Collect what an object has: its own, its slots, and random generators that its class holds."""
    kinds = reversed(type(value).__mro__)
    of_classes = {
        name: getattr(value, name)
        for kind in kinds
        for name, each in vars(kind).items()
        if isinstance(each, _GENERATORS) or (isinstance(each, types.MemberDescriptorType) and hasattr(value, name))
    }
    return of_classes | getattr(value, "__dict__", {})
