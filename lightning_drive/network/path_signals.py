"""Signals that follow the paths through a network: tensors that need gradients, above zero where something arrives."""

from typing import Any

import torch
from torch import Tensor


class _Arrives(torch.autograd.Function):
    """Reduces a signal to zeros and ones, forwards and backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(signal: Tensor) -> Tensor:
        return _is_above_zero(signal).to(signal.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _is_above_zero(gradient).to(gradient.dtype)


def arrives(signal: Tensor) -> Tensor:
    """Reduce a signal to zeros and ones, forwards and backwards.

    Args:
        signal: The signal.

    """
    return _Arrives.apply(signal)  # type: ignore[no-any-return]


def begin(values: Tensor) -> Tensor:
    """Make values a signal, which may also be written to.

    Args:
        values: Where something begins.

    """
    return values if values.requires_grad else values.requires_grad_().clone()


def heard(signal: Tensor) -> Tensor:
    """Return a signal without what is shut, which is ``-inf``.

    Args:
        signal: The signal.

    """
    return signal if signal.is_leaf or not signal.is_floating_point() else signal.clamp(min=0)


def is_signal(value: Any) -> bool:
    """Whether a value comes from the input or from masked weights, rather than being a constant.

    Args:
        value: Anything.

    """
    return isinstance(value, Tensor) and value.requires_grad


def _is_above_zero(values: Tensor) -> Tensor:
    return values != 0 if values.is_complex() else values > 0
