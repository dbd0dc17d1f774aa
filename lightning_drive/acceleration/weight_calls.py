"""See the calls of torch that compute with certain weights, whichever module makes them."""

import functools
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lightning_drive.acceleration.operations import KINDS, TYPES, Operation
from lightning_drive.core import function_modes
from lightning_drive.core.function_modes import FunctionMode

_FUNCTIONS = frozenset(KINDS.values())
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CALLERS = frozenset({F.multi_head_attention_forward})
"""Functions of torch that call those, and would run as a whole without the mode."""


class Call(NamedTuple):
    """A call of a linear layer or convolution."""

    function: Any
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...]
    """Stride, padding, dilation and groups, as far as they are given."""

    @classmethod
    def of(cls, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call | None":
        """Return the call with these arguments; ``None`` if they are not what is expected."""
        given = dict(zip(_NAMES, args, strict=False)) | kwargs
        settings = tuple(given.pop(name, default) for name, default in zip(_NAMES[3:], (1, 0, 1, 1), strict=True))
        if len(args) > len(_NAMES) or not {"input", "weight"} <= given.keys() <= {"input", "weight", "bias"}:
            return None
        plain = tuple(tuple(setting) if isinstance(setting, list) else setting for setting in settings)
        return cls(function, given["input"], given["weight"], given.get("bias"), plain)

    @property
    def operation(self) -> Operation | None:
        """The operation; ``None`` if it has no sparse form."""
        return _operation(self.function, tuple(self.weight.shape), self.settings)

    @property
    def obstacle(self) -> str:
        """The reason why it must be computed as torch does it; empty if there is none."""
        obstacle = _surroundings()
        if obstacle:
            return obstacle
        for tensor in (self.input, self.weight) if self.bias is None else (self.input, self.weight, self.bias):
            if obstacle := obstacle_of(tensor):
                return obstacle
            if tensor.dtype != self.weight.dtype:
                return f"it computes with {tensor.dtype} and {self.weight.dtype} at once"
        if self.operation is None:
            return "there is no sparse form for its settings (groups, say)"
        channel_dim = -1 - len(self.operation.stride)
        dims = self.input.ndim
        is_odd = self.weight.ndim - dims not in (0, 1) if self.operation.stride else dims == 0
        if is_odd or self.input.shape[channel_dim] != self.weight.shape[1] or not self.input.numel():
            return "its input is empty or has an unexpected shape"
        if self.bias is not None and tuple(self.bias.shape) != (self.weight.shape[0],):
            return "its bias has an unexpected shape"
        return ""

    def dense(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what torch computes with other tensors and the same settings."""
        settings = self.settings if self.function is not F.linear else ()
        result: Tensor = self.function(input, weight, bias, *settings)
        return result


class WeightCalls(FunctionMode):
    """A mode that hands the calls with certain weights to :meth:`compute`, in backward passes, too."""

    def __init__(self, weights: Mapping[int, Any]) -> None:
        super().__init__()
        self._weights = weights
        """What is known of each weight, by its id."""

    def compute(self, known: Any, call: Call) -> Tensor:
        """Return the result of a call with a weight, of which ``known`` is known."""
        raise NotImplementedError

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch, or compute what it would."""
        if func in _FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            known = self._weights.get(id(weight))
            if known is not None and (call := Call.of(func, args, kwargs)) is not None:
                return self.compute(known, call)
        elif func in function_modes.BACKWARD:
            with function_modes.on_again(self):
                return function_modes.run_backward(func, args, kwargs)
        elif func in _CALLERS and not torch.compiler.is_compiling():
            with function_modes.on_again(self):
                return _within_modes(func)(*args, **kwargs)
        return func(*args, **kwargs)


def obstacle_of(tensor: Tensor) -> str:
    """Return the reason why a tensor cannot take part in a sparse form; empty if it can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_nested:
        return f"it is no plain tensor ({type(tensor).__name__})"
    if tensor.device.type != "cpu":
        where = "a GPU" if tensor.device.type in ("cuda", "mps", "xpu") else f"{tensor.device.type!r}"
        return f"not measured on {where}"
    return "" if tensor.dtype in TYPES else f"its numbers are of type {tensor.dtype}"


def _surroundings() -> str:
    """Return the reason why torch must compute as usual at this moment; empty if it need not."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "`torch.compile` compiles it"
    if torch.is_autocast_enabled("cpu"):
        return "mixed precision (autocast) computes with it in another type"
    if torch._C._are_functorch_transforms_active():
        return "a transform of `torch.func` computes with it"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation computes with it"
    return ""


@functools.lru_cache(1024)
def _operation(function: Any, shape: tuple[int, ...], settings: tuple[Any, ...]) -> Operation | None:
    with suppress(ValueError, TypeError):
        operation = Operation.of_call(function, shape, *settings)
        is_strided = operation is not None and any(stride != 1 for stride in operation.stride)
        return None if settings[1] == "same" and is_strided else operation
    return None


@functools.cache
def _within_modes(function: types.FunctionType) -> types.FunctionType:
    """Return a function of torch whose calls all reach the modes, since it does not hand itself over as a whole."""
    names = {**function.__globals__, "has_torch_function": lambda *_: False}
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
