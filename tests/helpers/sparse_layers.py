"""Layers with zeros, the places of their other weights, and inputs that they take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear_of_a_vector": (lambda: nn.Linear(7, 5), (7,)),
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear_of_one": (lambda: nn.Linear(7, 5), (1, 7)),
    "linear_without_bias": (lambda: nn.Linear(7, 5, bias=False), (4, 3, 7)),
    "linear_of_4_dimensions": (lambda: nn.Linear(7, 5), (2, 2, 3, 7)),
    "linear_in_blocks": (lambda: nn.Linear(7, 5), (300, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "conv1d_unbatched": (lambda: nn.Conv1d(3, 4, 2, stride=2, bias=False), (3, 9)),
    "conv1d_same": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=2), (2, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "conv2d_in_blocks": (lambda: nn.Conv2d(3, 4, 3, padding=1), (9, 3, 8, 8)),
    "conv2d_strided": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (2, 3, 7, 8)),
    "conv2d_uneven": (lambda: nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(2, 1)), (2, 3, 7, 8)),
    "conv2d_valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 5, 5)),
    "conv2d_same": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 5, 5)),
    "conv2d_unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 5)),
    "conv2d_pointwise": (lambda: nn.Conv2d(3, 4, 1), (5, 3, 6, 6)),
    "conv2d_pointwise_strided": (lambda: nn.Conv2d(3, 4, 1, stride=2), (2, 3, 6, 6)),
}
"""Each with the shape of an input."""

EACH = pytest.mark.parametrize("name", LAYERS)

KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "some": lambda places: places[places % 3 == 1],
    "one": lambda places: places[4:5],
    "none": lambda places: places[:0],
    "all": lambda places: places,
}
"""Which of all places are kept; with ``some`` of a few weights, rows may be empty."""


def layer_and_input(name: str, kept: str = "some", channels_last: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a layer in float64, the places of its kept weights, and an input that requires a gradient."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, input = make().double(), torch.randn(shape, dtype=torch.float64)
    if channels_last:
        input = input.to(memory_format=torch.channels_last)
    places = KEPT[kept](torch.arange(layer.weight.numel()))
    prune_(layer.weight, places)
    return layer, places, input.requires_grad_()


@torch.no_grad()
def prune_(weight: Any, places: Tensor) -> None:
    """Set all weights to zero but those that are kept."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[places] = True
    weight.mul_(mask.view(weight.shape))


def mask_of(weight: Tensor, places: Tensor) -> Tensor:
    """Return ones at the kept weights, and zeros."""
    return torch.zeros(weight.numel(), dtype=weight.dtype).index_fill(0, places, 1).view(weight.shape)
