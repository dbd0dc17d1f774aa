"""What stops growing with the input of the network breaks its flow, and is found by what it does."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from followed import Calls, breakers_of
from torch import Tensor, nn


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def by_var_mean(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


WRITTEN_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": rms,
    "unit_length": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6),
    "layer_norm": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "standardised": lambda x: (x - x.mean()) / x.std(),
    "softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "stable_softmax": lambda x: (x - x.amax(-1, keepdim=True)).exp() / x.exp().sum(-1, keepdim=True),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "layer_norm_by_var_mean": by_var_mean,
    "clamp": lambda x: x.clamp(0, 6),
    "in_place": lambda x: x.clone().div_(x.abs().sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("function", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
@pytest.mark.parametrize("place", ["before_a_layer", "at_the_end", "before_a_convolution"])
def test_normalisation_by_hand_is_named(function: Callable[[Tensor], Tensor], place: str) -> None:
    after = {"before_a_layer": [nn.Linear(4, 3)], "at_the_end": [], "before_a_convolution": [nn.Conv1d(4, 3, 1)]}[place]
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(Calls(function), nn.Dropout()), *after).eval()
    assert breakers_of(module, torch.zeros(1, 4, 4)) == ["'2.0' (Calls)"]


def test_normalisation_in_a_branch_is_named() -> None:
    """The block grows by its shortcut, but its layer does not get what grows; each call of it is named."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(rms(x))

    block = Block()
    assert breakers_of(nn.Sequential(block, nn.ReLU(), block), torch.zeros(1, 4)) == ["'0' (Block)"] * 2
    assert breakers_of(block, torch.zeros(1, 4)) == ["`forward` (Block)"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        lambda x: x / (1 + torch.exp(-x)),
        lambda x: F.silu(x) * x,
        lambda x: torch.cat([x, x.relu() + 1], -1)[..., 1:5],
        lambda x: x * x.sum(-1, keepdim=True) / x.norm(dim=-1, keepdim=True),
        lambda x: F.interpolate(x, size=4) + x.mean(),
        lambda x: x.square().sqrt(),
        lambda x: x.clamp(min=0),
    ],
    ids=["gelu", "silu", "swiglu", "moved", "gain", "resized", "root_of_square", "relu"],
)
def test_what_grows_is_not_named(function: Callable[[Tensor], Tensor]) -> None:
    module = nn.Sequential(nn.Linear(4, 4), Calls(function), nn.Linear(4, 3))
    assert breakers_of(module, torch.zeros(1, 4, 4)) == []
