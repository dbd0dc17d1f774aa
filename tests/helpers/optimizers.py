"""Optimizers as other libraries have them: dense updates, whatever zeros the gradient has, and matrices as state."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class OnMatrices(Optimizer):
    """Steps in a `direction` that depends on the whole gradient of a parameter; kernels are flattened."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.02) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = parameter.grad
                    matrix = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
                    direction = self.direction(matrix, self.state[parameter], parameter)
                    parameter.sub_(direction.view_as(parameter), alpha=group["lr"])
        return loss

    def direction(self, gradient: Tensor, state: Any, parameter: Tensor) -> Tensor:
        raise NotImplementedError


class Orthogonal(OnMatrices):
    """Steps along the orthogonal factor of the momentum, as Muon does, which came with torch 2.9."""

    def direction(self, gradient: Tensor, state: Any, parameter: Tensor) -> Tensor:
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(gradient)).mul_(0.9).add_(gradient)
        left, _, right = torch.linalg.svd(momentum, full_matrices=False)
        return left @ right


class Drifting(torch.optim.SGD):
    """Moves every weight in every step, whatever its gradient, as Muon does, which came with torch 2.9."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(1e-3)
        return loss


class Wandering(Optimizer):
    """Steps along the gradient, and moves every weight by a little besides. It is none of torch's own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(0.05 * parameter.grad).add_(1e-3)
        return loss
