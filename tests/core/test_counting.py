"""Counts are exact for masks of all shapes, sizes and memory layouts."""

import pytest
import torch
from torch import Tensor

from lightning_drive.core import counting


def test_counts(tensors: list[Tensor]) -> None:
    masks = [tensor > 0 for tensor in tensors]
    assert counting.count_each(masks) == [int(mask.sum()) for mask in masks]


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 5000, 300_000])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("begin", [0, 3, 8])
def test_count(size: int, density: float, begin: int) -> None:
    """Also of a part of a larger mask, from any entry on, and where all are set."""
    torch.manual_seed(0)
    mask = (torch.rand(begin + size) < density)[begin:]
    assert int(counting.count(mask)) == sum(mask.tolist())


def test_count__shapes() -> None:
    mask = torch.rand(64, 48) < 0.5
    assert all(int(counting.count(each)) == int(each.sum()) for each in (mask, mask.T, mask[1:, ::2], mask[0, 0]))


def test_count_each__none() -> None:
    assert counting.count_each([]) == []


def test_count_each__beyond_float32() -> None:
    """2**24 + 1 weights: a sum in float32 would lose the last one."""
    assert counting.count_each([torch.ones(2**24 + 1, dtype=torch.bool)]) == [2**24 + 1]
