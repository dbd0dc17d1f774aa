"""Copies of a module to compute on, so that nothing that scoring does can reach the module itself."""

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

T = TypeVar("T")

_ATOMS = {type(None), bool, int, float, complex, str, bytes, range, torch.device, torch.dtype, torch.Size}
_CONTAINERS = {list, dict, set, tuple, OrderedDict}
_CACHED = type(lru_cache(lambda: None))
_MOST_ENTRIES = 1000
"""Entries of a container in which a function's parts of the module are looked for; records in more are shared."""

_SHARED = (Dataset, DataLoader)
_SHARED_PACKAGES = ("lightning", "pytorch_lightning")
"""Kinds of attributes that the copy has, too: data, which may be large, and parts of Lightning, such as a Trainer."""


class Replica:
    """A copy of a module: its own parameters, buffers, submodules, hooks and plain attributes.

    Whatever is the same object under two names (tied weights, aliases of layers, states that metrics share) is one
    object in the copy, too. Bound methods, hooks, functions and weak references that hold parts of the module hold
    those of the copy. Functions that ``torch.compile`` made are replaced by what they were made from. What cannot be
    copied, such as an open file, is shared with the original, and so are data sets and the records of a long list; an
    iterator that cannot be copied must not be used.

    Args:
        module: The module; it is only read.
        tensor: Returns what stands for a parameter or buffer, given its name (the first one, if it has several) and
            itself.
        known: ``id`` of an object to what stands for it, wherever attributes refer to it.

    Attributes:
        module: The copy.

    Example:
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
        self._temporary: list[Any] = []  # objects whose `id` stands in the memo and must not be used again
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            self._memo[id(value)] = tensor(name, value)
        originals = [each for each in module.modules() if id(each) not in self._memo]
        for each in originals:
            if id(each) not in self._memo:
                self._memo[id(each)] = self._shell(each)
        for each in originals:
            self._filled(each, self._memo[id(each)])
        for parameter in module.parameters():
            if parameter._backward_hooks:
                self._memo[id(parameter)]._backward_hooks = self.of(parameter._backward_hooks)
        self._is_complete = True
        self.module: nn.Module = self._memo[id(module)]

    def of(self, value: Any) -> Any:
        """Return the copy's counterpart of a value: an attribute, or a function that refers to the module.

        Args:
            value: Anything.

        """
        kind = type(value)
        if kind is int and value in self._memo:  # the `id` of a parameter, a key to what is kept of it
            return id(self._memo[value])
        if kind in _ATOMS:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if kind in _CONTAINERS:
            return self._container(value)
        try:
            return self._of_kind(value)
        except Exception:  # whatever stands against a copy
            return self._noted(value, _Uncopied(value) if _is_used_up(value) else value)

    def _of_kind(self, value: Any) -> Any:
        """Copy an object that is no container."""
        kind = type(value)
        if kind in weakref.ProxyTypes:
            return self._noted(value, weakref.proxy(self.of(value.__reduce_ex__.__self__)))
        if (plain := _uncompiled(value)) is not value:
            return self.of(plain)
        if kind is object or self._is_shared(value):  # a bare object says something by being this very one
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
            keywords = {name: self.of(each) for name, each in value.keywords.items()}
            return partial(self.of(value.func), *map(self.of, value.args), **keywords)
        if kind is _CACHED:
            return self._noted(value, lru_cache(**value.cache_parameters())(self.of(value.__wrapped__)))
        if kind is weakref.ref:
            return self._noted(value, weakref.ref(self.of(value())))
        if kind in (weakref.WeakKeyDictionary, weakref.WeakValueDictionary):
            return self._noted(value, kind({self.of(key): self.of(each) for key, each in value.items()}))
        if kind is weakref.WeakSet:
            return self._noted(value, kind(map(self.of, value)))
        return self._rebuilt(value)

    def _rebuilt(self, value: Any) -> Any:
        """Copy an object as ``copy.deepcopy`` does, but what it holds as :meth:`of` does."""
        if hasattr(value, "__deepcopy__"):
            return self._noted(value, value.__deepcopy__(self._memo))
        reduce = copyreg.dispatch_table.get(type(value))
        reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(reduced, str):
            return value
        make, arguments, state, *entries = (*reduced, None, None, None)[:5]
        items, pairs = (list(each or ()) for each in entries)
        self._temporary.append((reduced, items, pairs))
        twin = self._noted(value, make(*map(self.of, arguments)))
        if state is not None:
            _set_state(twin, self.of(state))
        for each in self._entries(items):
            twin.append(each)
        for key, each in pairs:
            twin[self.of(key)] = self.of(each)
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
        self._memo.update({id(each): twins[name] for name, each in module.named_modules()})
        return twin

    def _noted(self, original: object, twin: T) -> T:
        self._memo[id(original)] = twin
        return twin

    def _container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return self._noted(value, tuple(map(self.of, value)))
        twin = self._noted(value, type(value)())
        if isinstance(value, dict):
            twin.update((self.of(key), self.of(each)) for key, each in value.items())
        else:
            (twin.extend if isinstance(value, list) else twin.update)(self._entries(value))
        return twin

    def _entries(self, entries: Collection[Any]) -> Iterator[Any]:
        """Copy entries; records in a long list, such as a replay buffer's, are shared, or it would take seconds."""
        is_long = len(entries) > _MOST_ENTRIES
        return (each if is_long and self._is_record(each) else self.of(each) for each in entries)

    def _is_record(self, value: Any) -> bool:
        return isinstance(value, tuple) and all(
            type(each) in _ATOMS
            or type(each).__module__ == "numpy"
            or (type(each) is Tensor and each.grad_fn is None and id(each) not in self._memo)
            for each in value
        )

    def _function(self, function: types.FunctionType) -> Any:
        """Let a function that holds parts of the module in its closure or its defaults hold those of the copy."""
        if not any(map(self._is_ours, _held_by(function))):
            return function
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        self._noted(function, twin)  # before what it holds, which may be itself
        for new, old in zip(cells, function.__closure__ or (), strict=True):
            if _is_filled(old):
                new.cell_contents = self._held(old.cell_contents)
        twin.__defaults__ = function.__defaults__ and tuple(map(self._held, function.__defaults__))
        keywords = function.__kwdefaults__
        twin.__kwdefaults__ = keywords and {name: self._held(value) for name, value in keywords.items()}
        vars(twin).update({name: self._held(value) for name, value in vars(function).items()})
        return twin

    def _held(self, value: Any) -> Any:
        return self.of(value) if self._is_ours(value) else value

    def _is_ours(self, value: Any, above: tuple[int, ...] = ()) -> bool:
        """Whether a function that holds this must hold something else in the copy."""
        if id(value) in self._memo:
            return self._memo[id(value)] is not value
        if id(value) in above:
            return False
        if isinstance(value, types.MethodType):
            held: tuple[Any, ...] = (value.__self__,)
        elif type(value) is types.FunctionType:
            held = _held_by(value)
        elif type(value) is partial:
            held = (value.func, *value.args, *value.keywords.values())
        elif not self._is_complete:  # what hooks write to; a `loss_fn` of the user's may go on collecting
            return not (type(value) in _ATOMS or isinstance(value, (type, types.ModuleType)) or self._is_shared(value))
        elif type(value) in _CONTAINERS:
            held = tuple(value.values() if isinstance(value, dict) else value)[:_MOST_ENTRIES]
        else:
            return False
        return any(self._is_ours(each, (*above, id(value))) for each in held)


class _Uncopied:
    """Stands for an iterator that cannot be copied: what scoring takes from it, training would miss."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._kind = type(iterator).__name__

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        raise ValueError(
            f"The loss takes from an iterator that the module keeps (a {self._kind}), which cannot be copied, so"
            " training would miss what scoring takes. Give `loss_fn`, a function that returns the loss without it."
        )


def _is_used_up(value: object) -> bool:
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)


def _set_state(twin: Any, state: Any) -> None:
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    vars(twin).update(attributes or {})
    for name, each in (slots or {}).items():
        object.__setattr__(twin, name, each)


def _is_shared_kind(kind: type) -> bool:
    if issubclass(kind, (nn.Module, dict)):
        return False
    bases = {base.__module__.partition(".")[0] for base in kind.__mro__}
    return issubclass(kind, _SHARED) or not bases.isdisjoint(_SHARED_PACKAGES)


def _uncompiled(value: Any) -> Any:
    """Return what ``torch.compile`` made a function from, or the value itself."""
    return getattr(value, "__dict__", {}).get("_torchdynamo_orig_callable", value)


def _held_by(function: types.FunctionType) -> tuple[Any, ...]:
    """Return what a function holds in its closure and in its defaults."""
    cells = (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    return (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
