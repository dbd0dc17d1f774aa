"""Constants go into biases where that is exact, and into one channel where it is not."""

from typing import Any

import pytest
import torch
from compacted import IMAGES, assert_same, difference, numbers, sizes
from models import ResidualNet, randomised
from torch import Tensor, nn

from lightning_drive import compact


def test_compact__folds_a_constant() -> None:
    """By hand: the second neuron is always relu(2) = 2, which 5 times over goes into the bias."""
    given = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    values = {"0.weight": [[3.0], [0.0]], "0.bias": [1.0, 2.0], "2.weight": [[4.0, 5.0]], "2.bias": [7.0]}
    given.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    small = compact(given, torch.ones(1, 1))
    assert {name: value.tolist() for name, value in small.state_dict().items()} == {
        "0.weight": [[3.0]],
        "0.bias": [1.0],
        "2.weight": [[4.0]],
        "2.bias": [17.0],
    }


def constants(values: list[float], padding: int = 1, **settings: Any) -> nn.Sequential:
    """Two convolutions, the first of which passes on the input and writes constants beside it."""
    layer = nn.Conv2d(1, 1 + len(values), 1)
    with torch.no_grad():
        layer.weight[1:] = 0
        layer.bias.copy_(torch.tensor([0.0, *values]))
    return nn.Sequential(layer, nn.ReLU(), nn.Conv2d(1 + len(values), 2, 3, padding=padding, **settings))


@pytest.mark.parametrize(
    ("values", "settings", "left"),
    [
        pytest.param([2.0, 3.0, 0.5], {"padding": 0}, 1, id="no_padding"),
        pytest.param([2.0, 3.0, 0.5], {"padding": 0, "bias": False}, 1, id="no_padding_no_bias"),
        pytest.param([2.0, 3.0, 0.5], {"padding_mode": "reflect"}, 1, id="reflected"),
        pytest.param([-2.0, 0.0], {}, 1, id="zero_behind_relu"),
        pytest.param([-2.0, 0.0], {"bias": False}, 1, id="zero_without_bias"),
        pytest.param([2.0], {}, 2, id="one_is_kept"),
        pytest.param([2.0, 3.0, 0.5], {}, 2, id="joined_in_one"),
        pytest.param([2.0, 3.0, -0.5], {"bias": False, "stride": 2, "dilation": 2}, 2, id="joined_with_stride"),
    ],
)
def test_compact__constants_at_borders(values: list[float], settings: dict[str, Any], left: int) -> None:
    """Zeros around an image are no constant: what cannot go into a bias is joined, and right at the borders, too."""
    torch.manual_seed(0)
    given = constants(values, **settings)
    small = compact(given, numbers(2, 1, 6, 6))
    assert len(small[0].weight) == left
    assert_same(given, small, (1, 6, 6), tolerance=1e-6)
    folded = left == 1 and any(value > 0 for value in values)
    assert (small[2].bias is not None) == (settings.get("bias", True) or folded)


def test_compact__residual_branch_is_no_constant() -> None:
    """What a cut-off branch adds to is not constant; a channel of the stream goes only if no one reads it."""
    given = randomised(ResidualNet()).eval()
    with torch.no_grad():
        given.block1.conv2.weight[1] = 0  # type: ignore[union-attr, operator]
        given.block2.conv1.weight[:, 2] = 0  # type: ignore[union-attr, operator]
    assert sizes(compact(given, numbers(2, *IMAGES))) == sizes(given)
    with torch.no_grad():
        given.block2.shortcut[0].weight[:, 2] = 0  # type: ignore[index, union-attr]
    small = compact(given, numbers(2, *IMAGES))
    assert small.block1.conv2.weight.shape[:2] == (3, 4)  # type: ignore[union-attr]
    assert small.block1.shortcut[0].weight.shape[:2] == (3, 3)  # type: ignore[index, union-attr]
    assert_same(given, small, IMAGES)


def test_compact__a_mask_in_the_input() -> None:
    """What is constant only as long as a mask is all ones is not constant."""
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.last(self.first(x) * mask[:, None])

    given = Masked()
    with torch.no_grad():
        given.first.weight[1] = 0
    small = compact(given, {"x": numbers(3, 3), "mask": torch.ones(3, dtype=torch.int64)})
    assert difference(given, small, numbers(2, 3), torch.tensor([0, 1])) < 1e-6
    assert sizes(small) == sizes(given)
