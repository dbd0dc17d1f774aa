"""A path leads through any function wherever its result changes with its argument."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from followed import Between, random_masks, weights_that_matter
from torch import Tensor

from lightning_drive.network import paths


def attention(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Attention by hand, with a change to its scores, given the places that come later."""

    def function(x: Tensor) -> Tensor:
        scores = x @ x.mT
        return torch.softmax(change(scores, torch.ones_like(scores).triu(1) > 0), -1) @ x

    return function


def rotary(x: Tensor) -> Tensor:
    angles = torch.arange(1, x.shape[-2] + 1).to(x)[:, None] * torch.tensor([1.0, 2.0, 3.0] * 2).to(x)
    return x * angles.cos() + torch.cat([-x[..., 3:], x[..., :3]], -1) * angles.sin()


def written(x: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    result[:, ::2], result[:, 1] = x[:, ::2], x[:, 0]
    return result


PLACES = torch.tensor([1, 0, 1, 2, 0])


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotary": rotary,
    "masked_fill": attention(lambda scores, later: scores.masked_fill(later, float("-inf"))),
    "masked_fill_": attention(lambda scores, later: scores.masked_fill_(later, -1e9)),
    "added_mask": attention(lambda scores, later: scores + later.to(scores) * torch.finfo(torch.float32).min),
    "where_mask": attention(lambda scores, later: scores.where(~later, float("-inf"))),
    "roll": lambda x: x.roll(1, -1),
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "norm": lambda x: x.norm(dim=-1, keepdim=True).expand(-1, -1, 6),
    "var": lambda x: x.var(-1, keepdim=True).expand(-1, -1, 6),
    "std": lambda x: x.std(1, keepdim=True).expand(-1, 5, -1),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True).expand(-1, -1, 6),
    "sin": torch.sin,
    "index_select": lambda x: x.index_select(-1, torch.tensor([5, 4, 3, 0, 0, 1])),
    "index_add": lambda x: torch.zeros_like(x).index_add(1, PLACES, x),
    "scatter_reduce": lambda x: torch.zeros_like(x).scatter_reduce(1, PLACES.view(1, 5, 1).expand_as(x), x, "mean"),
    "setitem": written,
    "fft": lambda x: torch.fft.rfft(x, dim=-1).abs()[..., [0, 1, 2, 3, 1, 2]],
    "fft_and_back": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * (1 + 2j), n=5, dim=1),
    "fnet": lambda x: torch.fft.fft2(x).real,
    "complex_pairs": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * (1 + 2j)).flatten(2),
    "resized": lambda x: F.interpolate(x, size=6, mode="linear"),
    "folded": lambda x: F.fold(F.unfold(x.unsqueeze(1), (2, 6)), (5, 6), (2, 6)).squeeze(1),
    "circular": lambda x: F.pad(x, (1, 1), mode="circular")[..., :6],
    "distances": lambda x: torch.cdist(x, x.flip(1) * 0.5)[..., [0, 1, 2, 3, 4, 0]],
    "einsum": lambda x: torch.einsum("btc,bsc->bts", x, x) @ x,
    "glu": lambda x: F.glu(torch.cat([x, x], -1)),
    "product": lambda x: x.prod(-1, keepdim=True) * x,
    "chunks": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "lerp": lambda x: torch.lerp(x, x.flip(1), 0.3),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x,
    "cosine": lambda x: F.cosine_similarity(x, x.flip(1), dim=-1).unsqueeze(-1) * x,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_paths_lead_wherever_results_change(function: Callable[[Tensor], Tensor]) -> None:
    """A signal passes a function wherever its result changes with its argument."""
    for seed, density in enumerate((0.25, 0.4, 0.6, 2.0)):
        torch.manual_seed(seed)
        module = Between(function, bias=False)
        masks = random_masks(module, density, seed)
        example_input = torch.zeros(1, 5, 4)
        many = [weights_that_matter(module, masks, example_input) for _ in range(2)]
        active = paths.active_masks(module, masks, example_input)
        assert all(active[name].equal(many[0][name] | many[1][name]) for name in masks)
