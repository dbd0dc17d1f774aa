"""Paths through sums, differences, products and quotients, whatever their sign; constants add nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_drive.network.path_marks import Gate, is_mark, is_undecided, opened, without_shut

ARITHMETIC = {
    *("add", "add_", "__radd__", "sub", "sub_", "rsub", "__rsub__", "subtract"),
    *("mul", "mul_", "__rmul__", "multiply", "div", "div_", "true_divide", "divide", "__rdiv__"),
}
"""Functions that :func:`arithmetic` is the rule for, where they are given two positional arguments."""

PRODUCTS = {
    *("mul", "mul_", "__rmul__", "multiply", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "einsum"),
    *("tensordot", "outer", "inner", "addcmul", "baddbmm", "addmm"),
}
"""Functions that multiply, so that gates among their arguments are opened."""

_SHUT = -1e4
"""Constants below this, added or filled in, shut attention: ``-inf``, or the lowest number of a type."""


def arithmetic(name: str, func: Callable[..., Any], first: Any, second: Any) -> Any:
    """Return the mark of a sum, a difference, a product or a quotient, of which one or both are marks."""
    if name.endswith("_") and not name.startswith("_"):  # in place
        return first.copy_(arithmetic(name.rstrip("_"), func, first.clone(), second))
    is_product = "mul" in name
    if is_mark(first) and is_mark(second):
        result = without_shut(first) * without_shut(second) if is_product else total(first, second)
        return result.as_subclass(Gate) if isinstance(first, Gate) and "div" in name else result
    mark, constant = (first, second) if is_mark(first) else (second, first)
    if is_product:
        if is_undecided(constant):
            return without_shut(opened(mark)) * torch.ones_like(constant)
        if isinstance(mark, Gate) and bool(torch.as_tensor(constant != 0).all()):  # a scale times noise is no input
            return (without_shut(mark) * (constant != 0)).as_subclass(Gate)
        return without_shut(opened(mark)) * (constant != 0)
    result = mark + nothing_but_shut(constant, "add" in name) if isinstance(constant, Tensor) else mark
    return result.as_subclass(Gate) if isinstance(mark, Gate) and "div" in name else result


def total(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of two marks: a path arrives where one arrives at either."""
    return first + second


def factor(value: Any) -> Any:
    """Return what stands for a value that layers multiply with.

    Weights that are computed from others, by spectral norm, say, lead a path on whatever their sign.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if is_undecided(value):
        return torch.ones_like(value)
    return without_shut(value) if is_mark(value) else value.abs()


def nothing_but_shut(constant: Any, can_shut: bool = True) -> Any:
    """Return zeros in place of a constant, and ``-inf`` where it is so negative that it shuts attention."""
    if not isinstance(constant, Tensor):
        return float("-inf") if constant <= _SHUT else 0.0
    nothing = torch.zeros_like(constant)
    if not can_shut or not constant.is_floating_point() or is_undecided(constant):
        return nothing
    return nothing.masked_fill(constant <= _SHUT, float("-inf"))


RULES: dict[str, Callable[..., Any]] = dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), total)
"""Functions of torch to what takes their place."""
