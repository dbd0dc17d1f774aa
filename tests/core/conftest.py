"""Tensors that tests of several modules need."""

import pytest
import torch
from torch import Tensor

from lightning_drive.core import grouped_tensors

SHAPES = ((3, 4), (), (0, 5), (2, 2, 2), (70,), (0,), (1,), (5, 3))


@pytest.fixture(params=[None, 8, 20], ids=["all_small", "few_small", "some_small"])
def tensors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Tensors of all shapes, of which all, few or some count as small, and of which few fit together."""
    if request.param:
        monkeypatch.setattr(grouped_tensors, "_SMALL", request.param)
        monkeypatch.setattr(grouped_tensors, "_TOGETHER", 2 * request.param)
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in SHAPES]
