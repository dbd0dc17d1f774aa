"""Zeros that are lost in what is computed from weights are seen, and so is what is multiplied with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from costing import measure
from torch import Tensor, nn


class Computing(nn.Linear):
    """Multiplies with what it computes from its weight."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(6, 5)
        self.compute = compute
        self.shift, self.scale = nn.Parameter(torch.zeros(5, 1)), nn.Parameter(torch.zeros(5, 1))
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(5, 2))
        self.step = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("nothing", torch.zeros(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.compute(self, self.weight), self.bias)


@pytest.mark.parametrize(
    ("compute", "is_dense"),
    [
        (lambda layer, weight: weight + layer.lora_B @ layer.lora_A, True),
        (lambda layer, weight: weight - layer.shift, True),
        (lambda layer, weight: weight.clone().add_(0.5 * layer.shift), True),
        (lambda layer, weight: weight * (1 + layer.scale), False),
        (lambda layer, weight: weight + layer.nothing, False),
        (lambda layer, weight: weight + ((weight / layer.step).round() * layer.step - weight).detach(), False),
    ],
    ids=["low_rank", "shift", "in_place", "scale", "buffer", "learned_step"],
)
def test_what_is_still_zero_is_added(compute: Any, is_dense: bool) -> None:
    """A term that training will make other than 0 counts as what it will be; one that nobody trains as what it is."""
    module = nn.Sequential(Computing(compute), nn.ReLU(), nn.Linear(5, 3))
    masks = {"0.weight": torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) > 0.5}
    with torch.no_grad():
        module.get_parameter("0.weight").mul_(masks["0.weight"])
    measured = measure(module, torch.ones(2, 6), ["0.weight"], masks=masks)
    assert measured.error is None
    assert measured.dense_again == (("0.weight",) if is_dense else ())


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-6)


def merged(weight: Tensor) -> Tensor:
    torch.manual_seed(1)
    return weight + torch.rand(len(weight), 2) @ torch.rand(2, weight[0].numel())


def centred_in_place(weight: Tensor) -> Tensor:
    return weight.clone().sub_(weight.mean())


def gain(weight: Tensor) -> Tensor:
    return weight * torch.linspace(1, 2, len(weight)).unsqueeze(1)


DENSE = {
    "standardised": standardised,
    "centred": lambda weight: weight - weight.mean(),
    "centred_in_place": centred_in_place,
    "added_to": merged,
    "binarised": lambda weight: torch.where(weight >= 0, 1.0, -1.0),
    "softmax": lambda weight: weight.softmax(1),
    "real_part": lambda weight: torch.fft.fft(weight).real,
    "smoothed": lambda weight: weight + 0.1 * weight.roll(1, 1),
}


SPARSE = {
    "itself": lambda weight: weight,
    "gain": gain,
    "normalised": lambda weight: weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-9),
    "clipped": lambda weight: weight.clamp(-0.1, 0.1),
    "transposed_twice": lambda weight: weight.t().contiguous().t(),
    "repeated": lambda weight: weight.repeat(2, 1)[: len(weight)],
    "sign": torch.sign,
    "cast": lambda weight: weight.double().float(),
    "masked": lambda weight: standardised(weight) * (weight != 0),
}


class Computes(nn.Module):
    """Multiplies, in one of several ways, with what it computes from its weight."""

    def __init__(self, compute: Any, way: str) -> None:
        super().__init__()
        self.weight, self.compute, self.way = nn.Parameter(torch.randn(12, 9)), compute, way
        self.last = nn.Linear(4 if way == "conv" else 12, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.compute(self.weight)
        if self.way == "linear":
            return self.last(nn.functional.linear(x, weight))  # type: ignore[no-any-return]
        if self.way == "matmul":
            return self.last(x @ weight.t())  # type: ignore[no-any-return]
        if self.way == "einsum":
            return self.last(torch.einsum("bi,oi->bo", x, weight))  # type: ignore[no-any-return]
        if self.way == "chunks":
            return self.last(torch.cat([x @ part.t() for part in weight.chunk(3)], 1))  # type: ignore[no-any-return]
        images = x.reshape(-1, 1, 3, 3).expand(-1, 3, 3, 3)
        return self.last(nn.functional.conv2d(images, weight.reshape(4, 3, 3, 3)).flatten(1))  # type: ignore[no-any-return]


WAYS = ["linear", "matmul", "einsum", "chunks", "conv"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*DENSE, *SPARSE])
def test_lost_zeros_are_seen(kind: str, way: str) -> None:
    """Zeros that do not stay zeros are seen, whatever the layer does, and those that do are never complained of."""
    torch.manual_seed(0)
    module = Computes((DENSE | SPARSE)[kind], way)
    mask = torch.rand(12, 9) > 0.7
    with torch.no_grad():
        module.weight.mul_(mask)
    measured = measure(module, torch.randn(5, 9), ["weight"], masks={"weight": mask})
    assert measured.error is None
    assert measured.dense_again == (("weight",) if kind in DENSE else ())
    assert "weight" in measured.in_products


def test_zeros_are_lost_only_where_something_is_pruned() -> None:
    module = Computes(standardised, "linear")
    measured = measure(module, torch.randn(5, 9), ["weight"], masks={"weight": torch.ones(12, 9, dtype=torch.bool)})
    assert measured.dense_again == ()


class Expert(nn.Module):
    """Chooses one matrix of a parameter for every sample."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.shift = nn.Embedding(7, 6), nn.Parameter(torch.randn(1, 6))
        self.up, self.how = nn.Parameter(torch.randn(4, 6, 5)), how

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.shift
        if self.how == "bmm":
            return torch.bmm(x.unsqueeze(1), self.up[tokens % 4])
        if self.how == "einsum":
            return torch.einsum("bi,eio->beo", x, self.up)
        return torch.stack([row @ self.up[int(token) % 4] for row, token in zip(x, tokens, strict=True)])


@pytest.mark.parametrize("how", ["bmm", "einsum", "loop"])
def test_experts_are_multiplied_with(how: str) -> None:
    """Experts are multiplied with; a table is looked up, a shift is added."""
    measured = measure(Expert(how), torch.tensor([1, 2, 3]), ["up"])
    assert measured.in_products == ("up",)
