"""A copy of a module to compute on, so that nothing that scoring does can reach the module itself.

Unlike :class:`lightning_drive.trainer.data_copies.Copier`, which pickles objects in memory with everything that they
hold, this one maps objects onto counterparts some of which are given, such as parameters in another precision, and
that bound methods, weak references and keys made of an ``id`` must lead to, too.
"""

import copy
import copyreg
import io
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_drive.network.held_objects import empty_copy, fill, held_by

T = TypeVar("T")

_ATOMS = {type(None), bool, int, float, complex, str, bytes, range, torch.device, torch.dtype, torch.Size}
_CONTAINERS = {list, dict, set, tuple, OrderedDict}
_CACHED = type(lru_cache(lambda: None))
_WEAK = {*weakref.ProxyTypes, weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary}
_MOST_ENTRIES = 1000
"""Entries of a container that are searched for parts of the module; records of longer ones are shared."""

_SHARED = (Dataset, DataLoader)
_SHARED_PACKAGES = ("lightning", "pytorch_lightning")
"""Classes, and packages of classes, whose objects are shared: large data, and parts of Lightning such as a Trainer."""


class Replica:
    """A copy of a module: its own parameters, buffers, submodules, hooks and plain attributes.

    An object with two names (tied weights, aliases of layers, states that metrics share) is one object in the copy,
    too. Bound methods, hooks, functions and weak references that hold parts of the module hold those of the copy.
    Functions that ``torch.compile`` made are replaced by the functions they were made from. Objects that cannot be
    copied, such as an open file, are shared with the original, and so are data sets and the records of a long list; an
    iterator that cannot be copied must not be used.

    The attribute ``module`` is the copy; the module that is given is only read. ``tensor`` returns the counterpart of a
    parameter or buffer, given its name (the first one, if it has several) and itself. ``known`` has counterparts of
    other objects, by the ``id`` of the object.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> net.alias = net[0]
        >>> twin = Replica(net, lambda name, value: value.detach().clone()).module
        >>> twin.alias is twin[0], twin[0] is net[0], bool((twin[0].weight == net[0].weight).all())
        (True, False, True)

    """

    def __init__(
        self, module: nn.Module, tensor: Callable[[str, Tensor], Tensor], known: Mapping[int, object] | None = None
    ) -> None:
        self._memo: dict[int, Any] = dict(known or {})
        self._is_complete = False
        self._shared_kinds: dict[type, bool] = {}
        self._temporary: list[Any] = []  # objects whose `id` stands in the memo, so it must not become another one's
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            self._memo[id(value)] = tensor(name, value)
        originals = [submodule for submodule in module.modules() if id(submodule) not in self._memo]
        for submodule in originals:
            if id(submodule) not in self._memo:  # else it lies within a scripted one
                self._memo[id(submodule)] = self._shell(submodule)
        for submodule in originals:
            self._filled(submodule, self._memo[id(submodule)])
        for parameter in module.parameters():
            if parameter._backward_hooks:
                self._memo[id(parameter)]._backward_hooks = self.of(parameter._backward_hooks)
        self._is_complete = True
        self.module: nn.Module = self._memo[id(module)]

    def of(self, value: Any) -> Any:
        """Return the copy's counterpart of any value, such as an attribute, or a function that refers to the module."""
        kind = type(value)
        if kind is int and value in self._memo:  # the `id` of a parameter, as a key
            return id(self._memo[value])
        if kind in _ATOMS:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if kind in _CONTAINERS:
            return self._container(value)
        try:
            return self._of_kind(value)
        except Exception:  # whatever prevents a copy
            return self._noted(value, _Uncopied(value) if _is_used_up(value) else value)

    def _of_kind(self, value: Any) -> Any:
        """Copy an object that is no container."""
        kind = type(value)
        if kind in _WEAK:  # before anything asks for attributes, which a proxy has of another object
            return self._noted(value, self._weak(value))
        if (plain := _uncompiled(value)) is not value:
            return self.of(plain)
        if kind is object or self._is_shared(value):  # a bare object is a mark by its identity
            return value
        if isinstance(value, (nn.Module, Optimizer)):
            return self._filled(value, self._noted(value, self._shell(value)))
        if kind is torch.Generator:
            return self._noted(value, value.clone_state())
        if isinstance(value, Tensor) and value.grad_fn is not None:
            return self._noted(value, value.detach().clone())
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self.of(value.__self__))
        if kind is types.BuiltinMethodType and not isinstance(value.__self__, (type, types.ModuleType, type(None))):
            return getattr(self.of(value.__self__), value.__name__)
        if kind is partial:
            keywords = {name: self.of(argument) for name, argument in value.keywords.items()}
            return partial(self.of(value.func), *map(self.of, value.args), **keywords)
        if kind is _CACHED:
            return self._noted(value, lru_cache(**value.cache_parameters())(self.of(value.__wrapped__)))
        return self._rebuilt(value)

    def _weak(self, value: Any) -> Any:
        """Copy a weak reference, or a container of some."""
        kind = type(value)
        if kind in weakref.ProxyTypes:
            return weakref.proxy(self.of(value.__reduce_ex__.__self__))
        if kind is weakref.ref:
            return weakref.ref(self.of(value()))
        if kind is weakref.WeakSet:
            return kind(map(self.of, value))
        return kind({self.of(key): self.of(entry) for key, entry in value.items()})

    def _rebuilt(self, value: Any) -> Any:
        """Copy an object as ``copy.deepcopy`` does, but the objects that it holds as :meth:`of` does."""
        if hasattr(value, "__deepcopy__"):
            return self._noted(value, value.__deepcopy__(self._memo))
        reduce = copyreg.dispatch_table.get(type(value))
        reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(reduced, str):
            return value
        make, arguments, state, *entries = (*reduced, None, None, None)[:5]
        items, pairs = (list(iterator or ()) for iterator in entries)
        self._temporary.append((reduced, items, pairs))
        twin = self._noted(value, make(*map(self.of, arguments)))
        if state is not None:
            _set_state(twin, self.of(state))
        for item in self._entries(items):
            twin.append(item)
        for key, entry in pairs:
            twin[self.of(key)] = self.of(entry)
        return twin

    def _is_shared(self, value: object) -> bool:
        kind = type(value)
        if kind not in self._shared_kinds:
            self._shared_kinds[kind] = _is_shared_kind(kind)
        return self._shared_kinds[kind]

    def _shell(self, module: Any) -> Any:
        if isinstance(module, torch.jit.ScriptModule):
            return self._script(module)
        return object.__new__(type(module))

    def _filled(self, module: Any, shell: Any) -> Any:
        if not isinstance(module, torch.jit.ScriptModule):
            vars(shell).update({name: self.of(value) for name, value in vars(module).items()})
            for name in copyreg._slotnames(type(module)):  # type: ignore[attr-defined]
                if hasattr(module, name):
                    object.__setattr__(shell, name, self.of(getattr(module, name)))
        return shell

    def _script(self, module: torch.jit.ScriptModule) -> nn.Module:
        """Copy a scripted module, whose tensors are not Python's."""
        twin: nn.Module = copy.deepcopy(module)
        twins = dict(twin.named_modules())
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            path, _, key = name.rpartition(".")
            setattr(twins[path], key, self._memo[id(value)])
        self._memo.update({id(part): twins[name] for name, part in module.named_modules()})
        return twin

    def _noted(self, original: object, twin: T) -> T:
        self._memo[id(original)] = twin
        return twin

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return self._noted(value, tuple(map(self.of, value)))
        twin = self._noted(value, type(value)())
        if isinstance(value, dict):
            twin.update((self.of(key), self.of(entry)) for key, entry in value.items())
        else:
            (twin.extend if isinstance(value, list) else twin.update)(self._entries(value))
        return twin

    def _entries(self, entries: Collection[Any]) -> Iterator[Any]:
        """Copy entries; records in a long list, such as a replay buffer's, are shared, or it would take seconds."""
        is_long = len(entries) > _MOST_ENTRIES
        return (entry if is_long and self._is_record(entry) else self.of(entry) for entry in entries)

    def _is_record(self, value: Any) -> bool:
        return isinstance(value, tuple) and all(
            type(field) in _ATOMS
            or type(field).__module__ == "numpy"
            or (type(field) is Tensor and field.grad_fn is None and id(field) not in self._memo)
            for field in value
        )

    def _function(self, function: types.FunctionType) -> Any:
        """Copy a function that holds parts of the module in its closure or its defaults; share any other one."""
        if not any(map(self._is_ours, held_by(function))):
            return function
        twin = self._noted(function, empty_copy(function))  # before the objects that it holds, which may be itself
        fill(twin, function, lambda value: self.of(value) if self._is_ours(value) else value)
        return twin

    def _is_ours(self, value: Any, above: tuple[int, ...] = ()) -> bool:
        """Whether a function that holds this value must hold another one in the copy."""
        if id(value) in self._memo:
            return self._memo[id(value)] is not value
        if id(value) in above:
            return False
        if isinstance(value, types.MethodType):
            held: tuple[Any, ...] = (value.__self__,)
        elif type(value) is types.FunctionType:
            held = held_by(value)
        elif type(value) is partial:
            held = (value.func, *value.args, *value.keywords.values())
        elif not self._is_complete:  # hooks write to it; a `loss_fn` of the user's may go on collecting
            return not (type(value) in _ATOMS or isinstance(value, (type, types.ModuleType)) or self._is_shared(value))
        elif type(value) in _CONTAINERS:
            held = tuple(value.values() if isinstance(value, dict) else value)[:_MOST_ENTRIES]
        else:
            return False
        return any(self._is_ours(part, (*above, id(value))) for part in held)


class _Uncopied:
    """Stands for an iterator that cannot be copied: training would miss the values that scoring takes from it."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._kind = type(iterator).__name__

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise ValueError(
            f"The loss takes from an iterator that the module keeps (a {self._kind}), which cannot be copied, so"
            " training would miss what scoring takes. Pass `loss_fn`, a function that returns the loss without it."
        )


def _is_used_up(value: object) -> bool:
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)


def _set_state(twin: Any, state: Any) -> None:
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    vars(twin).update(attributes or {})
    for name, value in (slots or {}).items():
        object.__setattr__(twin, name, value)


def _is_shared_kind(kind: type) -> bool:
    if issubclass(kind, (nn.Module, dict)):
        return False
    bases = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return issubclass(kind, _SHARED) or not bases.isdisjoint(_SHARED_PACKAGES)


def _uncompiled(value: Any) -> Any:
    """Return the function that ``torch.compile`` made another one from, or the value itself."""
    return getattr(value, "__dict__", {}).get("_torchdynamo_orig_callable", value)
