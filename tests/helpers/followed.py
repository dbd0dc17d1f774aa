"""Networks and masks whose paths are followed, and what must come out of it."""

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from lightning_drive.network import paths, prunable
from lightning_drive.network.synflow_breakers import flow_breakers

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: models.MLP(4, 6, 5, 3), (4,)),
    "plain_conv_net": (models.PlainConvNet, (2, 4, 4)),
    "conv_net": (models.ConvNet, (2, 6, 6)),
    "residual_net": (models.ResidualNet, (2, 4, 4)),
}
EACH_NETWORK = pytest.mark.parametrize("network", NETWORKS)


class Calls(nn.Module):
    """A module that only calls a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6, bias, dtype=dtype), nn.Linear(6, 3, bias, dtype=dtype)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def build(network: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """Return one of `NETWORKS` with random numbers for all it has, and the shape of what it takes."""
    make, shape = NETWORKS[network]
    return models.randomised(make(), seed).eval(), shape


def random_masks(module: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parameters = prunable.prunable_parameters(module)
    return {name: torch.rand(value.shape, generator=generator) < density for name, value in parameters.items()}


def dense_masks(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(mask) for name, mask in random_masks(module, 1, 0).items()}


def apply(masks: dict[str, Tensor], module: nn.Module) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).masked_fill_(~mask, 0)


def active_counts(module: nn.Module, masks: dict[str, Tensor], example_input: Tensor) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in paths.active_masks(module, masks, example_input).items()}


def all_active(module: nn.Module, masks: dict[str, Tensor], example_input: Tensor) -> bool:
    return all(mask.all() for mask in paths.active_masks(module, masks, example_input).values())


def agree(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of masks keep the same weights of the same parameters."""
    return first.keys() == second.keys() and all(mask.equal(second[name]) for name, mask in first.items())


def breakers_of(module: nn.Module, example_input: Tensor) -> list[str]:
    return [breaker.layer for breaker in flow_breakers(module, example_input)]


def weights_that_matter(module: nn.Module, masks: dict[str, Tensor], example_input: Tensor) -> dict[str, Tensor]:
    """Find kept weights on which the output of a network of positive numbers, without biases, depends."""
    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.rand_like(parameter) * 0.5 + 0.3).mul_(masks[name])
    outputs = module(example_input.double() + torch.rand(example_input.shape, dtype=torch.float64))
    gradients = torch.autograd.grad(outputs.sum(), list(module.parameters()), materialize_grads=True)
    return {name: (gradient != 0) & masks[name] for name, gradient in zip(masks, gradients, strict=True)}
