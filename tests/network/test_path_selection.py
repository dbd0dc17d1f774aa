"""What is chosen by value depends on values, which paths do not have: all of it may be."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from followed import Between, Calls, all_active, dense_masks
from torch import Tensor, nn

from lightning_drive.network import paths

PLACES = torch.tensor([1, 0, 1, 2, 0])


def untrained(x: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * x


@pytest.mark.parametrize(
    "function",
    [
        *(lambda x: torch.where(x > 1, x, 0.1 * x), lambda x: x * (x > 0), lambda x: x * (x < 0).float()),
        *(lambda x: x.masked_fill(~(x > 0), 0), lambda x: torch.max(x, x.flip(1)), lambda x: x.detach(), untrained),
        *(lambda x: x.topk(5, 1).values, lambda x: x.sort(1).values, lambda x: x.amin(1, keepdim=True)),
        *(lambda x: x.median(1, keepdim=True).values, lambda x: x.kthvalue(1, 1, True)[0]),
        lambda x: x + (x.round() - x).detach(),
        lambda x: F.max_pool1d(x.mT, 2, 1, 1, 2).mT,
        lambda x: F.max_pool1d(x.mT, 2, return_indices=True)[0].mT,
        lambda x: torch.zeros_like(x).scatter_reduce(1, PLACES.view(1, 5, 1).expand_as(x), x, "amax"),
    ],
)
def test_all_that_may_be_chosen_is_active(function: Callable[[Tensor], Tensor]) -> None:
    """What is chosen depends on values, which paths do not have: all of it may be."""
    module = Between(function, bias=False)
    masks = dense_masks(module)
    assert all_active(module, masks, torch.zeros(1, 5, 4))
    masks["first.weight"][2] = False
    masks["last.weight"][:, 4] = False
    active = paths.active_masks(module, masks, torch.zeros(1, 5, 4))
    assert not active["first.weight"][4].any()


class Experts(nn.Module):
    """A mixture of experts, of which each token uses two."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = torch.topk(torch.softmax(self.router(tokens), -1), 2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.dense:
            gates = (F.one_hot(chosen, 3) * weights.unsqueeze(-1)).sum(1)
            return sum(gates[:, [i]] * expert(tokens) for i, expert in enumerate(self.experts))
        outputs = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == i)
            outputs.index_add_(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return outputs


@pytest.mark.parametrize("dense", [False, True])
def test_experts_are_used_in_turn(dense: bool) -> None:
    """Experts are used in turn; without a router, they still are."""
    module = Experts(dense)
    masks = dense_masks(module)
    assert all_active(module, masks, torch.zeros(1, 6, 4))
    masks["router.weight"][:] = False
    active = paths.active_masks(module, masks, torch.zeros(1, 6, 4))
    assert all(active[f"experts.{i}.weight"].all() for i in range(3))


def divided(x: Tensor) -> Tensor:
    values = torch.topk(x, 2, -1).values
    values /= values.sum(-1, keepdim=True)
    return values.sum(-1, keepdim=True) * x


def filled(x: Tensor) -> Tensor:
    values = x.max(-1, keepdim=True).values.clone()
    values[:, 0] *= 2
    return values + x


def matched(x: Tensor) -> Tensor:
    return x[:, x[0].detach().numpy().argsort(0)[:, 0].copy()]


def located(x: Tensor) -> Tensor:
    rows, places = torch.where(x.sum(-1) > -1)
    return x[rows, places][None]


def gathered(x: Tensor) -> Tensor:
    values = x.gather(1, x.argmax(1, keepdim=True))
    values += 1
    return values + x


@pytest.mark.parametrize("function", [divided, filled, matched, located, gathered])
def test_chosen_values_can_be_written_to(function: Callable[[Tensor], Tensor]) -> None:
    """As routers of experts, and matchers of boxes, do."""
    module = nn.Sequential(nn.Linear(4, 4), Calls(function), nn.Linear(4, 2))
    masks = dense_masks(module)
    assert all_active(module, masks, torch.zeros(1, 3, 4))
