"""Networks with much cut off, and what is the same and what is smaller in a compacted one."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import randomised
from torch import Tensor, nn

IMAGES = (2, 8, 8)


def numbers(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(module: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """Draw all weights, and zero whole rows and columns of layers and single weights, so that much is cut off."""
    module = randomised(module, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                for dimension in (0, 1):
                    kept = torch.rand(weight.shape[dimension], generator=generator) < 0.7
                    weight.movedim(dimension, -1).mul_(kept | (weight.shape[dimension] < 4))
                weight.mul_(torch.rand(weight.shape, generator=generator) < density)
    return module


def difference(first: nn.Module, second: nn.Module, *inputs: Any) -> float:
    """Return the largest difference of outputs in eval mode, as a part of the largest output."""
    with torch.no_grad():
        expected, found = (copy.deepcopy(module).eval()(*inputs) for module in (first, second))
    assert expected.shape == found.shape
    assert expected.dtype == found.dtype
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-3))


def assert_same(given: nn.Module, small: nn.Module, shape: tuple[int, ...], tolerance: float = 1e-5) -> None:
    """Outputs agree for batches of other sizes, with numbers of other sizes."""
    for size, scale in ((1, 1.0), (5, 10.0), (3, 0.0)):
        assert difference(given, small, scale * numbers(size, *shape)) < tolerance


def sizes(module: nn.Module) -> list[tuple[int, int]]:
    """Outputs and inputs of each layer, as its weights have them."""
    return [tuple(weight.shape[:2]) for weight in module.parameters() if weight.ndim > 1]  # type: ignore[misc]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def cut(module: nn.Module) -> nn.Module:
    """Cut the second neuron of the first layer off from the output, and the third from the input."""
    with torch.no_grad():
        module[2].weight[:, 1] = 0  # type: ignore[index]
        module[0].weight[2] = 0  # type: ignore[index]
    return module


class Functional(nn.Module):
    """Two linear layers with a given function between them; the second neuron is not read by the last layer."""

    def __init__(self, between: Callable[["Functional", Tensor, Tensor], Tensor], *, constant: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.between = between
        self.extra = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        self.register_buffer("table", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        randomised(self)
        with torch.no_grad():
            if constant:
                self.first.weight[1], self.first.bias[1] = 0, 1.5
            else:
                self.last.weight[:, 1] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, F.relu(self.first(x)), x)) + 0 * self.extra.sum()


def on_paths(weights: list[Tensor]) -> list[int]:
    """How many neurons of each hidden layer lie on a path from input to output, by products of boolean matrices."""
    links = [(weight != 0).double() for weight in weights]
    forwards = [torch.ones(links[0].shape[1], dtype=torch.float64)]
    backwards = [torch.ones(links[-1].shape[0], dtype=torch.float64)]
    for link in links:
        forwards.append((link @ forwards[-1] > 0).double())
    for link in reversed(links):
        backwards.insert(0, (link.T @ backwards[0] > 0).double())
    return [int((one * two > 0).sum()) for one, two in zip(forwards[1:-1], backwards[1:-1], strict=True)]


def built(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> nn.Module:
    module = make()
    with torch.no_grad():
        module(torch.ones(2, *shape))  # lazy layers get their shapes
    return module
