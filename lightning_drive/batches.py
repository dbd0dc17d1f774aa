"""Training batches for scoring, read from copies, so that what knows its place in the data is never moved on."""

import copy
import io
import math
import pickle
import queue
import random
import socket
import subprocess
import threading
import types
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import islice
from multiprocessing import connection, queues, sharedctypes
from typing import Any

import lightning.pytorch as pl
import numpy as np
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
        name = " and ".join(dict.fromkeys(map(_name_of_data, live.flattened)))
        copier = _Copier(name)
        for loader in live.flattened:
            _check_no_iterator(loader)
            if getattr(loader, "num_workers", 0) > 0:
                copier.share_parts_of_workers(loader)
        self.loader = CombinedLoader(live.iterables, live._mode)
        self.loader.flattened = copier.copy(live.flattened)
        self.loader.limits = live.limits
        self.has_unusable = copier.has_unusable
        self._files = copier.files

    def close(self) -> None:
        self.loader.reset()
        for file in self._files:
            file.close()


def _name_of_data(loader: Any) -> str:
    dataset = getattr(loader, "dataset", None)
    return type(loader if dataset is None else dataset).__name__


def _check_no_iterator(loader: Any) -> None:
    in_worker = getattr(loader, "num_workers", 0) > 0
    if isinstance(loader, Iterator) or (isinstance(getattr(loader, "dataset", None), Iterator) and not in_worker):
        raise MisconfigurationException(
            f"The training data ({_name_of_data(loader)}) is an iterator: {_LOST}. Let its `__iter__` return a new"
            f" iterator each time, {_OR_WORKER}"
        )


_LOST = "batches read to score weights would be lost to training"
_OR_WORKER = "or read it in a worker (`num_workers=1`), which has a copy of its own."
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
_SHARED = (pl.Trainer, pl.Callback, Enum)
_NOT_COPIED = ("threading", "multiprocessing", "concurrent", "asyncio", "logging", "weakref", "pathlib")


class _Unusable:
    """Stands for what cannot be copied: replacing it is fine, but using it raises an error."""

    def __init__(self, message: str) -> None:
        vars(self)["message"] = message

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise MisconfigurationException(vars(self)["message"])

    __getattr__ = __setattr__ = __iter__ = __next__ = __call__ = __getitem__ = __enter__ = _refuse


class _Attribute:
    """An attribute's value on its way through a :class:`_Copier`, with the name to blame."""

    def __init__(self, place: str, value: Any) -> None:
        self.place, self.value = place, value


class _Copier(pickle.Pickler):
    """Copies objects by pickling them in memory, with everything that is not copied handed over as it is.

    New are the objects that Python code defines, whatever they say about pickling, their containers, closures, random
    generators, small arrays and open files. Large data, networks, locks and what is not written in Python are shared.
    """

    def __init__(self, data: str) -> None:
        self._data = data  # class of the data, for messages
        self._in_workers = self.has_unusable = False
        self.files: list[Any] = []
        self._places: dict[int, int] = {}  # id of an original to the place of what stands for it
        self._twins: list[Any] = []
        self._originals: list[Any] = []  # which keeps their ids their own
        self._tensors: dict[int, Any] = {}  # what `copy.deepcopy` knows, such as memory that several share
        self._attribute = "an attribute"

    def copy(self, value: Any) -> Any:
        """Copy what may move when batches are read.

        Args:
            value: Loaders, or a part of them.

        """
        buffer = io.BytesIO()
        super().__init__(buffer, protocol=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of iterators of itertools
            self.dump(value)
        buffer.seek(0)
        reader = pickle.Unpickler(buffer)
        reader.persistent_load = self._twins.__getitem__  # type: ignore[method-assign]
        return reader.load()

    def share_parts_of_workers(self, loader: Any) -> None:
        """Copy what worker processes run, each of which has its own copy of what cannot be copied here.

        Args:
            loader: A loader with workers.

        """
        self._in_workers = True
        for name in ("dataset", "collate_fn", "worker_init_fn"):
            part = getattr(loader, name, None)
            self._hand_over(part, self.copy(part))
        self._in_workers = False

    def _hand_over(self, value: Any, twin: Any) -> Any:
        """Let something stand for a value, and return how to pickle that."""
        self._places[id(value)] = len(self._twins)
        self._twins.append(twin)
        self._originals.append(value)
        return _same, (value,)

    def persistent_id(self, value: Any) -> int | None:
        """Return the place of what stands for a value, which is then not pickled."""
        if type(value) in _CONTAINERS and id(value) not in self._places and _is_data(value):
            self._hand_over(value, copy.copy(value))
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
        return _Unusable, (
            f"The training data ({self._data}) goes on in {self._attribute} ({type(value).__name__}), which cannot be"
            f" copied: {_LOST}. Let its `__iter__` make a new one each time, {_OR_WORKER}",
        )

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
        if _is_network(value) or isinstance(value, _SHARED) or (self._in_workers and hasattr(kind, "__del__")):
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
    return len(container) > _MANY or _nbytes(container) > _LARGE


def _nbytes(value: Any, depth: int = 4) -> int:
    """Count the bytes of arrays, also of those in containers."""
    if type(value) in _CONTAINERS and depth > 0 and len(value) <= _MANY:
        return sum(_nbytes(each, depth - 1) for each in (value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, (Tensor, np.ndarray)) else 0


def _without_end(kind: type) -> type:
    """Return the class of a copy, whose end must not close or delete what is shared."""
    if not isinstance(getattr(kind, "__del__", None), types.FunctionType):
        return kind
    names = {"__del__": lambda _: None, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(names))


def _is_network(value: Any) -> bool:
    """Whether this is a network; a LightningModule may be what the data are made by, and gets its own counters."""
    is_other = isinstance(value, nn.Module) and not isinstance(value, pl.LightningModule)
    return is_other and next(value.parameters(), None) is not None


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
