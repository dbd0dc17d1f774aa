"""Sums, differences, products and quotients pass paths on, whatever their sign."""

from collections.abc import Callable

import models
import pytest
import torch
from followed import Calls, active_counts, dense_masks
from torch import Tensor, nn


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: -x, id="sign"),
        pytest.param(lambda x: -2 * x, id="negative_factor"),
        pytest.param(lambda x: x / -2, id="negative_divisor"),
        pytest.param(lambda x: 1 - x, id="one_minus"),
        pytest.param(lambda x: x - 2, id="offset"),
        pytest.param(lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(), id="norm"),
        pytest.param(lambda x: x.clamp(0, 0.5), id="clamp"),
    ],
)
def test_signs_and_scales_do_not_count(function: Callable[[Tensor], Tensor]) -> None:
    """Subtraction and a hand-written norm pass signals on, whatever their sign."""
    module = nn.Sequential(nn.Linear(4, 6), Calls(function), nn.Linear(6, 3))
    assert active_counts(module, dense_masks(module), torch.zeros(1, 4)) == {"0.weight": 24, "2.weight": 18}


def test_normalised_inputs_still_arrive() -> None:
    """Images in 0..255 are often normalised by buffers inside the model: 1 - 127.5 is not "nothing"."""

    class Net(models.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - self.mean) / self.std)

    module = Net(4, 6, 3)
    module.register_buffer("mean", torch.tensor(127.5))
    module.register_buffer("std", torch.tensor(64.0))
    assert active_counts(module, dense_masks(module), torch.zeros(1, 4)) == {"0.weight": 24, "2.weight": 18}
