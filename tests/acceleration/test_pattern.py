"""Products with sparse matrices are those with the dense matrix of the same entries, whatever rows and columns hold."""

import pytest
import torch
from torch import Tensor

from lightning_drive.acceleration.pattern import Pattern

ENTRIES = {
    "some": [(0, 1), (2, 0), (2, 3), (0, 0)],
    "in_order": [(0, 0), (1, 2), (3, 1)],
    "one": [(1, 2)],
    "none": [],
    "a_whole_row": [(1, column) for column in range(4)],
}
EACH = pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)


def matrix_of(entries: list[tuple[int, int]]) -> tuple[Pattern, Tensor, Tensor]:
    """Return the pattern of entries in a matrix of 4 x 4, their values, and the matrix."""
    rows, columns = torch.tensor(entries, dtype=torch.int64).view(-1, 2).unbind(1)
    values = torch.arange(1, len(entries) + 1, dtype=torch.float64)
    pattern = Pattern.of(rows, columns, num_rows=4, num_columns=4)
    return pattern, pattern.values(values), torch.zeros(4, 4, dtype=torch.float64).index_put((rows, columns), values)


def dense(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", [1, 2, 33])
@EACH
def test_product(entries: list[tuple[int, int]], width: int) -> None:
    pattern, values, matrix = matrix_of(entries)
    right = dense(4, width)
    torch.testing.assert_close(pattern.product(values, right), matrix @ right)
    torch.testing.assert_close(pattern.transposed_product(values, right), matrix.t() @ right)


@EACH
def test_add_outer_products__only_at_entries(entries: list[tuple[int, int]]) -> None:
    pattern, values, matrix = matrix_of(entries)
    left, right = dense(4, 3), dense(4, 3).flip(0)
    sums = pattern.add_outer_products(values, left, right)
    expected = [(matrix + left @ right.t())[row, column] for row, column in sorted(entries)]
    torch.testing.assert_close(sums, torch.stack(expected) if expected else sums.new_zeros(0))


@EACH
def test_gathered__adjoint_of_values(entries: list[tuple[int, int]]) -> None:
    pattern = matrix_of(entries)[0].repeated(3, step=1)
    kept, other = dense(len(entries)), dense(3 * len(entries)).flip(0)
    torch.testing.assert_close(pattern.values(kept) @ other, kept @ pattern.gathered(other))


def test_repeated__further_to_the_right_each_time() -> None:
    pattern = Pattern.of(torch.tensor([1, 0]), torch.tensor([1, 0]), num_rows=2, num_columns=5).repeated(2, step=3)
    assert pattern.num_rows == 4
    product = pattern.product(pattern.values(torch.tensor([7.0, 5.0])), torch.eye(5))
    assert product.tolist() == [[5, 0, 0, 0, 0], [0, 7, 0, 0, 0], [0, 0, 0, 5, 0], [0, 0, 0, 0, 7]]
