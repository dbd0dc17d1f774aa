"""Facts about the operations that made a tensor, read from autograd's nodes (``grad_fn``).

The attributes of nodes that are read here are not documented by torch, and are read nowhere else in this package. Each
has a test that fails when torch drops it. Seen in torch 2.14.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def operation(node: Any) -> str:
    """Return the name of an operation of torch, such as ``"Relu"``; a custom one is ``""``, whatever it is called."""
    if is_custom(node):
        return ""
    return node.name().rpartition("::")[-1].rstrip("0123456789").removesuffix("Backward")  # type: ignore[no-any-return]


def is_custom(node: Any) -> bool:
    """Whether an operation is a ``torch.autograd.Function`` of somebody's own."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def output_shape(node: Any) -> tuple[int, ...]:
    """Return the shape of an operation's first output; an empty one if it is custom: reading that crashes torch 2.6."""
    return () if is_custom(node) else tuple(node._input_metadata[0].shape)


def concatenated_dimension(node: Any, ndim: int) -> int:
    """Return the dimension in which ``torch.cat`` joined tensors of so many dimensions."""
    return _signed(node._saved_dim) % ndim


def reduced_dimensions(node: Any, ndim: int) -> set[int]:
    """Return the dimensions that a mean, sum or extremum of a tensor went over; none where it does not tell."""
    saved = getattr(node, "_saved_dim", None)
    dimensions = () if saved is None else saved if isinstance(saved, tuple) else (saved,)
    return {_signed(dimension) % ndim for dimension in dimensions}


def keeps_dimensions(node: Any) -> bool:
    """Whether a reduction was called with ``keepdim=True``."""
    return bool(node._saved_keepdim)


def takes_ungraded(node: Any) -> bool:
    """Whether an operation takes an argument without a gradient that may still depend on the input, such as a mask."""
    return any(source is None for source, _ in node.next_functions)


def leaves_behind(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Return the tensors with a gradient of their own, such as parameters, that outputs are computed from."""
    waiting, seen, leaves = [output.grad_fn for output in outputs], set(), set()
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(source for source, _ in node.next_functions)
            if hasattr(node, "variable"):
                leaves.add(node.variable)
    return leaves


def _signed(number: int) -> int:
    """Read a negative number that autograd has stored as an unsigned one."""
    return number - (1 << 64) if number >= 1 << 63 else number
