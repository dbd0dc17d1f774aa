"""A gate that is never 0 stands half open: what it multiplies passes even where no path arrives at it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from followed import active_counts, dense_masks
from torch import Tensor, nn


class Gated(nn.Module):
    """A squeeze-and-excitation gate: what passes is multiplied by sigmoid(gate)."""

    def __init__(self, squash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden * self.squash(self.gate(hidden)))


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "Sigmoid": nn.Sigmoid(),
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    # as squeeze-and-excitation layers bring one number per channel to the shape of the image
    "reshaped": lambda x: torch.sigmoid(x).view(len(x), -1, 1).expand(-1, -1, 2)[..., 0],
    "scaled": lambda x: 2 * torch.sigmoid(x),
}


@pytest.mark.parametrize("squash", GATES.values(), ids=GATES)
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned_gate"])
def test_gates_stand_half_open(squash: Callable[[Tensor], Tensor], pruned: bool) -> None:
    """A gate without weights stands half open; it does not cut the network off."""
    module = Gated(squash)
    masks = dense_masks(module)
    masks["gate.weight"].fill_(not pruned)
    expected = {"first.weight": 24, "gate.weight": 0 if pruned else 36, "last.weight": 18}
    assert active_counts(module, masks, torch.zeros(1, 4)) == expected


def test_gates_multiply_in_place() -> None:
    class Net(Gated):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            passed = hidden.clone()
            passed *= torch.sigmoid(self.gate(hidden))
            return self.last(passed)

    module = Net(torch.sigmoid)
    expected = {"first.weight": 24, "gate.weight": 36, "last.weight": 18}
    assert active_counts(module, dense_masks(module), torch.zeros(1, 4)) == expected
