"""Functions that break synaptic flow are named, whoever calls them, and no others are."""

import models
import pytest
import torch
import torch.nn.functional as F
from followed import Calls, breakers_of
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.ReLU6(), "hardtanh"),
        (nn.Hardtanh(), "hardtanh"),
        (nn.Tanh(), "tanh"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.Softsign(), "softsign"),
        (nn.LayerNorm(4), "layer_norm"),
        (nn.GroupNorm(2, 4), "group_norm"),
        (nn.InstanceNorm1d(4), "instance_norm"),
        (nn.RMSNorm(4), "rms_norm"),
        (nn.LocalResponseNorm(2), "local_response_norm"),
        (nn.Softmax(-1), "softmax"),
        (Calls(lambda x: x.sigmoid()), "sigmoid"),
        (Calls(lambda x: x.tanh_()), "tanh_"),
        (Calls(lambda x: F.relu6(x)), "relu6"),
        (Calls(lambda x: torch.softmax(x, -1)), "softmax"),
        (Calls(lambda x: F.normalize(x, dim=-1)), "normalize"),
        (Calls(lambda x: F.scaled_dot_product_attention(x, x, x)), "scaled_dot_product_attention"),
        (nn.LSTM(4, 4), "lstm"),
        (nn.GRU(4, 4), "gru"),
    ],
    ids=str,
)
def test_known_breakers_are_named(layer: nn.Module, name: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer)
    assert breakers_of(module, torch.zeros(1, 4, 4)) == [f"'2' ({name})"]


def test_the_network_itself_is_named() -> None:
    class Net(models.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(super().forward(x))

    assert breakers_of(Net(4, 3), torch.zeros(1, 4)) == ["`forward` (sigmoid)"]


def test_attention_is_one_call() -> None:
    names = breakers_of(models.Attention().eval(), torch.zeros(1, 16))
    assert names == ["'attention' (multi_head_attention_forward)"]


def test_softmax_by_logsumexp_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Calls(lambda x: (x - x.logsumexp(-1, keepdim=True)).exp()))
    assert breakers_of(module, torch.zeros(1, 4)) == ["'1' (logsumexp)"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.GELU(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.BatchNorm1d(4),
        nn.Dropout(),
        nn.MaxPool1d(2),
        nn.AvgPool1d(2),
        nn.Identity(),
    ],
    ids=str,
)
def test_what_conserves_flow_is_not_named(layer: nn.Module) -> None:
    assert breakers_of(nn.Sequential(nn.Linear(4, 4), layer).eval(), torch.zeros(1, 4, 4)) == []
