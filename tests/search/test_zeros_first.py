"""Zeros that are there already are pruned before live weights of the same score, and nothing changes without them."""

import warnings
from collections.abc import Callable
from typing import Any

import fits
import models
import pytest
import torch
from torch import Tensor, nn

from lightning_drive import DRIVE, SNIP, Magnitude, Masks, SynFlow, find_masks


def quietly(module: nn.Module, method: Any, **settings: Any) -> Masks:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return find_masks(module, method, **settings)


def sparse(module: nn.Module, sparsity: float, seed: int = 1) -> Masks:
    """Prune a module at random, and return the masks."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: weight.shape for name, weight in module.named_parameters() if weight.ndim > 1}
    order = torch.rand(sum(shape.numel() for shape in sizes.values()), generator=generator).argsort()
    kept = order >= round(sparsity * len(order))
    parts = kept.split([shape.numel() for shape in sizes.values()])
    masks = Masks({name: part.view(shape) for (name, shape), part in zip(sizes.items(), parts, strict=True)})
    masks.apply_(module)
    return masks


def half_dark() -> Any:
    """Batches in which half of the inputs are 0, so that many live weights of the first layer score 0."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 32, 10)
    inputs[:, :, ::2] = 0
    return [(batch, torch.randint(3, (32,))) for batch in inputs]


METHODS: dict[str, Callable[[], Any]] = {
    "DRIVE": lambda: DRIVE(rounds=20),
    "SNIP": SNIP,
    "SynFlow": lambda: SynFlow(rounds=20),
    "Magnitude": lambda: Magnitude(rounds=20),
}
EACH_METHOD = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@EACH_METHOD
def test_at_its_own_sparsity__its_zeros_stay(make: Any, schedule: Any) -> None:
    torch.manual_seed(0)
    module = models.MLP(10, 20, 20, 3)
    masks = sparse(module, 0.7)
    data: dict[str, Any] = {"batches": half_dark(), "loss_fn": models.loss_fn, "example_input": torch.zeros(1, 10)}
    assert quietly(module, make(), sparsity=masks.sparsity, schedule=schedule, **data) == masks


@EACH_METHOD
def test_beyond_it__they_stay_and_more_goes(make: Any) -> None:
    torch.manual_seed(0)
    module = models.MLP(10, 20, 20, 3)
    masks = sparse(module, 0.7)
    data: dict[str, Any] = {"batches": half_dark(), "loss_fn": models.loss_fn, "example_input": torch.zeros(1, 10)}
    further = quietly(module, make(), sparsity=0.9, **data)
    assert further.num_kept == round(0.1 * masks.num_prunable)
    assert all((further[name] <= masks[name]).all() for name in masks)


@EACH_METHOD
def test_below_it__only_zeros_go(make: Any) -> None:
    """The first of them by position are kept, as of any that are equal."""
    torch.manual_seed(0)
    module = models.MLP(10, 20, 20, 3)
    masks = sparse(module, 0.7)
    data: dict[str, Any] = {"batches": half_dark(), "loss_fn": models.loss_fn, "example_input": torch.zeros(1, 10)}
    fewer = quietly(module, make(), sparsity=0.5, **data)
    flat, live = (torch.cat([each.flatten() for each in some.values()]) for some in (fewer, masks))
    assert flat[live].all()
    zeros = flat[~live]
    assert zeros.tolist() == [True] * int(zeros.sum()) + [False] * int((~zeros).sum())
    assert fewer.num_kept == masks.num_prunable // 2 + masks.num_prunable % 2 * (masks.num_prunable // 2 % 2)


@EACH_METHOD
def test_layerwise(make: Any) -> None:
    """Every layer is ranked by itself, and so are its zeros."""
    torch.manual_seed(0)
    module = models.MLP(10, 20, 20, bias=False)
    masks = Masks({name: torch.rand_like(weight) < 2 for name, weight in module.named_parameters()})
    for mask in masks.values():
        mask.view(-1)[torch.randperm(mask.numel())[: mask.numel() // 2]] = False
    masks.apply_(module)
    data: dict[str, Any] = {"batches": half_dark(), "loss_fn": models.loss_fn, "example_input": torch.zeros(1, 10)}
    assert quietly(module, make(), sparsity=0.5, scope="layerwise", **data) == masks


class Fixed:
    """The same scores in every round."""

    rounds = 1
    mode = "eval"

    def __init__(self, *scores: float, dtype: torch.dtype = torch.float32) -> None:
        self.scores = torch.tensor([scores], dtype=dtype)

    def score(self, network: Any) -> dict[str, Tensor]:
        return dict.fromkeys(network.weights, self.scores)


@pytest.mark.parametrize(
    ("weights", "scores", "kept"),
    [
        ([1, 0, 2, 0, 3], [5, 5, 5, 5, 5], [1, 0, 1, 0, 0]),  # at equal score, whatever it is
        ([1, 0, 2, 0, 3], [0, 9, 0, 0, 0], [1, 1, 0, 0, 0]),  # but not at another one
        ([0, 0, 0, 0, 3], [7, 7, 7, 7, 7], [1, 0, 0, 0, 1]),
        ([0, 0, 0, 0, 0], [7, 8, 7, 7, 7], [1, 1, 0, 0, 0]),
        ([1, 2, 3, 4, 5], [7, 7, 7, 7, 8], [1, 0, 0, 0, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_equal_scores(weights: list[float], scores: list[float], kept: list[int], dtype: torch.dtype) -> None:
    module = models.InnerProduct(5)
    module.layer.weight.data = torch.tensor([weights], dtype=torch.float32)
    masks = quietly(module, Fixed(*scores, dtype=dtype), sparsity=0.6)
    assert masks["layer.weight"].flatten().int().tolist() == kept


def test_one_of_the_scores_in_double_precision() -> None:
    """A score that is the threshold only when rounded is none on it."""

    class Mixed(Fixed):
        def score(self, network: Any) -> dict[str, Tensor]:
            above = 1 + torch.full((2, 1), 2.0**-40, dtype=torch.float64)
            return {"0.weight": torch.ones(1, 2), "1.weight": above}

    module = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    module[1].weight.data[0] = 0
    masks = quietly(module, Mixed(), sparsity=0.75)
    assert {name: mask.flatten().tolist() for name, mask in masks.items()} == {
        "0.weight": [False, False],
        "1.weight": [False, True],
    }


def test_warnings() -> None:
    """Where only zeros went, position decided nothing."""
    module = models.InnerProduct(5)
    module.layer.weight.data = torch.tensor([[1.0, 0, 2, 0, 3]])

    def texts(sparsity: float) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            find_masks(module, Fixed(1, 0, 0, 0, 0), sparsity=sparsity)
        return [str(each.message) for each in caught]

    assert texts(0.4) == []
    assert texts(0.2)[0].startswith("In round 1 only 1 weights had a score above zero, fewer than the 4 to keep")
    assert texts(0.6)[0].startswith("In round 1 only 1 weights had a score above zero, fewer than the 2 to keep")


@pytest.mark.parametrize("sparsity", [0.2, 0.4])
def test_all_scores_zero__error(sparsity: float) -> None:
    """Also where the only zero could go: the scores say nothing."""
    module = models.InnerProduct(5)
    with pytest.raises(ValueError, match="zero"):
        find_masks(module, Fixed(0, 0, 0, 0, 0), sparsity=sparsity)


def test_in_a_trainer(tmp_path: Any) -> None:
    """A network that is sparse already, pruned by a callback to the sparsity that it has, and further."""
    for kind in (fits.DRIVEPruningCallback, fits.IMPPruningCallback):
        for sparsity in (0.7, 0.9):
            module = fits.ConvModule()
            masks = sparse(module, 0.7)
            settings = {"warmup_epochs": 0, "rounds": 5} if kind is fits.DRIVEPruningCallback else {"cycles": 1}
            callback = kind(sparsity=sparsity, bn_batches=0, **settings)  # type: ignore[arg-type]
            fits.fit(tmp_path, module, callback, fast_dev_run=True)
            assert callback.masks.num_kept == round(fits.NUM_PRUNABLE * (1 - sparsity))
            if kind is fits.DRIVEPruningCallback:
                assert all((mask <= masks[name]).all() for name, mask in callback.masks.items())
                assert (callback.masks == masks) == (sparsity == 0.7)
