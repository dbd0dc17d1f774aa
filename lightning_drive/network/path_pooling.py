"""Paths through max pooling: all of a window passes, as any of its entries may be the highest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_drive.network.path_marks import without_shut


def _max_pool(size: int) -> Callable[..., Any]:
    """Return the rule for max pooling of images with ``size`` dimensions."""

    def max_pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        mark, function = without_shut(input), getattr(F, f"max_pool{size}d")
        picked, indices = function(mark.detach(), kernel_size, stride, padding, dilation, ceil_mode, True)
        if all(number == 1 for number in tree_leaves(dilation)):
            joined = getattr(F, f"avg_pool{size}d")(mark, kernel_size, stride, padding, ceil_mode)
        else:
            joined = _dilated_sum(
                mark, size, picked.shape[-size:], kernel_size, stride or kernel_size, padding, dilation
            )
        return (joined, indices) if return_indices else joined

    return max_pool


def _dilated_sum(
    mark: Tensor, size: int, outputs: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """Return the sums over dilated windows as a convolution with ones: torch has no average pooling of them."""
    kernel, steps, margins, spreads = (
        tuple(value) if isinstance(value, list | tuple) else (value,) * size
        for value in (kernel_size, stride, padding, dilation)
    )
    ends = [
        max(0, (output - 1) * step + spread * (width - 1) + 1 - length - margin)
        for output, step, spread, width, length, margin in zip(
            outputs, steps, spreads, kernel, mark.shape[-size:], margins, strict=True
        )
    ]
    sides = [side for pair in zip(reversed(margins), reversed(ends), strict=True) for side in pair]
    planes = F.pad(mark, sides).flatten(0, -size - 1).unsqueeze(1)
    sums = getattr(F, f"conv{size}d")(planes, mark.new_ones(1, 1, *kernel), None, steps, 0, spreads)
    return sums[(..., *map(slice, outputs))].reshape(*mark.shape[:-size], *outputs)  # type: ignore[no-any-return]


def _adaptive_max_pool(size: int) -> Callable[..., Any]:
    """Return the rule for adaptive max pooling of images with ``size`` dimensions."""

    def adaptive_max_pool(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
        joined = getattr(F, f"adaptive_avg_pool{size}d")(without_shut(input), output_size)
        if not return_indices:
            return joined
        _, indices = getattr(F, f"adaptive_max_pool{size}d")(input.detach(), output_size, True)
        return joined, indices

    return adaptive_max_pool


def _with_indices(pool: Callable[..., Any]) -> Callable[..., Any]:
    def with_indices(*args: Any, **kwargs: Any) -> Any:
        return pool(*args, **{**kwargs, "return_indices": True})

    return with_indices


_POOLS = {f"max_pool{size}d": _max_pool(size) for size in (1, 2, 3)}
_POOLS |= {f"adaptive_max_pool{size}d": _adaptive_max_pool(size) for size in (1, 2, 3)}
RULES: dict[str, Callable[..., Any]] = {
    **_POOLS,
    **{f"{name}_with_indices": _with_indices(pool) for name, pool in _POOLS.items()},
}
"""Functions of torch to what takes their place."""
