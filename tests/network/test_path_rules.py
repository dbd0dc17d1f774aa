"""Every function of torch follows its rule: activations, norms and Dropout let everything through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from followed import Between, Calls, active_counts, agree, all_active, dense_masks
from torch import Tensor, nn

from lightning_drive.network import paths
from lightning_drive.network.forward_passes import ForwardPass

# Every element-wise activation, norm and Dropout of torch.nn lets everything through.
ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.ELU(), nn.SELU(), nn.CELU()),
    *(nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.ReLU6(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Sigmoid()),
    *(nn.Tanh(), nn.Softsign(), nn.Softplus(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Softshrink(), nn.Hardshrink()),
    *(nn.Threshold(1.0, 0.0), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Softmin(-1)),
    *(nn.BatchNorm1d(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6), nn.Dropout(), nn.AlphaDropout()),
    *(Calls(lambda x: x.relu()), Calls(lambda x: x.relu_()), Calls(lambda x: x.tanh()), Calls(torch.sigmoid)),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_activations_let_everything_through(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3)).eval()
    assert active_counts(module, dense_masks(module), torch.zeros(1, 4)) == {"0.weight": 24, "2.weight": 18}


def in_place(operation: str, other: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(x, operation)(other)


@pytest.mark.parametrize("operation", ["sub_", "add_", "mul_", "div_", "__isub__", "__iadd__", "__imul__", "relu_"])
@pytest.mark.parametrize("place", ["input", "token_embedding", "hidden"])
def test_changes_in_place_are_nothing_special(operation: str, place: str) -> None:
    """Changing the input, an embedding or a hidden layer in place is nothing special."""
    change = nn.ReLU(inplace=True) if operation == "relu_" else Calls(in_place(operation, torch.tensor(2.0)))
    before = {"input": [], "token_embedding": [nn.Embedding(5, 4)], "hidden": [nn.Linear(4, 4), nn.ReLU()]}[place]
    module = nn.Sequential(*before, change, nn.Linear(4, 3))
    masks = dense_masks(module)
    example_input = torch.tensor([1, 2]) if place == "token_embedding" else torch.zeros(1, 4)
    assert all_active(module, masks, example_input)


@pytest.mark.parametrize("times", [1, 2])
def test_vmap_is_followed(times: int) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            layer: Any = self.first
            for _ in range(times):
                layer = torch.vmap(layer)
            return self.second(layer(x).relu())

    module = Mapped()
    masks = dense_masks(module)
    masks["first.weight"][2] = False
    active = paths.active_masks(module, masks, torch.zeros(2, 5, 4))
    assert not active["second.weight"][:, 2].any()
    assert int(active["second.weight"].sum()) == 15


@pytest.mark.parametrize(
    ("function", "name"),
    [(torch.linalg.inv, "linalg_inv"), (torch.linalg.cholesky, "linalg_cholesky"), (torch.inverse, "inverse")],
    ids=["inv", "cholesky", "inverse"],
)
def test_functions_that_cannot_be_followed_are_named(function: Any, name: str) -> None:
    module = Between(lambda x: function(x.mT @ x + torch.eye(6)) @ x.mT)
    with pytest.raises(RuntimeError, match=f"^in `{name}`: "):
        paths.active_masks(module, dense_masks(module), torch.zeros(3, 4))


class Positions(nn.Module):
    """Looks up what distances between positions mean, by buckets that are computed from constants, as T5 does."""

    def __init__(self, bucket: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.table = nn.Linear(4, 4), nn.Linear(4, 2), nn.Embedding(3, 1)
        self.bucket = bucket

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        distances = self.bucket((places[:, None] - places[None]).abs().float()).long()
        hidden = self.first(x)
        return self.last(hidden + self.table(distances).mean() * hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "bucket",
    [
        lambda x: (1 + x).log().clamp(max=2.5),
        lambda x: 2 * torch.tanh(x),
        lambda x: F.threshold(-x, -3, -3).neg().pow(0.5),
        lambda x: x.exp().reciprocal().mul(2),
        lambda x: F.hardtanh(x, 0, 2),
    ],
    ids=["log", "tanh", "pow", "exp", "hardtanh"],
)
def test_constants_keep_their_values(bucket: Callable[[Tensor], Tensor]) -> None:
    module = Positions(bucket)
    module(torch.zeros(1, 12, 4))
    masks = dense_masks(module)
    masks["first.weight"][1] = False
    active = paths.active_masks(module, masks, torch.zeros(1, 12, 4))
    assert {name: int(mask.sum()) for name, mask in active.items()} == {"first.weight": 12, "last.weight": 6}


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped products")
def test_grouped_products_join_what_arrives() -> None:
    """Each group of rows has a matrix of its own, as in mixtures of experts."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(8, 2)
            self.experts = nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([4, 8], dtype=torch.int32)
            return self.last(F.grouped_mm(self.first(x), self.experts, offs=ends))

    module = Grouped()
    masks = {name: torch.ones(value.shape) > 0 for name, value in module.named_parameters() if value.ndim > 1}
    masks["experts"][0] = False
    active = paths.active_masks(module, masks, ForwardPass.of(torch.zeros(8, 8), whole=True))
    assert agree(active, masks)
