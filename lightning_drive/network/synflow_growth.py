"""How tensors grow with the input of a network: their degrees, which show where synaptic flow breaks off.

A tensor of degree d grows as ``c ** d`` as the input of the network grows as a large ``c``. ReLU, GELU, products with
weights and BatchNorm in eval mode keep the degree 1 of the input. A normalisation that is written out, as
``x * rsqrt(mean(x ** 2))``, returns degree 0, and so does whatever saturates.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import repeat
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Growth: TypeAlias = tuple[float, float]
"""The degree and the sign of a tensor."""


def set_growth(tensor: Any, degree: float = 1.0, sign: float = 1.0, stopper: str | None = None) -> None:
    """Note how a tensor grows, and the name of what stopped its growth, if anything did."""
    tensor._degree, tensor._sign, tensor._stopper = degree, sign, stopper


def has_growth(tensor: Tensor) -> bool:
    """Return whether a tensor depends on the input of the network, rather than being a constant."""
    return hasattr(tensor, "_degree")


def degree_of(tensor: Any) -> float:
    """Return the degree of a tensor that has growth."""
    return tensor._degree  # type: ignore[no-any-return]


def stopper_of(value: Any) -> str | None:
    """Return the name of what stopped the growth of a value."""
    return getattr(value, "_stopper", None)


def start(value: Any) -> Any:
    """Return an input of the network, which grows with itself; what is no floating-point tensor stays as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        set_growth(value)
    return value


def as_highest(grown: list[Any]) -> Growth:
    """Return the growth of a result that grows as the argument that grows most."""
    return max(float(tensor._degree) for tensor in grown), 1.0


def measured(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], grown: list[Any]
) -> Iterable[Growth]:
    """Return the growth of all results of a function, measured on random numbers in place of its arguments.

    Where that is not possible they grow as the highest of ``grown``, the arguments that grow with the input.
    """
    attempts: list[list[Growth | None]] = []
    for power in (20, 0):  # far out, where GELU is a ReLU; near 1, where `exp` does not overflow
        with suppress(Exception):  # of a function that does not take float64, say
            before, after = (_sizes(func, args, kwargs, power + step) for step in (0, 1))
            attempts.append(list(map(_growth, before, after)))
    highest = as_highest(grown)
    if not attempts:
        return repeat(highest)
    return [next(filter(None, growths), highest) for growths in zip(*attempts, strict=True)]


def _growth(before: tuple[float, float], after: tuple[float, float]) -> Growth | None:
    is_known = 0 < before[0] < math.inf and 0 < after[0] < math.inf
    return (math.log2(after[0] / before[0]), before[1]) if is_known else None


def _sizes(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], power: int
) -> list[tuple[float, float]]:
    """Return sizes and signs of results for an input that has grown by ``2 ** power``."""
    generator = torch.Generator().manual_seed(0)
    numbers_of: dict[int, Tensor] = {}

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if id(leaf) not in numbers_of and has_growth(leaf):
            numbers = torch.rand(leaf.shape, generator=generator, dtype=torch.float64).add_(0.5)
            growth = leaf._sign * 2.0 ** (power * leaf._degree)  # type: ignore[attr-defined]
            numbers_of[id(leaf)] = numbers.mul_(growth).to(leaf.device)
        elif id(leaf) not in numbers_of:
            numbers_of[id(leaf)] = leaf.detach().clone().double()
        return numbers_of[id(leaf)]

    scaled = tree_map(value, (args, kwargs))
    result = func(*scaled[0], **scaled[1])
    tensors = floating(scaled[0][0] if result is None else result)
    return [(float(tensor.abs().sum()), math.copysign(1, float(tensor.sum()))) for tensor in tensors]


def floating(tree: Any) -> list[Tensor]:
    """Return the floating-point tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
