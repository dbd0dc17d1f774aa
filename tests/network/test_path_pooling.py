"""Max pooling passes on all of its window."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from followed import Calls, active_counts, dense_masks
from torch import Tensor, nn

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "MaxPool2d": nn.MaxPool2d(2),
    "MaxPool2d_overlapping": nn.MaxPool2d(3, 2, 1),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.max_pool2d_keywords": lambda x: F.max_pool2d(input=x, kernel_size=2, stride=2),
    "F.max_pool2d_indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "AvgPool2d": nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(2),
    "amax": lambda x: x.amax((2, 3), keepdim=True),
    "max": lambda x: x.flatten(2).max(-1).values[..., None, None],
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_all_of_a_window_passes(pool: Callable[[Tensor], Tensor]) -> None:
    """With a full window each tap of the 3x3 convolution sees pixels; with only one position some see padding."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Calls(pool), nn.Conv2d(2, 2, 1))
    assert active_counts(module, dense_masks(module), torch.zeros(1, 1, 2, 2)) == {"0.weight": 18, "2.weight": 4}


def test_all_of_the_image_passes_adaptive_pooling() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveMaxPool2d(1), nn.Conv2d(2, 2, 1))
    assert active_counts(module, dense_masks(module), torch.zeros(1, 1, 2, 2)) == {"0.weight": 18, "2.weight": 4}
