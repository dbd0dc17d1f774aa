"""How the cost of a round grows with the number of weights: a stack of linear layers, four samples at a time."""

import copy
from collections.abc import Callable

import pytest
import torch
from benchmarks.measure import forward_backward, rounds_and_passes, with_once
from benchmarks.page import Figure
from torch import nn

from lightning_drive import DRIVE


def stack(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return module(batch).square().mean()


@pytest.mark.parametrize(("width", "depth", "rounds"), [(250, 16, 20), (791, 16, 20), (2500, 16, 10), (7906, 16, 4)])
@pytest.mark.parametrize("batch_size", [4, 256])
def test_growth(figure: Callable[..., Figure], width: int, depth: int, rounds: int, batch_size: int) -> None:
    module = stack(width, depth)
    size = width * width * depth
    batch = torch.randn(batch_size, width)
    plain = module if size > 5e8 else copy.deepcopy(module)  # 1e9 weights fit only once
    bare_pass = forward_backward(plain, lambda module: loss(module, batch))

    def take() -> tuple[list[float], dict[str, list[float]]]:
        found, passes, once = rounds_and_passes(module, DRIVE(rounds=rounds), bare_pass, batches=[batch], loss_fn=loss)
        return with_once(found, once), {"a bare forward-backward pass": passes}

    figure("growth", f"{size:.0e} weights, batches of {batch_size}", "s", take, note=f"{rounds} rounds")
