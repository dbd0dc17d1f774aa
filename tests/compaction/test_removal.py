"""What seems unread is tried, and what changes an output is taken back."""

from typing import Any

import pytest
import torch
from compacted import Functional, assert_same, difference, numbers, sizes
from models import MLP, randomised
from torch import Tensor

from lightning_drive import compact
from lightning_drive.compaction import removal


def test_compact__hidden_reader_of_silence() -> None:
    """A channel that is read without its gradient, but is zero for the example, is not taken for unread."""
    given = Functional(lambda self, h, x: h * (1 + h.detach().amax(1, keepdim=True)))
    with torch.no_grad():
        given.first.weight[1], given.first.bias[1] = torch.tensor([40.0, 0, 0, 0]), -400.0  # relu is 0, mostly
    small = compact(given, numbers(6, 4))
    assert sizes(small.first) == sizes(given.first)  # type: ignore[arg-type]
    assert difference(given, small, torch.full((1, 4), 100.0)) < 1e-5


def test_compact__never_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in telling what is unread changes nothing: it is seen, and the rest goes on."""
    given = randomised(MLP(6, 8, 8, 3))
    with torch.no_grad():
        given[4].weight[:, :2] = 0
    right = removal._unread_

    def wrong(group: Any) -> Tensor:
        return torch.ones_like(right(group)) if group.name == "0" else right(group)

    monkeypatch.setattr(removal, "_unread_", wrong)
    small = compact(given, numbers(2, 6))
    assert sizes(small) == [(8, 6), (6, 8), (3, 6)]
    assert_same(given, small, (6,))
