"""What is kept of the rounds is what masks and scores say, and little of it."""

from collections.abc import Mapping

import models
import numpy as np
import pytest
import torch
from searches import search as search_alone
from torch import Tensor

from lightning_drive import DRIVE, SNIP, Masks, SynFlow
from lightning_drive.core import history, selection
from lightning_drive.core.arguments import Scope
from lightning_drive.core.selection import keep_highest
from lightning_drive.network import prunable
from lightning_drive.search.loop import Found
from lightning_drive.search.methods import Method


def search(method: Method, scope: Scope = "global", sparsity: float = 0.9) -> tuple[Found, list[Masks]]:
    torch.manual_seed(0)
    module, seen = models.randomised(models.ConvNet()), list[Masks]()
    found = search_alone(
        module,
        method,
        sparsity=sparsity,
        scope=scope,
        parameters=prunable.prunable_parameters(module),
        batches=models.make_batches(2, 6, 6),
        loss_fn=models.loss_fn,
        on_round=lambda _, masks: seen.append(Masks({name: mask.clone() for name, mask in masks.items()})),
    )
    return found, seen


@pytest.mark.parametrize("scope", ["global", "layerwise"])
@pytest.mark.parametrize(
    "method", [DRIVE(rounds=4), SynFlow(rounds=3), SNIP()], ids=lambda method: type(method).__name__
)
def test_search__rounds(method: Method, scope: Scope) -> None:
    found, seen = search(method, scope)
    dense = Masks({name: torch.ones_like(mask) for name, mask in found.masks.items()})
    for index, (each, before, after) in enumerate(zip(found.rounds, [dense, *seen], seen, strict=False), 1):
        assert each.index == index
        assert each.removed == tuple(int((before[name] & ~after[name]).sum()) for name in after)
        assert (each.threshold is None) == (scope == "layerwise")
    assert len(found.rounds) == method.rounds
    assert found.scores is not None
    last = sum(found.rounds[-1].removed)
    assert sum(found.scores.kept) + found.scores.kept_below == found.masks.num_kept
    assert sum(found.scores.pruned) + found.scores.pruned_below == last


def test_search__threshold() -> None:
    """The lowest score of a kept weight, here worked out again from the definition."""
    module = models.randomised(models.ConvNet())
    found, _ = search(SNIP(), sparsity=0.5)
    inputs, labels = models.make_batches(2, 6, 6)[0]
    module.dropout.p = 0.0
    torch.nn.functional.cross_entropy(module(inputs), labels).backward()
    kept = [
        (each * each.grad).abs()[found.masks[name]] for name, each in module.named_parameters() if name in found.masks
    ]
    assert found.rounds[0].threshold == pytest.approx(torch.cat(kept).min().item(), rel=1e-4)


def scores(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).mul(spread).exp().to(dtype)
        for name, size, spread in (("a", 4000, 2.0), ("b", 3000, 1.0))
    }


def exact(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count again, by numpy."""
    values = np.log10(torch.cat([scores[name].double() for name in scores]).numpy())
    kept = torch.cat([masks[name] for name in scores]).numpy()
    return np.histogram(values[kept], edges)[0], np.histogram(values[~kept], edges)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layerwise", [False, True], ids=["global", "layerwise"])
def test_score_histogram(dtype: torch.dtype, layerwise: bool) -> None:
    """As counted anew, but for scores that lie within a bit pattern's bin from an edge."""
    given = scores(dtype)
    rankings = (
        list(selection.keep_highest_each(given, {"a": 300, "b": 900}).values())
        if layerwise
        else [keep_highest(given, 2000)]
    )
    found = history.score_histogram(rankings)
    assert found is not None
    assert len(found.kept) == len(found.pruned) == history.NUM_BINS
    masks = {name: mask for each in rankings for name, mask in each.masks.items()}
    edges = np.linspace(found.low, found.high, history.NUM_BINS + 1)
    for counts, expected in zip((found.kept, found.pruned), exact(given, masks, edges), strict=True):
        assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() < (60 if dtype == torch.float32 else 150)
        assert np.abs(np.subtract(counts, expected)).sum() < 0.1 * expected.sum()
    assert sum(found.kept) + found.kept_below == sum(int(mask.sum()) for mask in masks.values())
    assert sum(found.kept) + found.kept_below + sum(found.pruned) + found.pruned_below == 7000
    assert 10**found.high >= max(score.max().item() for score in given.values())


def test_score_histogram__low_scores() -> None:
    """Zeros and a few tiny scores are counted, and do not stretch the axis."""
    given = torch.cat([torch.zeros(5), torch.tensor([1e-30, 1e-20]), torch.linspace(1, 10, 4993)])
    found = history.score_histogram([keep_highest({"a": given}, 2500)])
    assert found is not None
    assert (found.kept_below, 7 <= found.pruned_below <= 7 + 5) == (0, True)
    assert found.low == pytest.approx(0, abs=0.01)


def test_score_histogram__threshold_is_shown() -> None:
    """However few scores are below it."""
    given = torch.cat([torch.tensor([1e-6]), torch.linspace(1, 10, 4999)])
    found = history.score_histogram([keep_highest({"a": given}, 5000)])
    assert found is not None
    assert found.low == pytest.approx(-6, abs=0.01)


@pytest.mark.parametrize(("value", "expected"), [(0.0, None), (2.0, 5), (torch.finfo(torch.float32).max, 5)])
def test_score_histogram__all_equal(value: float, expected: int | None) -> None:
    found = history.score_histogram([keep_highest({"a": torch.full((8,), value)}, 5)])
    assert (found and sum(found.kept) + found.kept_below) == expected


@pytest.mark.parametrize("num_kept", [1, 60, 250])
def test_score_histogram__few_scores(num_kept: int) -> None:
    """No bin has fewer than none, or a report could not be read again."""
    for seed in range(20):
        given = torch.rand(300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(9)
        found = history.score_histogram([keep_highest({"a": given}, num_kept)])
        assert found is not None
        assert min(*found.kept, *found.pruned, found.kept_below, found.pruned_below) >= 0
        assert sum(found.kept) + found.kept_below == num_kept
        assert sum(found.pruned) + found.pruned_below == 300 - num_kept


def test_score_histogram__already_pruned() -> None:
    """Only what was alive has a score."""
    given, alive = scores(torch.float32), {"a": torch.arange(4000) % 2 == 0, "b": torch.arange(3000) < 10}
    found = history.score_histogram([keep_highest(given, 1000, alive)])
    assert found is not None
    assert sum(found.kept) + found.kept_below == 1000
    assert sum(found.pruned) + found.pruned_below == 1010
