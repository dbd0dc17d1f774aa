"""Layers that are more, or less, than their type says keep their channels."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compacted import assert_same, cut, numbers, sizes
from models import MLP
from torch import Tensor, nn

from lightning_drive import compact


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.in_features


def with_hook() -> nn.Module:
    module = MLP(4, 6, 3)
    module[0].register_forward_hook(lambda layer, inputs, output: output.cumsum(-1))
    return module


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    module[2].weight = module[0].weight
    with torch.no_grad():
        module[0].weight[1] = 0  # `cut` does the same to the column: the neuron could go, if the layers were apart
    return module


def repeated() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.ReLU(), layer)


def swapped() -> nn.Module:
    """A forward of one's own on a layer: it adds the first neuron to the second."""
    module = MLP(4, 6, 3)
    layer = module[2]

    def forward(layer: Any, x: Tensor) -> Tensor:
        return F.linear(torch.cat([x[:, :1], x[:, :1] + x[:, 1:2], x[:, 2:]], 1), layer.weight, layer.bias)

    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Subclass(6, 3)), id="subclass"),
        pytest.param(with_hook, id="hook"),
        pytest.param(tied, id="tied"),
        pytest.param(repeated, id="repeated"),
        pytest.param(parametrised, id="parametrised"),
        pytest.param(swapped, id="forward_of_its_own"),
    ],
)
def test_compact__unusual_layers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    given = make()
    if not hasattr(given[0], "parametrizations"):  # type: ignore[index]
        cut(given)
    small = compact(given, numbers(3, 4))
    assert_same(given, small, (4,))
    assert sizes(small) == sizes(given)
