"""Samples of a batch are counted, and the first of them is taken, in whatever containers they come."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_drive.core import containers
from lightning_drive.network.batch_samples import batch_size, first_sample, parts_of
from lightning_drive.network.forward_passes import ForwardPass

IMAGES = [torch.randn(3, 8, 8), torch.randn(3, 6, 9)]
BOXES = [{"boxes": torch.ones(1, 4)}, {"boxes": torch.ones(2, 4)}]


@pytest.mark.parametrize(
    ("parts", "size"),
    [
        pytest.param([torch.zeros(5, 3), torch.zeros(5)], 5, id="tensors"),
        pytest.param([[torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]], 2, id="images"),
        pytest.param([IMAGES, BOXES], 2, id="images_and_boxes"),
        pytest.param([torch.zeros(2, 3, 8, 8), BOXES], 2, id="batch_and_boxes"),
        pytest.param([[torch.zeros(4, 7), torch.zeros(6, 7), torch.zeros(5, 7)]], 3, id="sequences"),
        pytest.param([[torch.zeros(4, 7), torch.zeros(4, 9)]], 4, id="two_inputs"),
        pytest.param([{"x": torch.zeros(4, 7)}, {"y": torch.zeros(4)}], 4, id="mappings"),
        pytest.param([torch.zeros(4, 7), torch.zeros(2, 9)], None, id="graph"),
        pytest.param([[torch.zeros(4, 7), torch.zeros(4)], torch.zeros(3)], None, id="differ"),
    ],
)
def test_samples_are_counted(parts: list[Any], size: int | None) -> None:
    assert batch_size(parts) == size
    assert ForwardPass.of(tuple(parts), whole=True).num_samples == size
    assert ForwardPass.of(tuple(parts)).num_samples == (size and 1)


def test_first_sample_keeps_its_numbers() -> None:
    batch = {"x": torch.arange(6).reshape(3, 2), "y": (torch.arange(3),)}
    first: list[Tensor] = containers.leaves([first_sample(part) for part in parts_of(batch)])
    assert [tensor.tolist() for tensor in first] == [[[0, 1]], [0]]
