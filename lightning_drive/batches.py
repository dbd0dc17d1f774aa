"""Training batches for scoring, read from copies, so that what knows its place in the data is never moved on."""

import copy
import io
import math
import queue
import random
import socket
import subprocess
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from itertools import islice
from multiprocessing import connection, queues, sharedctypes
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data.dataloader import _BaseDataLoaderIter

from lightning_drive import undisturbed


class TrainingBatches:
    """The training batches, ready for the device, from copies of the loaders.

    Nothing that training reads from is touched: not its live iterator, and no position, counter or random generator
    of a loader, sampler or dataset. So there is nothing to put back, and a checkpoint that is saved in between has the
    true places. Every pass goes in the loader's own order and under ``limit_train_batches``; both transfer hooks of
    the module run. Reading them raises what :func:`check_data` does.

    Args:
        trainer: A Trainer in the middle of ``fit``.
        pl_module: Its module.

    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._source: _Source | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._source is None:
            self._source = _Source(_live(self._trainer))
        length = self._trainer.num_training_batches  # the loop, not the loader, counts up to `limit_train_batches`
        for batch, _, _ in islice(iter(self._source.loader), int(length) if math.isfinite(length) else None):
            yield self._transferred(batch)

    def _transferred(self, batch: Any) -> Any:
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = self._pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    @contextmanager
    def opened(self) -> Generator["TrainingBatches"]:
        """Stop workers and close files at the end."""
        try:
            yield self
        finally:
            if self._source is not None:
                self._source.close()


def check_data(trainer: pl.Trainer) -> None:
    """Raise if the training data cannot be read a second time.

    Args:
        trainer: A Trainer in the middle of ``fit``, after ``on_train_start``.

    Raises:
        MisconfigurationException: If it is a stream.

    """
    source = _Source(_live(trainer))
    try:
        if source.has_unusable:  # whether it is in the way only reading tells
            with undisturbed.preserved_rng():
                next(iter(source.loader), None)
    finally:
        source.close()


def _live(trainer: pl.Trainer) -> CombinedLoader:
    """Give the loader that training itself reads; there is one from `on_train_start` on."""
    live = trainer.fit_loop._combined_loader
    assert live is not None
    return live


class _Source:
    """A combined loader that can be iterated without moving the one it is a copy of."""

    def __init__(self, live: CombinedLoader) -> None:
        copies = _Copies()
        self.loader = CombinedLoader(live.iterables, live._mode)
        self.loader.flattened = [_independent(part, copies) for part in live.flattened]
        self.loader.limits = live.limits
        self.has_unusable = copies.has_unusable
        self._files = copies.files

    def close(self) -> None:
        self.loader.reset()
        for file in self._files:
            file.close()


def _independent(loader: Any, copies: "_Copies") -> Any:
    dataset = getattr(loader, "dataset", None)
    in_workers = getattr(loader, "num_workers", 0) > 0
    copies.data = type(loader if dataset is None else dataset).__name__
    if isinstance(loader, Iterator) or (isinstance(dataset, Iterator) and not in_workers):
        raise MisconfigurationException(
            f"The training data ({copies.data}) is an iterator: {_LOST}. Let its `__iter__` return a new iterator each"
            f" time, {_OR_WORKER}"
        )
    if in_workers:  # which get a copy each of what they run
        copies.in_workers = True
        for name in ("dataset", "collate_fn", "worker_init_fn"):
            copies.of(getattr(loader, name, None))
        copies.in_workers = False
    return copies.of(loader)


_LOST = "batches read to score weights would be lost to training"
_OR_WORKER = "or read it in a worker (`num_workers=1`), which has a copy of its own."
_LARGE = 2**26  # bytes of an array that is taken for data, not for an order or a place in it
_MANY = 10_000  # entries of a container that are taken for data, too
_DEEP = 60
_ATOMS = (int, float, complex, bool, str, bytes, type(None), type, types.ModuleType, Enum, range, torch.dtype)
_STREAMS = (
    types.GeneratorType,
    types.CoroutineType,
    types.AsyncGeneratorType,
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
_SHARED = ("threading", "multiprocessing", "concurrent", "asyncio", "logging", "weakref", "pathlib")


class _Unusable:
    """Stands for what cannot be copied: replacing it is fine, but using it is refused."""

    def __init__(self, message: str) -> None:
        vars(self)["message"] = message

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise MisconfigurationException(vars(self)["message"])

    __getattr__ = __setattr__ = __iter__ = __next__ = __call__ = __getitem__ = __enter__ = _refuse


class _Copies:
    """Copies of objects with all that moves when batches are read from them.

    New are the objects that Python code defines, their containers, random generators, small arrays and open files.
    Large data, networks, locks and what is not written in Python are shared with the original. One object has one
    copy, so that what is the same in the original is the same in the copy.
    """

    def __init__(self) -> None:
        self.data = ""  # class of the data, for messages
        self.in_workers = False
        self.has_unusable = False
        self.files: list[Any] = []
        self._memo: dict[int, tuple[Any, Any]] = {}  # the original is kept, so that its id stays its own
        self._tensors: dict[int, Any] = {}
        self._place = ""
        self._depth = self._bytes = self._containers = 0

    def of(self, value: Any) -> Any:
        """Copy an object, or return itself where it can be shared.

        Args:
            value: The object.

        """
        if isinstance(value, _ATOMS) or self._depth > _DEEP:
            return value
        if id(value) not in self._memo:
            self._depth += 1
            try:
                self._remember(value, self._copied(value))
            finally:
                self._depth -= 1
        return self._memo[id(value)][1]

    def _remember(self, value: Any, copied: Any) -> Any:
        self._memo[id(value)] = value, copied
        return copied

    def _copied(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, _STREAMS):
            return self._unusable(value)
        if isinstance(value, io.IOBase):
            return self._file(value)
        if isinstance(value, torch.Generator):
            return _generator(value)
        if isinstance(value, random.Random) or kind.__module__.startswith("numpy.random"):
            return value if any(value is shared for shared in _global_generators()) else copy.deepcopy(value)
        if isinstance(value, Tensor) or (kind.__module__, kind.__name__) == ("numpy", "ndarray"):
            return self._array(value)
        if isinstance(value, sharedctypes.SynchronizedBase):
            return sharedctypes.synchronized(sharedctypes.copy(value.get_obj()), value.get_lock())
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, types.BuiltinMethodType):
            owner = self.of(value.__self__)
            return value if owner is value.__self__ else getattr(owner, value.__name__)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, partial):
            return kind(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        if isinstance(value, (list, dict, set, tuple, deque)):
            return self._container(value)
        if isinstance(value, Iterator) and kind.__module__ in ("builtins", "itertools"):
            return self._iterator(value)
        return self._object(value)

    def _unusable(self, value: Any) -> Any:
        if self.in_workers:
            return value
        self.has_unusable = True
        return _Unusable(
            f"The training data ({self.data}) goes on in {self._place} ({type(value).__name__}), which cannot be"
            f" copied: {_LOST}. Let its `__iter__` make a new one each time, {_OR_WORKER}"
        )

    def _file(self, file: Any) -> Any:
        if self.in_workers or file.closed or not file.readable():
            return file
        if isinstance(file, (io.BytesIO, io.StringIO)):
            return copy.copy(file)
        name, mode = getattr(file, "name", None), getattr(file, "mode", None)
        if not (isinstance(name, str) and isinstance(mode, str) and mode.startswith("r") and file.seekable()):
            return self._unusable(file)
        try:
            place = file.tell()
            reopened = open(name, mode, **_encoding(file))  # noqa: PTH123, SIM115
        except OSError:  # in the middle of a loop over lines, or no longer there
            return self._unusable(file)
        self.files.append(reopened)
        reopened.seek(place)
        return reopened

    def _array(self, value: Any) -> Any:
        """Copy an array that may be a place or an order; the sum of those within containers is limited, too."""
        if isinstance(value, Tensor):
            if type(value) is not Tensor or value.requires_grad or value.layout != torch.strided:
                return value
            nbytes = value.untyped_storage().nbytes()
        else:
            nbytes = value.nbytes
        if self._containers:
            self._bytes += nbytes
        if nbytes > _LARGE or (self._containers and self._bytes > _LARGE):
            return value
        if not isinstance(value, Tensor):
            return value.copy()
        copied = copy.deepcopy(value, self._tensors)
        shared = not value.is_cuda and value.is_shared()  # type: ignore[no-untyped-call]
        return copied.share_memory_() if shared else copied  # type: ignore[no-untyped-call]

    def _function(self, function: types.FunctionType) -> Any:
        """Copy a function that holds on to objects, with those."""
        closure = function.__closure__ or ()
        if self.in_workers or not (closure or function.__defaults__ or function.__kwdefaults__):
            return function
        own = [cell for cell in closure if id(cell) not in self._memo]  # others were copied with another function
        cells = tuple(self._memo[id(cell)][1] if id(cell) in self._memo else self._cell(cell) for cell in closure)
        copied = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        self._remember(function, copied)
        for cell in own:
            with suppress(ValueError):  # an empty one
                self._memo[id(cell)][1].cell_contents = self.of(cell.cell_contents)
        copied.__defaults__, copied.__kwdefaults__ = self.of(function.__defaults__), self.of(function.__kwdefaults__)
        copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
        vars(copied).update(vars(function))
        return copied

    def _cell(self, cell: types.CellType) -> Any:
        return self._remember(cell, types.CellType())

    def _container(self, value: Any) -> Any:
        """Copy a container; the entries of a long one, or one whose class is not Python's own, are shared."""
        kind = type(value)
        if isinstance(value, tuple):
            entries = self._entries(value) if len(value) <= _MANY else list(value)
            return value if all(map(_is, entries, value)) else tuple.__new__(kind, entries)
        copied = self._remember(value, copy.copy(value))
        if len(value) > _MANY:
            return copied
        if isinstance(value, dict):
            for key, entry in zip(list(value), self._entries(list(value.values())), strict=True):
                dict.__setitem__(copied, key, entry)
        elif not isinstance(value, set):
            for index, entry in enumerate(self._entries(value)):
                copied[index] = entry
        for name, attribute in getattr(value, "__dict__", {}).items():
            self._put(copied, name, self.of(attribute))
        return copied

    def _entries(self, values: Any) -> list[Any]:
        self._containers += 1
        try:
            return [self.of(entry) for entry in values]
        finally:
            self._containers -= 1

    def _iterator(self, value: Any) -> Any:
        """Copy one of Python's own iterators with what it goes over."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # itertools, from Python 3.12 on
                make, arguments, *states = value.__reduce__()
        except (TypeError, AttributeError):
            return self._unusable(value)
        arguments = [self.of(argument) for argument in arguments]
        if any(isinstance(argument, _Unusable) for argument in arguments):
            return self._unusable(value)
        copied = make(*arguments)
        for state in states:
            if state is not None:
                copied.__setstate__(self.of(state))
        return copied

    def _object(self, value: Any) -> Any:
        kind = type(value)
        opaque = self._unusable if isinstance(value, Iterator) else _same
        if kind.__module__.partition(".")[0] in _SHARED:
            return opaque(value)
        if isinstance(value, (pl.LightningModule, pl.Trainer, pl.Callback)):
            return value
        if self.in_workers and hasattr(kind, "__del__"):
            return value
        if isinstance(value, nn.Module) and next(value.parameters(), None) is not None:  # a network, no data
            return value
        attributes = _attributes(value)
        if not attributes:
            return opaque(value)
        try:
            copied: Any = object.__new__(self._class_of(value))
        except TypeError:  # not written in Python
            return opaque(value)
        self._remember(value, copied)
        for name, attribute in attributes.items():
            if name == "_iterator" and isinstance(attribute, _BaseDataLoaderIter):  # the live one of persistent workers
                self._put(copied, name, None)
                continue
            place, self._place = self._place, f"`{kind.__name__}.{name}`"
            self._put(copied, name, self.of(attribute))
            self._place = place
        return copied

    def _class_of(self, value: Any) -> type:
        """Give the class of a copy, whose end must not close or delete what is shared."""
        kind = type(value)
        if not hasattr(kind, "__del__"):
            return kind
        names = {"__del__": _nothing, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(names))

    def _put(self, copied: Any, name: str, value: Any) -> None:
        if hasattr(copied, "__dict__"):
            copied.__dict__[name] = value
        else:
            object.__setattr__(copied, name, value)


def _nothing(_: Any) -> None:
    pass


def _same(value: Any) -> Any:
    return value


def _is(first: Any, second: Any) -> bool:
    return first is second


def _generator(value: torch.Generator) -> torch.Generator:
    if value is torch.default_generator or value in torch.cuda.default_generators:
        return value  # which the caller puts back
    copied = torch.Generator(value.device)
    copied.set_state(value.get_state())
    return copied


def _global_generators() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    own = getattr(random, "_inst", None)
    return (own, numpy.random.mtrand._rand) if numpy else (own,)


def _encoding(file: Any) -> dict[str, Any]:
    return {"encoding": file.encoding, "errors": file.errors} if isinstance(file, io.TextIOBase) else {}


def _attributes(value: Any) -> dict[str, Any]:
    """Collect what an object has: its own, its slots, and random generators and containers that its class holds."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] in ("builtins", "torch", "typing", "abc"):
            continue
        for name, attribute in vars(kind).items():
            moves = isinstance(attribute, (torch.Generator, random.Random, list, dict, set, deque, Iterator))
            if (moves or type(attribute).__module__.startswith("numpy.random")) and not name.startswith("__"):
                found.setdefault(name, attribute)
            elif isinstance(attribute, types.MemberDescriptorType) and hasattr(value, name):
                found[name] = getattr(value, name)
    return found | getattr(value, "__dict__", {})
