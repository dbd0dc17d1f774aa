"""What a method returns is checked in one place: exactly the prunable parameters, one real number for each weight."""

import re
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from searches import search
from torch import Tensor, nn

from lightning_drive import Masks, Random, find_masks
from lightning_drive.search.methods import check_method

Scores = dict[str, Any]


class Own:
    """A method that returns anything."""

    rounds: Any = 1
    mode: Any = "eval"

    def __init__(self, make: Callable[[Any], Any], **attributes: Any) -> None:
        self.make = make
        vars(self).update(attributes)

    def score(self, network: Any) -> Any:
        return self.make(network)


def net() -> nn.Module:
    return models.randomised(models.MLP(20, 30, 20))


def of_weights(change: Callable[[Scores], Any]) -> Own:
    return Own(lambda network: change({name: weight.detach().abs() for name, weight in network.weights.items()}))


def ranked(dtype: torch.dtype, first: int = 0) -> dict[str, Tensor]:
    """Numbers from ``first`` on, in a random order, for all weights."""
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(0))
    numbers = (order + first).to(dtype)
    return {"0.weight": numbers[:600].view(30, 20), "2.weight": numbers[600:].view(20, 30)}


def as_expected(masks: Masks, scores: Scores, num_kept: int) -> bool:
    """Whether the highest scores are kept, compared as Python numbers."""
    entries = [(name, i, score) for name in scores for i, score in enumerate(scores[name].flatten().tolist())]
    kept = {entry[:2] for entry in sorted(entries, key=lambda entry: -entry[2])[:num_kept]}
    return all(mask == ((name, i) in kept) for name in scores for i, mask in enumerate(masks[name].flatten().tolist()))


NAMES = r"scores for exactly the prunable parameters, the names in `network.weights`, but it"
WRONG: dict[str, tuple[Callable[[Scores], Any], type[Exception], str]] = {
    "left_out": (lambda s: {"0.weight": s["0.weight"]}, ValueError, rf"{NAMES} left out '2.weight'\."),
    "unknown": (lambda s: {**s, "net.0": s["0.weight"]}, ValueError, rf"{NAMES} returned 'net.0' as well\."),
    "both": (
        lambda s: {"0.weight": s["0.weight"], 3: s["2.weight"]},
        ValueError,
        rf"{NAMES} left out '2.weight' and returned 3 as well\.",
    ),
    "nothing": (lambda s: {}, ValueError, rf"{NAMES} left out '0.weight', '2.weight'\."),
    "none": (lambda s: None, TypeError, r"must return a dictionary .*\(0.weight, 2.weight\) to its scores, got None"),
    "list": (lambda s: [*s.values()], TypeError, r"must return a dictionary .* got a list\."),
    "flat": (
        lambda s: {**s, "2.weight": s["2.weight"].flatten()},
        ValueError,
        r"'2.weight' .* one for every weight, in the shape \(20, 30\), got the shape \(600,\)",
    ),
    "per_row": (
        lambda s: {name: score.sum(1) for name, score in s.items()},
        ValueError,
        r"'0.weight' .* in the shape \(30, 20\), got the shape \(30,\)",
    ),
    "transposed": (lambda s: {name: score.t() for name, score in s.items()}, ValueError, r"got the shape \(20, 30\)"),
    "numpy": (
        lambda s: {name: score.numpy() for name, score in s.items()},
        TypeError,
        r"'0.weight' from `Own.score` must be a tensor of the shape \(30, 20\), got a ndarray",
    ),
    "number": (lambda s: {**s, "2.weight": 1.0}, TypeError, r"'2.weight' .* must be a tensor .* got 1.0"),
    "device": (
        lambda s: {**s, "2.weight": s["2.weight"].to("meta")},
        ValueError,
        r"'2.weight' .* on the device of the weights, cpu, got meta",
    ),
    "complex": (
        lambda s: {**s, "2.weight": s["2.weight"] + 0j},
        TypeError,
        r"'2.weight' .* must be real numbers, got torch.complex64",
    ),
    "sparse": (
        lambda s: {**s, "2.weight": s["2.weight"].to_sparse()},
        TypeError,
        r"'2.weight' .* a dense tensor of plain numbers, got a tensor of torch.float32 with the layout torch.sparse",
    ),
    "nan": (lambda s: {**s, "2.weight": s["2.weight"] * torch.nan}, ValueError, r"'2.weight' contain nan or inf"),
    "minus_inf": (lambda s: {**s, "2.weight": s["2.weight"] - torch.inf}, ValueError, r"'2.weight' contain nan or inf"),
    "too_long": (
        lambda s: {**s, "2.weight": torch.full((20, 30), 2**53 + 1)},
        ValueError,
        r"'2.weight' .* integers below 2\*\*53 in size, got larger torch.int64",
    ),
    "far_below_zero": (
        lambda s: {**s, "2.weight": torch.full((20, 30), -(2**60))},
        ValueError,
        r"'2.weight' .* integers below 2\*\*53 in size, got larger torch.int64",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_find_masks__wrong_scores(
    change: Callable[[Scores], Any], error: type[Exception], message: str, scope: Any
) -> None:
    """The error names the parameter, what came and what was expected; the module is left alone."""
    module = net()
    before = models.fingerprint(module)
    with pytest.raises(error, match=message):
        find_masks(module, of_weights(change), sparsity=0.5, scope=scope)
    assert models.changes(module, before) == []


SHORT = (torch.bool, torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize(
    ("dtype", "first"),
    [
        *((dtype, 0) for dtype in (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)),
        *((dtype, -600) for dtype in (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)),
        *((torch.int64, first) for first in (2**24, -(2**24), 2**53 - 2000, -(2**53) + 1)),
        *((torch.int32, first) for first in (2**24, -(2**31), 2**31 - 2000)),
        *((torch.uint16, 0), (torch.uint32, 2**24), (torch.uint64, 2**24)),
        (torch.float64, 2**53 - 2000),
    ],
)
def test_find_masks__exactly(dtype: torch.dtype, first: int, scope: Any) -> None:
    """Numbers that float32 does not hold are compared as they are, whatever their type and sign."""
    scores = ranked(dtype, first)
    masks = find_masks(net(), Own(lambda _: scores), sparsity=0.9, scope=scope)
    if scope == "global":
        assert as_expected(masks, scores, 120)
    else:
        assert all(as_expected(masks, {name: score}, 60) for name, score in scores.items())


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_find_masks__short_numbers(dtype: torch.dtype) -> None:
    """They have many ties, which go by position."""
    scores = {name: (score % 100 / 8).to(dtype) for name, score in ranked(torch.float32).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of truth values and zeros that are cut
        masks = find_masks(net(), Own(lambda _: scores), sparsity=0.8)
    assert as_expected(masks, {name: score.float() for name, score in scores.items()}, 240)


def test_find_masks__of_several_types() -> None:
    """Types may differ between parameters: all are compared as numbers."""
    scores = {"0.weight": ranked(torch.int64, -600)["0.weight"], "2.weight": ranked(torch.float64, -600)["2.weight"]}
    assert as_expected(find_masks(net(), Own(lambda _: scores), sparsity=0.6), scores, 480)


def test_find_masks__order_of_names_does_not_matter() -> None:
    """Ties go to the earlier parameter of the module, in whatever order a method returns them."""
    method = of_weights(lambda s: {name: torch.ones_like(s[name]) for name in reversed(s)})
    masks = find_masks(net(), method, sparsity=0.25)
    assert masks["0.weight"].all()
    assert int(masks["2.weight"].sum()) == 300


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(UserDict, id="mapping"),
        pytest.param(lambda s: {name: nn.Parameter(score) for name, score in s.items()}, id="parameters"),
        pytest.param(
            lambda s: {name: score * torch.ones(1, requires_grad=True) for name, score in s.items()}, id="graph"
        ),
        pytest.param(lambda s: {name: score.t().contiguous().t() for name, score in s.items()}, id="not_contiguous"),
    ],
)
def test_find_masks__forms(change: Callable[[Scores], Any]) -> None:
    module = net()
    masks = find_masks(module, of_weights(change), sparsity=0.7)
    weights = dict(module.named_parameters())
    assert as_expected(masks, {name: weights[name].detach().abs() for name in masks}, 360)


def test_find_masks__the_weights_themselves() -> None:
    """Live weights are scores of both signs, and stay what they are."""
    module = net()
    before = models.fingerprint(module)
    masks = find_masks(module, Own(lambda network: network.weights, rounds=3), sparsity=0.7)
    assert models.changes(module, before) == []
    weights = dict(module.named_parameters())
    assert as_expected(masks, {name: weights[name].detach() for name in masks}, 360)


# --- scores of both signs in the search


def fixed(*rounds_of_scores: list[float]) -> Own:
    scores = iter([torch.tensor([values]) for values in rounds_of_scores])
    return Own(lambda _: {"weight": next(scores)}, rounds=len(rounds_of_scores))


def found(*rounds_of_scores: list[float], sparsity: float) -> tuple[list[int], list[str]]:
    module = nn.Linear(len(rounds_of_scores[0]), 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        masks = find_masks(module, fixed(*rounds_of_scores), sparsity=sparsity, schedule="linear")
    return masks["weight"].flatten().int().tolist(), [str(each.message) for each in caught]


def test_find_masks__both_signs() -> None:
    """Weights with scores below zero go before those with zeros, and zeros of either sign are the same."""
    assert found([-2.0, 0.5, -1, 0.25], sparsity=0.5) == ([0, 1, 0, 1], [])
    assert found([-2.0, -3, -1, -4], sparsity=0.5) == ([1, 0, 1, 0], [])
    assert found([-2.0, -0.0, 0.0, -4], sparsity=0.5) == ([0, 1, 1, 0], [])
    assert found([0.0, -0.0, 0.0, -4, -1], sparsity=0.2) == ([1, 1, 1, 0, 1], [])


def test_find_masks__cut_in_zeros_between_the_signs() -> None:
    """Position decides among zeros, and that is said; that nothing is above them is no error."""
    kept, [text] = found([-2.0, -0.0, 0.0, 0.0], sparsity=0.5)
    assert kept == [0, 1, 1, 0]
    assert text.startswith("In round 1 only 0 weights had a score above zero, fewer than the 2 to keep")
    with pytest.raises(ValueError, match="Every score is zero"):
        found([0.0, -0.0, 0.0, 0.0], sparsity=0.5)


def test_find_masks__zeros_that_fall_below_zero() -> None:
    """A cut in zeros is remembered if what was kept by position is cut by other scores later."""
    _, texts = found([1.0, 0, 0, 0, 0, 0], [-9.0, -1, -2, -3, 0, 0], sparsity=2 / 3)
    assert [text[:10] for text in texts] == ["In round 1"]


def test_search__threshold_and_scores_below_zero() -> None:
    module = nn.Linear(5, 1)
    result = search(module, fixed([-5.0, -1, -3, -2, -4]), sparsity=0.4, parameters=["weight"])
    assert result.rounds[0].threshold == -3
    assert result.scores is not None
    assert (sum(result.scores.kept), sum(result.scores.pruned)) == (3, 2)
    assert result.scores.edges[0] == pytest.approx(-5, rel=0.05)  # a bin of the axis


# --- what is no method


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "`rounds` must be a whole number of at least 1, got 0"),
        ({"rounds": "3"}, ValueError, "`rounds` must be a whole number of at least 1, got '3'"),
        ({"rounds": 2.5}, ValueError, "`rounds` must be a whole number of at least 1, got 2.5"),
        ({"mode": "training"}, ValueError, "`mode` must be one of 'train', 'eval', got 'training'"),
        ({"mode": None}, ValueError, "`mode` must be one of 'train', 'eval', got None"),
        ({"batches_per_round": 0}, ValueError, "`batches_per_round` must be a whole number of at least 1, got 0"),
        ({"reads": "data"}, ValueError, "`reads` must be one of 'loss', 'shape', 'weights', got 'data'"),
        ({"score": {}}, TypeError, r"`score` must be a function `score\(network\)`, got a dict"),
    ],
)
def test_check_method__error(attributes: dict[str, Any], error: type[Exception], message: str) -> None:
    method = Own(lambda _: {}, **attributes)
    with pytest.raises(error, match=message):
        check_method(method)
    with pytest.raises(error, match=message):
        find_masks(net(), method, sparsity=0.5)


def test_check_method__class_error() -> None:
    with pytest.raises(TypeError, match=re.escape("must be an instance of a method, such as `DRIVE(rounds=100)`")):
        find_masks(net(), Random, sparsity=0.5)  # type: ignore[arg-type]
