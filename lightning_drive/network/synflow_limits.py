"""Which layers break synaptic flow: functions that are known to, and whatever does not grow with its input."""

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_drive.core.function_modes import FunctionMode

WITHOUT_FLOW = {
    *("relu6", "hardtanh", "hardtanh_", "hardsigmoid", "tanh", "tanh_", "sigmoid", "sigmoid_", "softsign"),
    *("lstm", "gru", "rnn_tanh", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"),
    *(
        "normalize",
        "softmax",
        "log_softmax",
        "softmin",
        "logsumexp",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
    ),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "logsumexp"),
}
_WITH_WEIGHTS = {
    *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot"),
}
_Growth: TypeAlias = tuple[float, float]
"""The degree and the sign of a tensor."""
_STOPPED = 0.25
"""The highest degree of what no longer grows with the input of the network."""


class WithoutFlow(NamedTuple):
    """A call that breaks synaptic flow."""

    layer: str
    """Who calls what, such as ``"'encoder.norm' (layer_norm)"``."""
    weights: tuple[nn.Parameter, ...]
    """The parameters that the call takes."""


class Watch(FunctionMode):
    """Notes calls of functions that are known to break the flow, and inputs of layers that do not grow.

    A tensor of degree d grows as ``c ** d`` as the input of the network grows as a large ``c``. ReLU, GELU, products
    with weights and BatchNorm in eval mode keep the degree 1 of the input. A normalisation that is written out, as
    ``x * rsqrt(mean(x ** 2))``, makes 0 of it, and so does whatever saturates. It is named where a layer, or the end of
    the network, gets what has stopped growing.

    Args:
        functions: Names of the functions that are known to.
        module: The network.

    """

    def __init__(self, functions: set[str], module: nn.Module) -> None:
        super().__init__()
        self._functions = functions
        self._kinds = {name: type(submodule).__name__ for name, submodule in module.named_modules()}
        self.path: list[str] = []
        self.seen: list[WithoutFlow] = []

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch, and note it if it breaks the flow.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        """
        name = getattr(func, "__name__", "")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in self._functions:
            weights = tuple(each for each in given if isinstance(each, nn.Parameter))
            self.seen.append(WithoutFlow(self._caller(name), weights))
            return tree_map(begin, func(*args, **kwargs))
        if name in ("embedding", "embedding_bag"):
            return begin(func(*args, **kwargs))
        grown = [each for each in given if hasattr(each, "_degree")]
        if not grown or "_like" in name or name.startswith("new_"):  # of their shape and type alone
            return func(*args, **kwargs)
        if name in _WITH_WEIGHTS and any(each.is_floating_point() and not hasattr(each, "_degree") for each in given):
            self.end(grown)
            degrees: Iterable[_Growth] = repeat(_as_highest(grown))  # as with absolute weights
        else:
            degrees = _degrees(func, args, kwargs, grown)
        result = func(*args, **kwargs)
        earlier = next((each._stopper for each in grown if each._stopper), None)  # type: ignore[attr-defined]
        highest = max(each._degree for each in grown)
        outputs = _floating(args[0] if name in ("__setitem__", "copy_") else result)
        for leaf, (degree, sign) in zip(outputs, degrees, strict=False):
            stopper = self._caller() if degree <= _STOPPED < highest else earlier
            _mark(leaf, degree, sign, stopper if degree <= _STOPPED else None)
        return result

    def end(self, values: Any) -> None:
        """Name what stopped the growth of values that should still grow, and let them grow again.

        Args:
            values: Inputs of a layer, or outputs of the network.

        """
        for value in tree_leaves(values):
            stopper = getattr(value, "_stopper", None)
            if stopper is not None:
                self.seen.append(WithoutFlow(stopper, ()))
                _mark(value)

    def _caller(self, function: str | None = None) -> str:
        name = self.path[-1] if self.path else ""
        return f"{name!r} ({function or self._kinds[name]})" if name else f"`forward` ({function or self._kinds['']})"


def begin(value: Any) -> Any:
    """Let a value grow with the input of the network.

    Args:
        value: An input of the network; what is no floating-point tensor stays as it is.

    """
    if isinstance(value, Tensor) and value.is_floating_point():
        _mark(value)
    return value


@contextmanager
def module_names(module: nn.Module, path: list[str]) -> Generator[None]:
    """Keep the name of the submodule that is running at the end of ``path``.

    Args:
        module: The network.
        path: Names of the submodules that are running, from the outside in.

    """

    def forget(*_: Any) -> None:
        path.pop()

    handles = []
    try:
        for name, submodule in module.named_modules():
            handles.append(submodule.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
            handles.append(submodule.register_forward_hook(forget, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark(tensor: Any, degree: float = 1.0, sign: float = 1.0, stopper: str | None = None) -> None:
    tensor._degree, tensor._sign, tensor._stopper = degree, sign, stopper


def _degrees(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grown: list[Any]) -> Iterable[_Growth]:
    """Measure by which power of it a function's results grow, as the input of the network does, and their signs."""
    measured: list[list[_Growth | None]] = []
    for scale in (20, 0):  # far out, where GELU is a ReLU; near 1, where `exp` does not overflow
        with suppress(Exception):  # of a function that does not take float64, say
            before, after = (_sizes(func, args, kwargs, power) for power in (scale, scale + 1))
            measured.append(list(map(_growth, before, after)))
    highest = _as_highest(grown)
    return [next(filter(None, each), highest) for each in zip(*measured, strict=True)] if measured else repeat(highest)


def _growth(before: tuple[float, float], after: tuple[float, float]) -> _Growth | None:
    is_known = 0 < before[0] < math.inf and 0 < after[0] < math.inf
    return (math.log2(after[0] / before[0]), before[1]) if is_known else None


def _as_highest(grown: list[Any]) -> _Growth:
    """Let results grow as the argument that grows most."""
    return max(float(each._degree) for each in grown), 1.0


def _sizes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], power: int) -> list[tuple[float, float]]:
    """Run a function on random arguments, each grown by its degree; return the sizes of its results and their signs."""
    generator = torch.Generator().manual_seed(0)
    grown: dict[int, Tensor] = {}

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if id(leaf) not in grown and hasattr(leaf, "_degree"):
            numbers = torch.rand(leaf.shape, generator=generator, dtype=torch.float64).add_(0.5)
            growth = leaf._sign * 2.0 ** (power * leaf._degree)  # type: ignore[attr-defined]
            grown[id(leaf)] = numbers.mul_(growth).to(leaf.device)
        elif id(leaf) not in grown:
            grown[id(leaf)] = leaf.detach().clone().double()
        return grown[id(leaf)]

    scaled = tree_map(value, (args, kwargs))
    result = func(*scaled[0], **scaled[1])
    tensors = _floating(scaled[0][0] if result is None else result)
    return [(float(each.abs().sum()), math.copysign(1, float(each.sum()))) for each in tensors]


def _floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
