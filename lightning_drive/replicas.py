"""Copies of a module to compute on, so that nothing that scoring does can reach the module itself."""

import copy
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")

_CONTAINERS = (list, dict, set, tuple)
_MOST_ENTRIES = 1000
"""Entries of a container in which a function's parts of the module are looked for."""

_SHARED = (Dataset, DataLoader)
_SHARED_PACKAGES = ("lightning", "pytorch_lightning")
"""Kinds of attributes that the copy has, too: data, which may be large, and parts of Lightning, such as a Trainer."""


class Replica:
    """A copy of a module: its own parameters, buffers, submodules, hooks and plain attributes.

    Whatever is the same object under two names (tied weights, aliases of layers, states that metrics share) is one
    object in the copy, too. Bound methods, hooks and functions that hold parts of the module hold those of the copy.
    Functions that ``torch.compile`` made are replaced by what they were made from. Attributes that cannot be copied,
    such as open files, are shared with the original.

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
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            self._memo[id(value)] = tensor(name, value)
        originals = [each for each in module.modules() if id(each) not in self._memo]
        for each in originals:
            if id(each) not in self._memo:
                self._memo[id(each)] = self._shell(each)
        for each in originals:
            if not isinstance(each, torch.jit.ScriptModule):
                shell = self._memo[id(each)]
                vars(shell).update({name: self.of(value) for name, value in vars(each).items()})
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
        if id(value) in self._memo:
            return self._memo[id(value)]
        value = _uncompiled(value)
        kind = type(value)
        if kind is object or _is_shared(value):  # a bare object says something by being this very one
            return value
        if isinstance(value, torch.Generator):
            return self._noted(value, value.clone_state())
        if isinstance(value, Tensor) and value.grad_fn is not None:
            return self._noted(value, value.detach().clone())
        if kind in _CONTAINERS or kind.__name__ == "OrderedDict":
            return self._container(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self.of(value.__self__))
        if kind is partial:
            keywords = {name: self.of(each) for name, each in value.keywords.items()}
            return partial(self.of(value.func), *map(self.of, value.args), **keywords)
        return self._deepcopy(value)

    def _shell(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._script(module)
        shell: nn.Module = object.__new__(type(module))
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
            (twin.extend if isinstance(value, list) else twin.update)(map(self.of, value))
        return twin

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
        twin.__kwdefaults__ = function.__kwdefaults__
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
        elif type(value) in _CONTAINERS:
            if not self._is_complete:  # what hooks collect; a `loss_fn` of the user's may go on collecting
                return True
            held = tuple(value.values() if isinstance(value, dict) else value)[:_MOST_ENTRIES]
        else:
            return False
        return any(self._is_ours(each, (*above, id(value))) for each in held)

    def _deepcopy(self, value: Any) -> Any:
        before = len(self._memo)
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:  # whatever stands against a copy: the original is shared
            while len(self._memo) > before:
                self._memo.popitem()
            return self._noted(value, value)


def _is_shared(value: object) -> bool:
    if isinstance(value, (nn.Module, dict)):
        return False
    bases = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return isinstance(value, _SHARED) or not bases.isdisjoint(_SHARED_PACKAGES)


def _uncompiled(value: Any) -> Any:
    """Return what ``torch.compile`` made a function from, or the value itself."""
    return getattr(value, "__dict__", {}).get("_torchdynamo_orig_callable", value)


def _held_by(function: types.FunctionType) -> tuple[Any, ...]:
    """Return what a function holds in its closure and in its defaults."""
    cells = (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
    return (*cells, *(function.__defaults__ or ()))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
