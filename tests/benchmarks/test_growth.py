"""How the cost of a round grows with the number of weights: a stack of linear layers, four samples at a time."""

import copy
from collections.abc import Callable

import pytest
import torch
from benchmarks.measure import forward_backward, rounds_and_passes
from benchmarks.page import Figure
from torch import nn

from lightning_drive import DRIVE


def stack(width: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return module(batch).square().mean()


SIZES = {"1e6": (250, 16, 20), "1e7": (791, 16, 10), "1e8": (2500, 16, 6), "1e9": (7906, 16, 4)}
"""Weights to width, depth, and rounds."""


@pytest.mark.parametrize(
    ("size", "batch_size"), [*((size, 4) for size in SIZES), *((size, 512) for size in ("1e6", "1e7", "1e8"))]
)
def test_growth(figure: Callable[..., Figure], size: str, batch_size: int) -> None:
    width, depth, rounds = SIZES[size]
    module = stack(width, depth)
    batch = torch.randn(batch_size, width)
    plain = module if size == "1e9" else copy.deepcopy(module)  # there is no room for two of them
    bare_pass = forward_backward(plain, lambda module: loss(module, batch))

    rounds_taken, passes, once = rounds_and_passes(
        module, DRIVE(rounds=rounds), bare_pass, batches=[batch], loss_fn=loss
    )
    figure(
        "growth",
        f"{size} weights, batches of {batch_size}",
        "s",
        lambda: (rounds_taken, {"a bare forward-backward pass": passes}),
        note=f"{rounds} rounds, and {once:.2g} s once",
    )
