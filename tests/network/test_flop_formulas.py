"""What torch does not count is counted by a formula, or named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from costing import measure
from torch import Tensor, nn

from lightning_drive.network import costs, flop_formulas, prunable


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        pytest.param((7, 4), (3, 4, 5), 7 * 4 * 5, id="rows_in_groups"),
        pytest.param((3, 2, 4), (4, 6), 2 * 4 * 6, id="columns_in_groups"),
        pytest.param((3, 2, 4), (3, 4, 5), 3 * 2 * 4 * 5, id="batch"),
    ],
)
def test_grouped_products(first: tuple[int, ...], second: tuple[int, ...], expected: int) -> None:
    assert flop_formulas.grouped(first, second, None, offs=None) == 2 * expected


def test_products_with_one_vector() -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.addmv(torch.ones(3), self.second.T, torch.mv(self.first, row)) for row in x])

    module = OneByOne()
    measured = measure(module, torch.ones(4, 6), ["first", "second"])
    assert measured.multiply_adds == {"first": 30, "second": 15}
    assert measured.in_products == ("first", "second")
    assert not measured.warnings


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.LSTM(4, 5, batch_first=True), {"0.weight_ih_l0": 7 * 4 * 20, "0.weight_hh_l0": 7 * 5 * 20}),
        (nn.GRU(4, 5, batch_first=True), {"0.weight_ih_l0": 7 * 4 * 15, "0.weight_hh_l0": 7 * 5 * 15}),
        (nn.RNN(4, 5, batch_first=True), {"0.weight_ih_l0": 7 * 4 * 5, "0.weight_hh_l0": 7 * 5 * 5}),
    ],
    ids=["lstm", "gru", "rnn"],
)
def test_recurrent_weights_count_once_for_every_step(layer: nn.Module, expected: dict[str, int]) -> None:
    """Each weight once for every step of a sequence."""

    class Last(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)[0]  # type: ignore[no-any-return]

    measured = measure(Last(layer), torch.randn(3, 7, 4), expected)
    assert (measured.multiply_adds, measured.others) == (expected, 0)


@pytest.mark.parametrize(
    "product",
    [lambda w, x: w @ x, lambda w, x: torch.addmv(w[:, 0], w, x), lambda w, x: torch.stack([row.dot(x) for row in w])],
    ids=["mv", "addmv", "dot"],
)
def test_products_with_a_vector(product: Any) -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([product(self.weight, row) for row in x])

    measured = costs.measure(OneByOne(), prunable.prunable_parameters(OneByOne(), ["*"]), torch.zeros(1, 4))
    assert measured.multiply_adds == {"weight": 12}
    assert measured.others == 0


@torch.library.custom_op("lightning_drive_tests::attention", mutates_args=())
def attention(query: Tensor, key: Tensor) -> Tensor:
    """Compute what no formula is known for, as a kernel of another library does."""
    return (query @ key.mT).softmax(-1) @ key


UNKNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "custom": (lambda x: attention(x, x), "lightning_drive_tests::attention"),
    "fft": (lambda x: torch.fft.fft2(x).real, "aten::_fft_c2c"),
    "cdist": (lambda x: torch.cdist(x, x) @ x, "aten::_cdist_forward"),
    "solve": (lambda x: torch.linalg.solve(x.mT @ x + torch.eye(4), x.mT).mT, "aten::_linalg_solve_ex"),
    "sparse": (lambda x: torch.sparse.mm(torch.eye(3).to_sparse(), x[0])[None], "aten::_sparse_addmm"),
}


@pytest.mark.parametrize(("function", "name"), UNKNOWN.values(), ids=UNKNOWN)
def test_products_without_a_formula_are_named(function: Callable[[Tensor], Tensor], name: str) -> None:
    """No parameter takes part in them, so only the total of all others is unknown."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(function(x))

    measured = measure(Products(), torch.randn(1, 3, 4))
    assert (measured.multiply_adds, measured.others) == ({"head.weight": 24}, None)
    assert [f"`{name}`" in text for text in measured.warnings] == [True]
