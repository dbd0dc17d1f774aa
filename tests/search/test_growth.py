"""A search takes time in proportion to the layers, and its modes are off while it ranks."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_drive import DRIVE, SNIP, SynFlow, find_masks
from lightning_drive.core import selection, zeroing
from lightning_drive.search import loop
from lightning_drive.search.methods import Method


def perceptron(depth: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(4, 4), nn.ReLU())))


def residual(depth: int) -> nn.Module:
    return nn.Sequential(*(Shortcut() for _ in range(depth // 2)))


def convolutions(depth: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4)), *(nn.Conv1d(1, 1, 3, padding=1) for _ in range(depth)), nn.Flatten())


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.second(F.gelu(self.first(self.norm(x)))), 0.1, self.training)


def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
    return module(batch).square().mean()


def calls_of_a_round(net: nn.Module, method: Callable[[int], Method], scope: Any) -> int:
    """Count the functions of Python and C that are called from the end of the first round to that of the second."""
    count = 0
    ends: list[int] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    batch = torch.rand(8, 4)
    sys.setprofile(note)
    try:
        find_masks(
            net,
            method(2),
            sparsity=0.1,
            scope=scope,
            batches=[batch],
            loss_fn=loss_fn,
            on_round=lambda *_: ends.append(count),
        )
    finally:
        sys.setprofile(None)
    return ends[1] - ends[0]


@pytest.mark.parametrize("build", [perceptron, residual, convolutions])
@pytest.mark.parametrize(
    ("method", "scope"),
    [
        pytest.param(lambda rounds: DRIVE(rounds=rounds), "global", id="DRIVE"),
        pytest.param(lambda rounds: SNIP(rounds=rounds), "layerwise", id="SNIP_layerwise"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_growth(build: Callable[[int], nn.Module], method: Callable[[int], Method], scope: str) -> None:
    """Four times the layers take at most about four times the calls, and with one ranking few for each."""
    torch.manual_seed(0)
    few, many = (calls_of_a_round(build(depth), method, scope) for depth in (50, 200))
    assert many <= 4.2 * few
    if scope == "global":
        assert many <= 200 * 160


@pytest.mark.parametrize("method", [DRIVE(rounds=2), SNIP(), SynFlow(rounds=2)], ids=["DRIVE", "SNIP", "SynFlow"])
@pytest.mark.filterwarnings("ignore")
def test_no_function_mode_while_ranking(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode that turns Dropout off is on where the network runs, and nowhere in ranking and masking."""
    depths: dict[str, set[int]] = {"network": set(), "ranking": set()}

    def noted(function: Callable[..., Any], where: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            depths[where].add(torch._C._len_torch_function_stack())
            return function(*args, **kwargs)

        return run

    for owner, name in ((selection, "keep_highest"), (loop, "score_histogram"), (zeroing, "zero_")):
        monkeypatch.setattr(owner, name, noted(getattr(owner, name), "ranking"))
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    loss = noted(loss_fn, "network")
    find_masks(net, method, sparsity=0.5, batches=[torch.rand(8, 4)], loss_fn=loss)
    assert depths["ranking"] == {0}
    assert depths["network"] <= {1}
    assert torch._C._len_torch_function_stack() == 0
