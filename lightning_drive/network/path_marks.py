"""Marks, which follow the paths through a network: tensors that need gradients, above zero where a path arrives.

All other tensors are constants. Where a mark is ``-inf``, attention is shut, and no path arrives, either.
"""

from typing import Any

import torch
from torch import Tensor


class Gate(Tensor):
    """The mark that comes out of an activation that is never 0; whatever is computed from it is a plain mark again."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class _ZerosAndOnes(torch.autograd.Function):
    """Reduces a mark to zeros and ones, forwards and backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mark: Tensor) -> Tensor:
        return _is_above_zero(mark).to(mark.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _is_above_zero(gradient).to(gradient.dtype)


def start(values: Tensor) -> Tensor:
    """Return values as a mark, which may also be written to: paths start where they are above zero."""
    return values if values.requires_grad else values.requires_grad_().clone()


def is_mark(value: Any) -> bool:
    """Return whether a value comes from the input or from masked weights, rather than being a constant."""
    return isinstance(value, Tensor) and value.requires_grad


def zeros_and_ones(mark: Tensor) -> Tensor:
    """Return a mark with 1 wherever a path arrives; its gradient is reduced in the same way."""
    return _ZerosAndOnes.apply(mark)  # type: ignore[no-any-return]


def without_shut(mark: Tensor) -> Tensor:
    """Return a mark with 0 in place of ``-inf``, which stands where attention is shut."""
    return mark if mark.is_leaf or not mark.is_floating_point() else mark.clamp(min=0)


def opened(value: Any) -> Any:
    """Return a gate as a mark that is above zero everywhere, and anything else as it is.

    What a gate multiplies passes even where no path arrives at the gate.
    """
    return (1 + value.as_subclass(Tensor)).relu() if isinstance(value, Gate) else value


def is_undecided(value: Any) -> bool:
    """Return whether a constant was computed from marks: a comparison, or indices, whose values are not known."""
    return getattr(value, "_undecided", False)


def set_undecided(constant: Tensor) -> None:
    """Note that a constant was computed from marks."""
    constant._undecided = True  # type: ignore[attr-defined]


def _is_above_zero(values: Tensor) -> Tensor:
    return values != 0 if values.is_complex() else values > 0
