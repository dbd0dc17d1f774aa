"""What functions of torch let through from the input to the output, and what they join."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_drive.modes import FunctionMode

_PASSED_THROUGH = {
    *(
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "leaky_relu_",
        "prelu",
        "rrelu",
        "rrelu_",
        "elu",
        "elu_",
        "selu",
        "selu_",
    ),
    *("celu", "celu_", "gelu", "silu", "mish", "hardswish", "threshold", "_threshold", "threshold_", "hardtanh"),
    *("hardtanh_", "tanh", "tanh_", "sigmoid", "sigmoid_", "hardsigmoid", "softsign", "softplus", "log_sigmoid"),
    *("tanhshrink", "softshrink", "hardshrink", "softmax", "log_softmax", "softmin", "batch_norm", "layer_norm"),
    *("group_norm", "instance_norm", "rms_norm", "local_response_norm", "normalize", "neg", "abs", "exp", "log"),
    *("log1p", "sqrt", "rsqrt", "pow", "square", "reciprocal", "clamp", "clamp_min", "clamp_max", "clip", "erf"),
}
_OPEN_GATES = {"sigmoid", "sigmoid_", "hardsigmoid", "softplus", "softmax", "softmin", "exp"}
"""Functions that give something positive for 0: what they multiply passes even where nothing arrives at the gate."""

_VIEWS = {
    *(
        "view",
        "view_as",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "contiguous",
    ),
    *("transpose", "permute", "movedim", "repeat", "__getitem__"),
}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_JOINING = {
    *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
}
_PRODUCTS = {"mul", "mul_", "__rmul__", "matmul", "__matmul__", "bmm", "einsum"}
_ARITHMETIC = {
    *("add", "add_", "__radd__", "sub", "sub_", "rsub", "__rsub__"),
    *("mul", "mul_", "__rmul__", "div", "div_", "true_divide", "__rdiv__"),
}


class Paths(FunctionMode):
    """Gives every operation its meaning for paths: what it lets through, and what it joins."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in _PASSED_THROUGH or "dropout" in name:
            signal = args[0] if args else kwargs["input"]
            return signal.view_as(signal).as_subclass(_Gate) if name in _OPEN_GATES else signal
        if name in _RECURRENT:
            raise ValueError(f"paths through a recurrent layer ({name}) cannot be followed")
        if name in _PRODUCTS:
            args = tuple(1 + factor.as_subclass(Tensor) if isinstance(factor, _Gate) else factor for factor in args)
        if name in _REPLACED:
            return _REPLACED[name](*args, **kwargs)
        if name in _ARITHMETIC and len(args) == 2:
            return _arithmetic(name, func, *args)
        if name in _JOINING:
            return _arrives(func(*tree_map(_without_sign, args), **tree_map(_without_sign, kwargs)))
        result = func(*args, **kwargs)
        if name in ("embedding", "embedding_bag"):  # the input, if it is integers
            return begin(result)
        return result.as_subclass(_Gate) if name in _VIEWS and isinstance(args[0], _Gate) else result


class _Gate(Tensor):
    """What an activation that is never 0 lets through; whatever is computed from it is a plain tensor again."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class _Arrives(torch.autograd.Function):
    """Reduces a signal to zeros and ones, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor) -> Tensor:
        return (signal > 0).to(signal.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0).to(gradient.dtype)


def _arrives(signal: Tensor) -> Tensor:
    return _Arrives.apply(signal)  # type: ignore[no-any-return]


def begin(values: Tensor) -> Tensor:
    """Make values a signal, which may also be written to."""
    return values if values.requires_grad else values.requires_grad_().clone()


def _without_sign(value: Any) -> Any:
    """Let a weight that is computed from others, by spectral norm, say, carry a signal whatever its sign."""
    return value.abs() if isinstance(value, Tensor) and not _is_signal(value) and value.is_floating_point() else value


def _is_signal(value: Any) -> bool:
    """Whether a value comes from the input or from masked weights, rather than being a constant."""
    return isinstance(value, Tensor) and value.requires_grad


def _arithmetic(name: str, func: Callable[..., Any], first: Any, second: Any) -> Any:
    """Let signals through sums, differences, products and quotients, whatever their sign; constants add nothing."""
    if not _is_signal(first) and not _is_signal(second):
        return func(first, second)
    if name.endswith("_") and not name.startswith("_"):  # in place
        return first.copy_(_arithmetic(name.rstrip("_"), func, first.clone(), second))
    is_product = "mul" in name
    if _is_signal(first) and _is_signal(second):
        return first * second if is_product else first + second
    signal, constant = (first, second) if _is_signal(first) else (second, first)
    if is_product:
        return signal * (constant != 0)
    return signal + torch.zeros_like(constant) if isinstance(constant, Tensor) else signal


def _average_pool(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def average_pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor:
        if any(size != 1 for size in tree_leaves(dilation)):
            raise ValueError("paths through max pooling with dilation cannot be followed")
        return pool(input, kernel_size, stride, padding, ceil_mode)

    return average_pool


def _adaptive_pool(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, output_size, return_indices=False: pool(input, output_size)


def _without_indices(pool: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    return lambda *args, **kwargs: (pool(*args, **kwargs), None)


class _Maximum(NamedTuple):
    values: Tensor
    indices: None


def _maximum(input: Tensor, other: Any = None, keepdim: bool = False, *, dim: int | None = None) -> Any:
    """``torch.max`` in its three forms: of everything, of two tensors, and along a dimension."""
    if isinstance(other, Tensor):
        return input + other
    dim = other if dim is None else dim
    return input.sum() if dim is None else _Maximum(input.sum(dim, keepdim), None)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Every query sees every value; queries and keys matter where their products scale a value that arrives."""
    weight = 1 + (query * key.mean(-2, keepdim=True)).sum(-1, keepdim=True)
    return _arrives(weight * value.mean(-2, keepdim=True))


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    if given.get("use_separate_proj_weight"):
        weights = [given[f"{kind}_proj_weight"] for kind in "qkv"]
    else:
        weights = list(given["in_proj_weight"].chunk(3))
    projected = [
        _arrives(F.linear(given[kind], weight)) for kind, weight in zip(("query", "key", "value"), weights, strict=True)
    ]
    heads = [each.reshape(*each.shape[:-1], given["num_heads"], -1).movedim(0, -2) for each in projected]
    joined = _attention(*heads).movedim(-2, 0).flatten(-2)
    return _arrives(F.linear(joined, given["out_proj_weight"])), None


_POOLS = {f"max_pool{n}d": _average_pool(getattr(F, f"avg_pool{n}d")) for n in (1, 2, 3)} | {
    f"adaptive_max_pool{n}d": _adaptive_pool(getattr(F, f"adaptive_avg_pool{n}d")) for n in (1, 2, 3)
}
_REPLACED: dict[str, Callable[..., Any]] = {
    **_POOLS,
    **{f"{name}_with_indices": _without_indices(pool) for name, pool in _POOLS.items()},
    "amax": torch.sum,
    "max": _maximum,
    "maximum": torch.add,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
}
