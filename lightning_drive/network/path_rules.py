"""What functions of torch let through from the input to the output, and what they join.

A *signal* is a tensor that needs gradients: something arrives where it is above zero. All other tensors are constants.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lightning_drive.core.function_modes import FunctionMode, converted
from lightning_drive.network import recurrent_paths
from lightning_drive.network.path_signals import arrives, begin, heard, is_signal

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

_MOVES = {
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
    *(
        "transpose",
        "permute",
        "movedim",
        "repeat",
        "__getitem__",
        "to",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "clone",
    ),
    *("cat", "stack", "split", "chunk", "unbind", "gather", "index_select", "topk", "repeat_interleave", "interpolate"),
}
"""Functions after which an open gate still is one."""

_JOINING = {
    *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "_grouped_mm", "grouped_mm"),
}
_PRODUCTS = {
    *("mul", "mul_", "__rmul__", "multiply", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "einsum"),
    *("tensordot", "outer", "inner", "addcmul", "baddbmm", "addmm"),
}
_ARITHMETIC = {
    *("add", "add_", "__radd__", "sub", "sub_", "rsub", "__rsub__", "subtract"),
    *("mul", "mul_", "__rmul__", "multiply", "div", "div_", "true_divide", "divide", "__rdiv__"),
}
_SELECTING = {
    **dict.fromkeys(("amax", "amin", "max", "min", "argmax", "argmin", "median", "nanmedian"), (1, None)),
    **dict.fromkeys(("sort", "argsort", "mode"), (1, -1)),
    **dict.fromkeys(("topk", "kthvalue"), (2, -1)),
}
"""Functions that select entries by their values to the position and the default of their argument ``dim``."""

_SHUT = -1e4
"""Constants below this, added or filled in, shut attention: ``-inf``, or the lowest number of a type."""


class Paths(FunctionMode):
    """Gives every operation its meaning for paths: what it lets through, and what it joins."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of torch on signals.

        Args:
            func: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        """
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", "")
        kinds = {each.dtype for each in given if each.is_floating_point()}
        if kinds and torch.float32 not in kinds:  # not of this network, but of a signal handler that saves, say
            return func(*args, **kwargs)
        if not given:  # such as what `no_grad` does when it begins
            return converted(func(*args, **kwargs), torch.float32)
        if len(kinds) > 1:
            args = converted(args, torch.float32)
            kwargs = {key: converted(each, torch.float32) for key, each in kwargs.items()}
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with torch.inference_mode(False), torch.enable_grad():  # parts that do not train pass signals on, too
            try:
                result = converted(_meaning(func, args, kwargs, given), torch.float32)
            except RuntimeError as error:
                error.args = (f"in `{name}`: {error}",)
                raise
        if any(is_signal(each) or _is_undecided(each) for each in given) and "_like" not in name and "new_" not in name:
            is_number = not any(_is_undecided(each) for each in given)
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and not is_signal(leaf) and not (is_number and leaf.is_floating_point()):
                    leaf._undecided = True  # type: ignore[attr-defined]
        return result


def _meaning(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
    """Run a function of torch on signals, given the tensors among its arguments."""
    name = getattr(func, "__name__", "")
    if not any(map(is_signal, given)):
        result = func(*args, **kwargs)
        return begin(result) if name in ("embedding", "embedding_bag") else result  # the input, if it is integers
    signal: Any = args[0] if args else kwargs.get("input")
    if (name in _PASSED_THROUGH or "dropout" in name) and is_signal(signal) and not signal.is_complex():
        return signal.view_as(signal).as_subclass(_Gate) if name in _OPEN_GATES else signal
    if name in recurrent_paths.MEANINGS:
        return recurrent_paths.MEANINGS[name](*args, **kwargs)
    if name in _PRODUCTS and (name not in _ARITHMETIC or sum(map(is_signal, given)) > 1):
        args = tree_map(_opened, args)
    if name in _REPLACED:
        return _REPLACED[name](*args, **kwargs)
    if name in _SELECTING:
        return _selected(name, func, args, kwargs)
    if name in _ARITHMETIC and len(args) == 2:
        return _arithmetic(name, func, *args)
    if name in _JOINING:
        return arrives(func(*tree_map(_factor, args), **tree_map(_factor, kwargs)))
    if len(given) == 1 and name.endswith("_") and _is_pointwise(name.strip("_")):
        return given[0]
    result = func(*args, **kwargs)
    if not any(map(is_signal, tree_leaves(result))) or _shares_memory(result, given):
        pass
    elif len(given) == 1 and _is_pointwise(name) and not given[0].is_complex():
        return given[0].clone()
    elif name not in ("embedding", "embedding_bag"):
        result = _by_change(func, args, kwargs, result)
    if name in _MOVES and any(isinstance(each, _Gate) for each in given):
        return tree_map(lambda each: each.as_subclass(_Gate) if is_signal(each) else each, result)
    return result


@cache
def _is_pointwise(name: str) -> bool:
    """Whether torch says of a function that every entry of its result depends on one entry of each argument."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or name in ("fill", "zero"):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def _shares_memory(result: Any, given: list[Tensor]) -> bool:
    """Whether a function only looked at one of its arguments in another way, or wrote to it."""
    places = {(each.untyped_storage().data_ptr(), each.is_complex()) for each in given if each.layout == torch.strided}
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return all((each.untyped_storage().data_ptr(), each.is_complex()) in places for each in tensors)


def _is_undecided(value: Any) -> bool:
    """Whether a constant was computed from signals: a comparison, or indices. What it will be is not known."""
    return getattr(value, "_undecided", False)


def _by_change(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Let a signal through any function, wherever its result changes as its arguments do."""
    leaves, form = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if is_signal(leaf)]
    found, found_form = tree_flatten(result)
    wanted = [i for i, leaf in enumerate(found) if is_signal(leaf)]
    constants = [_in_full(leaf) for leaf in leaves]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        filled = list(constants)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        args, kwargs = tree_unflatten(filled, form)
        outputs = tree_leaves(func(*args, **kwargs))
        return tuple(outputs[i] for i in wanted)

    signals = [leaves[i].as_subclass(Tensor) for i in places]
    for i, signal in zip(wanted, _ByChange.apply(call, [found[i].dtype for i in wanted], *signals), strict=True):
        found[i] = signal
    return tree_unflatten(found, found_form)


def _in_full(value: Any) -> Any:
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)
    return value


class _ByChange(torch.autograd.Function):
    """Says which entries of a function's result change with its arguments, and which arguments change them."""

    @staticmethod
    def forward(
        ctx: Any, call: Callable[..., tuple[Tensor, ...]], kinds: list[torch.dtype], *signals: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.kinds = [signal.dtype for signal in signals]
        ctx.save_for_backward(*(heard(signal) != 0 for signal in signals))  # signals may be written to
        both = zip(call(*_drawn(signals, 0)), call(*_drawn(signals, 1)), kinds, strict=True)
        return tuple((first != second).to(kind) for first, second, kind in both)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        begun = [place.to(kind) for place, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)]
        with torch.enable_grad():
            values = [value.requires_grad_() for value in _drawn(begun, 0)]
            outputs = ctx.call(*values)
        gradients = tuple(_drawn(gradients, 2))
        used = [i for i, output in enumerate(outputs) if output.requires_grad]
        found = torch.autograd.grad(
            [outputs[i] for i in used],
            values,
            [gradients[i].to(outputs[i].dtype) for i in used],
            allow_unused=True,
            materialize_grads=True,
        )
        return None, None, *((change != 0).to(kind) for change, kind in zip(found, ctx.kinds, strict=True))


def _drawn(signals: Any, seed: int) -> list[Tensor]:
    """Put a random positive number wherever something arrives."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for signal in signals:
        kind = torch.complex128 if signal.is_complex() else torch.float64
        numbers = torch.rand(signal.shape, generator=generator, dtype=kind) + (
            0.5 + 0.5j if signal.is_complex() else 0.5
        )
        drawn.append(numbers.to(signal.device).mul_(heard(signal) != 0))
    return drawn


def _selected(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let every entry through that may be selected; indices go round, so that each is used if there are many."""
    if len(args) > 1 and isinstance(args[1], Tensor):  # `max` and `min` of two tensors
        return _sum(*args)
    signal = heard(args[0] if args else kwargs["input"])
    place, default = _SELECTING[name]
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    result = func(*args, **kwargs)
    parts = [result] if isinstance(result, Tensor) else list(result)
    for i, part in enumerate(parts):
        if not part.is_floating_point():
            parts[i] = _going_round(part, signal, dim)
            continue
        total = signal.sum() if dim is None else signal.sum(dim, keepdim=True)
        total = total if dim is None or part.ndim == signal.ndim else total.squeeze(dim)
        parts[i] = arrives(total).expand_as(part).contiguous()  # it may be written to
        if isinstance(args[0] if args else None, _Gate):
            parts[i] = parts[i].as_subclass(_Gate)
    return parts[0] if isinstance(result, Tensor) else type(result)(parts)


def _going_round(indices: Tensor, signal: Tensor, dim: int | None) -> Tensor:
    size = signal.numel() if dim is None else signal.shape[dim]
    is_reduced = dim is None or indices.ndim < signal.ndim
    moved = indices if is_reduced else indices.movedim(dim, -1)  # type: ignore[arg-type]
    places = torch.arange(indices.numel(), device=indices.device).reshape(moved.shape) % max(size, 1)
    return places if is_reduced else places.movedim(-1, dim)  # type: ignore[arg-type]


class _Gate(Tensor):
    """What an activation that is never 0 lets through; whatever is computed from it is a plain tensor again."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _opened(value: Any) -> Any:
    """Let what an open gate multiplies pass even where nothing arrives at the gate."""
    return (1 + value.as_subclass(Tensor)).relu() if isinstance(value, _Gate) else value


def _factor(value: Any) -> Any:
    """Let a weight that is computed from others, by spectral norm, say, carry a signal whatever its sign."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if _is_undecided(value):
        return torch.ones_like(value)
    return heard(value) if is_signal(value) else value.abs()


def _arithmetic(name: str, func: Callable[..., Any], first: Any, second: Any) -> Any:
    """Let signals through sums, differences, products and quotients, whatever their sign; constants add nothing."""
    if name.endswith("_") and not name.startswith("_"):  # in place
        return first.copy_(_arithmetic(name.rstrip("_"), func, first.clone(), second))
    is_product = "mul" in name
    if is_signal(first) and is_signal(second):
        result = heard(first) * heard(second) if is_product else _sum(first, second)
        return result.as_subclass(_Gate) if isinstance(first, _Gate) and "div" in name else result
    signal, constant = (first, second) if is_signal(first) else (second, first)
    if is_product:
        if _is_undecided(constant):
            return heard(_opened(signal)) * torch.ones_like(constant)
        if isinstance(signal, _Gate) and bool(torch.as_tensor(constant != 0).all()):  # a scale times noise is no input
            return (heard(signal) * (constant != 0)).as_subclass(_Gate)
        return heard(_opened(signal)) * (constant != 0)
    result = signal + _closed(constant, "add" in name) if isinstance(constant, Tensor) else signal
    return result.as_subclass(_Gate) if isinstance(signal, _Gate) and "div" in name else result


def _sum(first: Tensor, second: Tensor) -> Tensor:
    return first + second


def _closed(constant: Any, shuts: bool = True) -> Any:
    """Replace a constant by nothing, or, where it is very negative, by what shuts attention."""
    if not isinstance(constant, Tensor):
        return float("-inf") if constant <= _SHUT else 0.0
    nothing = torch.zeros_like(constant)
    if not shuts or not constant.is_floating_point() or _is_undecided(constant):
        return nothing
    return nothing.masked_fill(constant <= _SHUT, float("-inf"))


def _masked_fill(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    if _is_undecided(mask):
        return input
    return input.masked_fill(mask, value if is_signal(value) else _closed(value))


def _masked_fill_(input: Tensor, mask: Tensor, value: Any) -> Tensor:
    return input.copy_(_masked_fill(input.clone(), mask, value))


def _where(condition: Tensor, input: Any = None, other: Any = None) -> Any:
    if input is None:
        return torch.where(condition)
    if condition.dtype != torch.bool:  # `input.where(condition, other)`
        condition, input = input, condition
    input, other = (value if is_signal(value) else _closed(value) for value in (input, other))
    if _is_undecided(condition):
        return torch.where(condition, input, 0.0) * 0 + heard(input) + heard(other)
    return torch.where(condition, input, other)


def _gather(input: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Tensor:
    if _is_undecided(index):
        return arrives(heard(input).sum(dim, keepdim=True)).expand_as(index).contiguous()
    return input.gather(dim, index)


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    return torch.take_along_dim(input, indices, dim) if dim is None else _gather(input, dim, indices)


def _scatter_sum(func: Callable[..., Any]) -> Callable[..., Any]:
    """Sum what a function scatters, in whatever way it reduces it."""

    def scatter(input: Tensor, dim: int, index: Tensor, src: Any, reduce: str, **kwargs: Any) -> Any:
        return func(input, dim, index, src, "sum", include_self=kwargs.get("include_self", True))

    return scatter


def _max_pool(size: int) -> Callable[..., Any]:
    """Return what lets all of each window through, of images of so many dimensions."""

    def max_pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        signal, function = heard(input), getattr(F, f"max_pool{size}d")
        picked, indices = function(signal.detach(), kernel_size, stride, padding, dilation, ceil_mode, True)
        if all(each == 1 for each in tree_leaves(dilation)):
            joined = getattr(F, f"avg_pool{size}d")(signal, kernel_size, stride, padding, ceil_mode)
        else:
            kernel, dilated, step, margin = (
                tuple(value) if isinstance(value, list | tuple) else (value,) * size
                for value in (kernel_size, dilation, stride or kernel_size, padding)
            )
            ends = [
                max(0, (out - 1) * each + spread * (width - 1) + 1 - length - before)
                for out, each, spread, width, length, before in zip(
                    picked.shape[-size:], step, dilated, kernel, signal.shape[-size:], margin, strict=True
                )
            ]
            sides = [side for pair in zip(reversed(margin), reversed(ends), strict=True) for side in pair]
            planes = F.pad(signal, sides).flatten(0, -size - 1).unsqueeze(1)
            joined = getattr(F, f"conv{size}d")(planes, signal.new_ones(1, 1, *kernel), None, step, 0, dilated)
            joined = joined[(..., *map(slice, picked.shape[-size:]))].reshape(picked.shape)
        return (joined, indices) if return_indices else joined

    return max_pool


def _adaptive_max_pool(size: int) -> Callable[..., Any]:
    def adaptive_max_pool(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
        joined = getattr(F, f"adaptive_avg_pool{size}d")(heard(input), output_size)
        if not return_indices:
            return joined
        _, indices = getattr(F, f"adaptive_max_pool{size}d")(input.detach(), output_size, True)
        return joined, indices

    return adaptive_max_pool


def _with_indices(pool: Callable[..., Any]) -> Callable[..., Any]:
    def with_indices(*args: Any, **kwargs: Any) -> Any:
        return pool(*args, **{**kwargs, "return_indices": True})

    return with_indices


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Every query sees every value; queries and keys matter where their products scale a value that arrives."""
    query, key, value = heard(query), heard(key), heard(value)
    if kwargs.get("enable_gqa"):  # each head of keys and values serves a group of heads of queries
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    weight = 1 + (query * key.mean(-2, keepdim=True)).sum(-1, keepdim=True)
    return arrives(weight * value.mean(-2, keepdim=True))


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["use_separate_proj_weight"]:
        weights = [given[f"{kind}_proj_weight"] for kind in "qkv"]
    else:
        weights = list(given["in_proj_weight"].chunk(3))
    projected = [
        arrives(F.linear(heard(given[kind]), weight))
        for kind, weight in zip(("query", "key", "value"), weights, strict=True)
    ]
    heads = [each.reshape(*each.shape[:-1], given["num_heads"], -1).movedim(0, -2) for each in projected]
    joined = arrives(F.linear(_attention(*heads).movedim(-2, 0).flatten(-2), given["out_proj_weight"]))
    if not given["need_weights"]:
        return joined, None
    similarity = arrives(heads[0] @ heads[1].mT)
    similarity = F.pad(similarity, (0, int(given["bias_k"] is not None) + int(given["add_zero_attn"])))
    return joined, (similarity.mean(-3) if given["average_attn_weights"] else similarity).as_subclass(_Gate)


_POOLS = {f"max_pool{n}d": _max_pool(n) for n in (1, 2, 3)}
_POOLS |= {f"adaptive_max_pool{n}d": _adaptive_max_pool(n) for n in (1, 2, 3)}
_REPLACED: dict[str, Callable[..., Any]] = {
    **_POOLS,
    **{f"{name}_with_indices": _with_indices(pool) for name, pool in _POOLS.items()},
    "maximum": _sum,
    "minimum": _sum,
    "fmax": _sum,
    "fmin": _sum,
    "detach": lambda signal: signal.view_as(signal),
    "numpy": lambda signal, **options: signal.detach().numpy(**options),
    "__array__": lambda signal, dtype=None: signal.detach().__array__(dtype),
    "masked_fill": _masked_fill,
    "masked_fill_": _masked_fill_,
    "where": _where,
    "gather": _gather,
    "take_along_dim": _take_along_dim,
    "scatter_reduce": _scatter_sum(torch.scatter_reduce),
    "scatter_reduce_": _scatter_sum(Tensor.scatter_reduce_),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
}
