"""Operations that keep channels apart, and where channels are after each of them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_drive.compaction import autograd_nodes
from lightning_drive.compaction.dependency_graph import Node

_ELEMENTWISE = {
    *("Relu", "LeakyRelu", "Gelu", "Silu", "Elu", "Mish", "Hardtanh", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh"),
    *("Softplus", "LogSigmoid", "Threshold", "Abs", "Exp", "Log", "Log1P", "Sqrt", "Rsqrt", "Pow", "Neg", "Clamp"),
    *("ClampMin", "ClampMax", "Erf", "Reciprocal", "Clone", "ToCopy", "Add", "Sub", "Rsub", "Mul", "Div", "Maximum"),
    "Minimum",
}
_WINDOWS = {
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D"),
    *("AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "UpsampleNearest2D", "UpsampleBilinear2D"),
}
_REDUCTIONS = {"Mean", "Sum", "Amax", "Amin"}
_VIEWS = {"View", "UnsafeView", "ReshapeAlias"}
_CONCATENATION = "Cat"
_FOLLOWED = {_CONCATENATION} | _ELEMENTWISE | _WINDOWS | _REDUCTIONS | _VIEWS

Shape = tuple[int, ...]


class Position(NamedTuple):
    """Where a group's channels are in a tensor."""

    dimension: int
    codes: Tensor
    """Which index in that dimension belongs to which of the group's channels: see :func:`paired`."""
    size: int
    """How many channels the group has."""


def paired(index: Tensor, root: Tensor, size: int) -> Tensor:
    """Return one number for each pair of an index and the position of a channel among ``size``, in their order."""
    return torch.unique(index * size + root)  # type: ignore[no-any-return]


def is_followed(node: Node) -> bool:
    """Whether an operation that is no layer may keep channels apart."""
    return autograd_nodes.operation(node.grad_fn) in _FOLLOWED


def is_concatenation(node: Node) -> bool:
    """Whether an operation is ``torch.cat``."""
    return autograd_nodes.operation(node.grad_fn) == _CONCATENATION


def after(grad_fn: Any, before: Sequence[Position], shapes: Sequence[Shape], shape: Shape) -> Position | None:
    """Return where channels are after an operation other than a concatenation; nothing if it may mix them.

    They are where ``before`` says in its inputs, which have ``shapes``; its output has ``shape``.
    """
    name, first = autograd_nodes.operation(grad_fn), before[0]
    dimension = first.dimension
    if any(other.dimension != dimension or not torch.equal(other.codes, first.codes) for other in before):
        return None
    if name in _ELEMENTWISE:
        alike = all(len(given) == len(shape) and given[dimension] == shape[dimension] for given in shapes)
        return first if alike else None
    if len(shapes) != 1:
        return None
    if name in _WINDOWS:
        return first if dimension == 1 and shapes[0][:2] == shape[:2] and len(shape) == len(shapes[0]) else None
    if name in _REDUCTIONS:
        return _after_reduction(grad_fn, first, len(shapes[0]))
    return _after_view(first, shapes[0], shape) if name in _VIEWS else None


def after_concatenation(
    grad_fn: Any, before: Sequence[Position | None], widths: Sequence[int], shape: Shape
) -> Position | None:
    """Return where channels are after tensors were joined in dimension 1; nothing if they were joined in another.

    They are where ``before`` says in its inputs, ``None`` for one without any; these have ``widths`` in dimension 1.
    """
    known = [position for position in before if position is not None]
    if any(position.dimension != 1 for position in known):
        return None
    if autograd_nodes.concatenated_dimension(grad_fn, len(shape)) != 1 or sum(widths) != shape[1]:
        return None  # the latter where an input without gradient is not among the inputs
    starts = [sum(widths[:number]) for number in range(len(widths))]
    joined = [
        position.codes + start * position.size
        for position, start in zip(before, starts, strict=True)
        if position is not None
    ]
    return known[0]._replace(codes=torch.unique(torch.cat(joined)))


def _after_reduction(grad_fn: Any, before: Position, ndim: int) -> Position | None:
    reduced = autograd_nodes.reduced_dimensions(grad_fn, ndim)
    if before.dimension in reduced or not reduced:
        return None
    if autograd_nodes.keeps_dimensions(grad_fn):
        return before
    return before._replace(dimension=before.dimension - sum(dimension < before.dimension for dimension in reduced))


def _after_view(before: Position, given: Shape, shape: Shape) -> Position | None:
    """Numbers stay in their order: channels stay apart if what is before or behind them keeps its size."""
    dimension = before.dimension
    if len(shape) > dimension and given[: dimension + 1] == shape[: dimension + 1]:
        return before
    if len(shape) == dimension + 1 and given[:dimension] == shape[:dimension]:  # flattened, with all behind them
        index, root, behind = before.codes // before.size, before.codes % before.size, math.prod(given[dimension + 1 :])
        spread = index[:, None] * behind + torch.arange(behind, device=index.device)
        return before._replace(codes=paired(spread.flatten(), root.repeat_interleave(behind), before.size))
    if dimension == len(given) - 1 and given[-1] == shape[-1]:
        return before._replace(dimension=len(shape) - 1)
    return None
