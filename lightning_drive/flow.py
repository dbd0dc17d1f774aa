"""Passes through a network made all-positive: synaptic flow, and which weights still lie on a path.

Both run a replica of the module that has other tensors in place of its parameters; the module itself is only read.
"""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_drive.modes import FunctionMode
from lightning_drive.passage import Passage
from lightning_drive.replicas import Replica

_WITHOUT_FLOW = {
    *("relu6", "hardtanh", "hardtanh_", "hardsigmoid", "tanh", "tanh_", "sigmoid", "sigmoid_", "softsign"),
    *("lstm", "gru", "rnn_tanh", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"),
    *("normalize", "softmax", "log_softmax", "softmin", "scaled_dot_product_attention", "multi_head_attention_forward"),
}
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


class SynapticFlow:
    r"""The synaptic flow :math:`R = \mathbf{1}^T f(|\theta|; \mathbf{1})` of a network (Tanaka et al., 2020).

    The network runs in float64 on an input of ones, with absolute weights, and with all that would break its
    homogeneity removed: biases, BatchNorm's shift and running mean are zero; its absolute scale and its running
    variance stay. In a feed-forward network the scores :math:`|\theta \odot \partial R / \partial |\theta||` of every
    layer then sum to :math:`R`.

    Use it in eval mode with autocast off (:func:`lightning_drive.undisturbed.undisturbed`).

    Args:
        module: The network; its ``forward`` takes one tensor.
        parameters: Parameter name to the live prunable parameters. They may change from one use to the next, by
            masks, say; memory for them in float64 is kept.

    Raises:
        ValueError: If a parameter, prunable or not, is complex.

    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in module.named_parameters():
            if parameter.is_complex():
                raise ValueError(f"SynFlow is not defined for complex parameters ({name!r}). Use another method.")
        self._parameters = parameters
        self._leaves = {
            name: torch.empty_like(parameter, dtype=torch.float64, requires_grad=True)
            for name, parameter in parameters.items()
        }
        self._others: dict[str, tuple[Tensor, Tensor]] = {}
        self.reached: set[str] = set()
        """Names of the parameters that the flow depends on."""
        self._replica = Replica(module, self._stand_in)

    def _stand_in(self, name: str, value: Tensor) -> Tensor:
        if name in self._leaves:
            return self._leaves[name]
        twin = _flow_value(name, value)
        self._others[name] = value, twin
        return twin

    @property
    def weights(self) -> dict[str, Tensor]:
        r"""Prunable parameter name to :math:`|\theta|` in float64, as of the last call of :meth:`gradients`."""
        return {name: leaf.detach() for name, leaf in self._leaves.items()}

    def gradients(self, example_input: Any) -> tuple[dict[str, Tensor], float]:
        r"""Compute the gradients of the flow with respect to the absolute weights.

        Args:
            example_input: What the module takes, or a :class:`~lightning_drive.passage.Passage` through it; only
                shapes and devices matter (and values of integers, such as token ids).

        Returns:
            Parameter name to :math:`\partial R / \partial |\theta|` in float64, and :math:`R`.

        """
        for name, weight in self.weights.items():
            weight.copy_(self._parameters[name].detach()).abs_()
        for name, (value, twin) in self._others.items():
            twin.copy_(_flow_value(name, value))
        total = _sum(Passage.of(example_input).run(self._replica.module, _ones(torch.float64)))
        if not total.requires_grad:
            return {name: torch.zeros_like(weight) for name, weight in self.weights.items()}, total.item()
        gradients = torch.autograd.grad(total, list(self._leaves.values()), allow_unused=True)
        found = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True)
        }
        self.reached = {name for name, gradient in zip(found, gradients, strict=True) if gradient is not None}
        return found, total.item()


def layers_without_flow(module: nn.Module, example_input: Any) -> list[str]:
    """Name the layers for which synaptic flow is not defined, in the order in which they run.

    Saturating activations (ReLU6, Tanh, Sigmoid, and with them LSTM and GRU) stop the flow, and normalising layers
    (LayerNorm, softmax, attention) mix its signs; neither conserves it. Calls to functions (``F.softmax``) are found
    too.

    Args:
        module: The network.
        example_input: As in :meth:`SynapticFlow.gradients`.

    Returns:
        One text per call, such as ``"'encoder.norm' (layer_norm)"``.

    """
    watch = _Watch(_WITHOUT_FLOW)
    dtype = next(module.parameters()).dtype
    with _module_names(module, watch.path), watch:
        Passage.of(example_input).run(module, _ones(dtype))
    return watch.seen


def active_masks(module: nn.Module, masks: Mapping[str, Tensor], example_input: Any) -> dict[str, Tensor]:
    """Keep only the weights that lie on a path from the input to the output.

    A kept weight is inactive when everything before it or everything after it is pruned (Vysogorets & Kempe, 2023; the
    share of inactive weights is the *effective sparsity*). Paths are followed with a signal of zeros and ones: every
    layer's output and every gradient is reduced to "something arrives" or "nothing does", so depth can neither overflow
    nor underflow. Activations, norms and Dropout let everything through, max pooling passes on all of its window, signs
    and scales do not count, and weights without a mask carry everything. What does not come from the input carries
    nothing: biases, buffers, and constants that are added or subtracted. Nothing is known of weights that were not
    used, so all that are kept count as active.

    Args:
        module: The network.
        masks: Parameter name to boolean mask, on the parameter's device; ``True`` keeps.
        example_input: As in :meth:`SynapticFlow.gradients`.

    Returns:
        Parameter name to boolean mask, a subset of ``masks``.

    """
    tensors = {name: buffer.float() for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    tensors |= {name: _path_value(name, parameter, masks) for name, parameter in module.named_parameters()}
    reached: dict[str, Tensor] = {}

    def note(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        reached[name] = (leaf.grad > 0).logical_and_(masks[name])
        leaf.grad = None  # one at a time: all of them would take as much memory as the weights

    replica = Replica(module, lambda name, value: tensors.get(name, value))
    for name in masks:
        tensors[name].register_post_accumulate_grad_hook(partial(note, name))  # type: ignore[no-untyped-call]
    with torch.enable_grad(), _Paths():
        ones = _ones(torch.float32)
        total = _sum(Passage.of(example_input).run(replica.module, lambda tensor: _begin(ones(tensor))))
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    return {name: reached[name] if name in reached else mask.clone() for name, mask in masks.items()}


def _flow_value(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value.detach().clone()
    value = value.detach().double().abs()
    return torch.zeros_like(value) if _is_bias(name) or name.endswith("running_mean") else value


def _path_value(name: str, parameter: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    if name in masks:
        return masks[name].float().requires_grad_()
    if not parameter.is_floating_point():
        return parameter
    shape = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
    return shape.fill_(0.0 if _is_bias(name) else 1.0)


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[-1]  # "bias", "in_proj_bias", "bias_ih_l0"


def _ones(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return partial(torch.ones_like, dtype=dtype)


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    return torch.stack([output.sum() for output in outputs]).sum()


class _Watch(FunctionMode):
    """Notes which of the named functions are called, and by which submodule."""

    def __init__(self, functions: set[str]) -> None:
        super().__init__()
        self.functions = functions
        self.path: list[str] = []
        self.seen: list[str] = []

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.functions:
            self.seen.append(f"{self.path[-1]!r} ({name})" if self.path and self.path[-1] else f"`forward` ({name})")
        return func(*args, **kwargs)


@contextmanager
def _module_names(module: nn.Module, path: list[str]) -> Generator[None]:
    """Keep the name of the submodule that is running at the end of ``path``."""

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


class _Paths(FunctionMode):
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
            return _begin(result)
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


def _begin(values: Tensor) -> Tensor:
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
