"""Which rule each function of torch follows where paths are followed through it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_drive.core.function_modes import FunctionMode, converted
from lightning_drive.network import path_arithmetic, path_attention, path_pooling, path_recurrent, path_selection
from lightning_drive.network.path_arithmetic import ARITHMETIC, PRODUCTS
from lightning_drive.network.path_marks import Gate, is_mark, is_undecided, opened, set_undecided, start, zeros_and_ones
from lightning_drive.network.path_probing import probe
from lightning_drive.network.path_selection import SELECTING

_PASSED_THROUGH = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "elu", "elu_", "selu"),
    *("selu_", "celu", "celu_", "gelu", "silu", "mish", "hardswish", "threshold", "_threshold", "threshold_"),
    *("hardtanh", "hardtanh_", "tanh", "tanh_", "sigmoid", "sigmoid_", "hardsigmoid", "softsign", "softplus"),
    *("log_sigmoid", "tanhshrink", "softshrink", "hardshrink", "softmax", "log_softmax", "softmin"),
    *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"),
    *("normalize", "neg", "abs", "exp", "log", "log1p", "sqrt", "rsqrt", "pow", "square", "reciprocal"),
    *("clamp", "clamp_min", "clamp_max", "clip", "erf"),
}
"""Activations, norms and the like, which let everything through; Dropout does, too."""

_OPEN_GATES = {"sigmoid", "sigmoid_", "hardsigmoid", "softplus", "softmax", "softmin", "exp"}
"""Functions that return something positive for 0: what they multiply passes even where no path arrives at the gate."""

_MOVES = {
    *("view", "view_as", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as"),
    *("contiguous", "transpose", "permute", "movedim", "repeat", "__getitem__", "to", "type_as", "float"),
    *("half", "bfloat16", "clone", "cat", "stack", "split", "chunk", "unbind", "gather", "index_select"),
    *("topk", "repeat_interleave", "interpolate"),
}
"""Functions after which an open gate still is one."""

_JOINING = {
    *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"),
    *("conv_transpose3d", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    *("_grouped_mm", "grouped_mm"),
}
"""Layers and products with weights, which join what arrives at their inputs."""

_RULES: dict[str, Callable[..., Any]] = {
    **path_arithmetic.RULES,
    **path_attention.RULES,
    **path_pooling.RULES,
    **path_recurrent.RULES,
    **path_selection.RULES,
    "detach": lambda mark: mark.view_as(mark),
    "numpy": lambda mark, **options: mark.detach().numpy(**options),
    "__array__": lambda mark, dtype=None: mark.detach().__array__(dtype),
}
"""Functions of torch to what takes their place."""


class PathRules(FunctionMode):
    """Has every function of torch return marks of the paths through it, in place of its numbers."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the marks that a function of torch lets through, all in float32."""
        given = _tensors((args, kwargs))
        name = getattr(func, "__name__", "")
        kinds = {tensor.dtype for tensor in given if tensor.is_floating_point()}
        if kinds and torch.float32 not in kinds:  # not of this network, but of a signal handler that saves, say
            return func(*args, **kwargs)
        if not given:  # such as what `no_grad` does when it begins
            return converted(func(*args, **kwargs), torch.float32)
        if len(kinds) > 1:
            args = converted(args, torch.float32)
            kwargs = {key: converted(value, torch.float32) for key, value in kwargs.items()}
            given = _tensors((args, kwargs))
        with torch.inference_mode(False), torch.enable_grad():  # parts that do not train lead paths on, too
            try:
                result = converted(_marked(name, func, args, kwargs, given), torch.float32)
            except RuntimeError as error:
                error.args = (f"in `{name}`: {error}",)
                raise
        if "_like" not in name and "new_" not in name:
            _note_undecided(given, result)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _note_undecided(given: list[Tensor], result: Any) -> None:
    """Note of the constants among results that they were computed from marks, or from others that were."""
    is_any_undecided = any(map(is_undecided, given))
    if not is_any_undecided and not any(map(is_mark, given)):
        return
    for tensor in _tensors(result):
        if not is_mark(tensor) and (is_any_undecided or not tensor.is_floating_point()):
            set_undecided(tensor)


def _marked(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
) -> Any:
    """Run a function of torch by the rule that its name has; ``given`` are the tensors among its arguments."""
    if not any(map(is_mark, given)):
        result = func(*args, **kwargs)
        return start(result) if name in ("embedding", "embedding_bag") else result  # the input, if it is integers
    first: Any = args[0] if args else kwargs.get("input")
    if (name in _PASSED_THROUGH or "dropout" in name) and is_mark(first) and not first.is_complex():
        return first.view_as(first).as_subclass(Gate) if name in _OPEN_GATES else first
    if name in PRODUCTS and (name not in ARITHMETIC or sum(map(is_mark, given)) > 1):
        args = tree_map(opened, args)
    if name in _RULES:
        return _RULES[name](*args, **kwargs)
    if name in SELECTING:
        return path_selection.selected(name, func, args, kwargs)
    if name in ARITHMETIC and len(args) == 2:
        return path_arithmetic.arithmetic(name, func, *args)
    if name in _JOINING:
        factor = path_arithmetic.factor
        return zeros_and_ones(func(*tree_map(factor, args), **tree_map(factor, kwargs)))
    return _without_rule(name, func, args, kwargs, given)


def _without_rule(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
) -> Any:
    """Run a function on marks that keeps them where they are or moves them about, or else probe it."""
    if len(given) == 1 and name.endswith("_") and _is_pointwise(name.strip("_")):
        return given[0]
    result = func(*args, **kwargs)
    if not any(map(is_mark, tree_leaves(result))) or _shares_memory(result, given):
        pass
    elif len(given) == 1 and _is_pointwise(name) and not given[0].is_complex():
        return given[0].clone()
    elif name not in ("embedding", "embedding_bag"):
        result = probe(func, args, kwargs, result)
    if name in _MOVES and any(isinstance(tensor, Gate) for tensor in given):
        return tree_map(lambda leaf: leaf.as_subclass(Gate) if is_mark(leaf) else leaf, result)
    return result


@cache
def _is_pointwise(name: str) -> bool:
    """Return whether torch says of a function that each entry of its result depends on one of each argument."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or name in ("fill", "zero"):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def _shares_memory(result: Any, given: list[Tensor]) -> bool:
    """Return whether a function only looked at one of its arguments in another way, or wrote to it."""
    places = {_place(tensor) for tensor in given if tensor.layout == torch.strided}
    return all(_place(tensor) in places for tensor in _tensors(result))


def _place(tensor: Tensor) -> tuple[int, bool]:
    return tensor.untyped_storage().data_ptr(), tensor.is_complex()
