"""The history of rounds agrees with masks and scores, and its counts are exact."""

from collections.abc import Mapping
from typing import Any

import models
import numpy as np
import pytest
import torch
from searches import search as search_alone
from torch import Tensor

from lightning_drive import DRIVE, SNIP, Masks, SynFlow
from lightning_drive.core import grouped_tensors, rounds, selection
from lightning_drive.core.arguments import Scope
from lightning_drive.core.processes import ALONE, Ranks
from lightning_drive.core.rounds import ScoreHistogram
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


def histogram_of(
    scores: Mapping[str, Tensor],
    num_kept: int | Mapping[str, int],
    alive: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[ScoreHistogram | None, dict[str, Tensor]]:
    """Prune once, and return the histogram and the masks."""
    alive = alive or {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    if isinstance(num_kept, int):
        rankings = [selection.keep_highest(scores, num_kept, alive)]
    else:
        rankings = [selection.keep_highest({name: scores[name]}, num_kept[name], alive) for name in scores]
    masks = {name: mask for ranking in rankings for name, mask in ranking.masks.items()}
    thresholds = [ranking.threshold for ranking in rankings]
    return rounds.score_histogram(scores, alive, masks, thresholds, ranks), masks


def histogram(scores: Mapping[str, Tensor], num_kept: int, **others: Any) -> tuple[ScoreHistogram, dict[str, Tensor]]:
    """Prune once, and return the histogram, which there is, and the masks."""
    found, masks = histogram_of(scores, num_kept, **others)
    assert found is not None
    return found, masks


def counted_again(values: Tensor, found: ScoreHistogram) -> np.ndarray:
    """Count by numpy, from the lowest edge on."""
    edges = np.linspace(found.low, found.high, rounds.NUM_BINS + 1)
    logarithms = np.log10(np.maximum(values.double().numpy(), 1e-320))
    return np.histogram(np.maximum(logarithms, found.low - 1), [found.low - 1, *edges])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_kept", [2000, {"a": 300, "b": 900}], ids=["global", "layerwise"])
@pytest.mark.parametrize("density", [1.0, 0.4], ids=["dense", "pruned_before"])
@pytest.mark.parametrize("chunk", [100, 1 << 19], ids=["small_chunks", "one_chunk"])
def test_score_histogram__counts_are_exact(
    dtype: torch.dtype, num_kept: Any, density: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every bin, as counted anew; what was pruned before has no score, whatever stands there."""
    monkeypatch.setattr(grouped_tensors, "CHUNK", chunk)
    given = scores(dtype)
    given["a"][:500] = 0
    generator = torch.Generator().manual_seed(0)
    alive = {name: torch.rand(score.shape, generator=generator) < density for name, score in given.items()}
    for name, mask in alive.items():
        junk = torch.tensor([float("nan"), float("inf"), -1.0, 1e30]).to(dtype).repeat(1000)
        given[name] = torch.where(mask, given[name], junk[: len(mask)])
    found, masks = histogram_of(given, num_kept, alive)
    assert found is not None
    kept = torch.cat([score[masks[name]] for name, score in given.items()])
    pruned = torch.cat([score[alive[name] & ~masks[name]] for name, score in given.items()])
    assert [found.kept_below, *found.kept] == counted_again(kept, found).tolist()
    assert [found.pruned_below, *found.pruned] == counted_again(pruned, found).tolist()
    assert 10**found.low < min(score[masks[name]].min().item() for name, score in given.items())
    assert 10**found.high > kept.max().item() > 0.99 * found.edges[-2]


def check_divided(found: ScoreHistogram, given: Tensor, mask: Tensor) -> None:
    """Check that one edge is the threshold, with nothing kept below it, and nothing but ties pruned above it."""
    threshold = given[mask].min().item()
    near = pytest.approx(threshold, rel=1e-7, abs=1e-7 * (found.width or 0))
    [edge] = [edge for edge in found.edges if edge == near]
    assert edge <= threshold
    place = found.edges.index(edge)
    assert sum(found.kept[place:]) == int(mask.sum())
    assert sum(found.pruned[place:]) == int((given[~mask] == threshold).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("signs", ["positive", "both"])
@pytest.mark.parametrize("num_kept", [1, 470, 999, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_score_histogram__threshold_is_an_edge(dtype: torch.dtype, signs: str, num_kept: int, seed: int) -> None:
    """Also of scores that float32 can hardly tell apart, and of ties."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(1000, generator=generator, dtype=torch.float64)
    for scores in (1 + spread, 1 + 1e-6 * spread, (40 * spread - 20).exp(), (8 * spread).round() + 1):
        given = (scores if signs == "positive" else scores * (spread - 0.4).sign()).to(dtype)
        found, masks = histogram({"a": given}, num_kept)
        check_divided(found, given, masks["a"])


def test_score_histogram__zero_is_an_edge() -> None:
    """Of scores of both signs; many are 0, of which some are kept."""
    given = torch.randn(1000, generator=torch.Generator().manual_seed(0)).pow(3)
    given[::2] = 0
    num_above = int((given > 0).sum())
    found, masks = histogram({"a": given}, num_above + 100)
    check_divided(found, given, masks["a"])


def test_score_histogram__low_scores() -> None:
    """Zeros and a few tiny scores are counted, and do not stretch the axis."""
    given = torch.cat([torch.zeros(5), torch.tensor([1e-30, 1e-20]), torch.linspace(1, 10, 4993)])
    found, _ = histogram_of({"a": given}, 2500)
    assert found is not None
    assert (found.kept_below, 7 <= found.pruned_below <= 7 + 5) == (0, True)
    assert found.low == pytest.approx(0, abs=0.01)


def test_score_histogram__threshold_is_shown() -> None:
    """However few scores are below it."""
    given = torch.cat([torch.tensor([1e-6]), torch.linspace(1, 10, 4999)])
    found, _ = histogram_of({"a": given}, 5000)
    assert found is not None
    assert found.low == pytest.approx(-6, abs=0.01)
    assert (found.kept[0], found.kept_below) == (1, 0)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, None), (2.0, 5), (torch.finfo(torch.float32).max, 5), (1e-45, 5)]
)
def test_score_histogram__all_equal(value: float, expected: int | None) -> None:
    found, _ = histogram_of({"a": torch.full((8,), value)}, 5)
    assert (found and sum(found.kept)) == expected


def test_score_histogram__sample_misses_the_few_alive() -> None:
    """The axis then begins at the threshold; no score is left out."""
    given, alive = torch.arange(1.0, 200_001), torch.zeros(200_000, dtype=torch.bool)
    alive[[7, 8, 9, 10]] = True
    found, _ = histogram_of({"a": given}, 2, {"a": alive})
    assert found is not None
    assert found.low == pytest.approx(1, abs=0.01)
    assert (sum(found.kept), sum(found.pruned), found.pruned_below) == (2, 0, 2)


SIGNED = {
    "both": lambda x: x,
    "mostly_negative": lambda x: torch.where(x > 3, x, -x.abs()),
    "negative": lambda x: -x.abs(),
    "one_below_zero": lambda x: torch.cat([x[1:].abs(), -x[:1].abs()]),
    "wide": lambda x: x.sign() * (10 * x).exp(),
    "huge": lambda x: x.clamp(-1, 1) * (torch.finfo(x.dtype).max / 2),
    "denormal": lambda x: x * torch.finfo(x.dtype).smallest_normal / 8,
    "two_values": lambda x: x.sign(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SIGNED)
@pytest.mark.parametrize("chunk", [100, 1 << 19], ids=["small_chunks", "one_chunk"])
def test_score_histogram__of_both_signs(
    kind: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores are in the bins that their edges say, which are as wide on the axis; pruned ones have no score."""
    monkeypatch.setattr(grouped_tensors, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    scores = SIGNED[kind](torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype))
    alive = torch.rand(5000, generator=generator) < 0.8
    junk = torch.tensor([float("nan"), -float("inf"), float("inf"), -1e38], dtype=dtype).repeat(1250)
    found, masks = histogram({"a": torch.where(alive, scores, junk)}, 1000, alive={"a": alive})
    assert (found.kept_below, found.pruned_below) == (0, 0)
    assert found.width is not None
    places = np.arcsinh(scores.double().numpy() / found.width)
    bins = np.linspace(found.low, found.high, rounds.NUM_BINS + 1)
    kept = masks["a"].numpy()
    assert np.histogram(places[kept], bins)[0].tolist() == list(found.kept)
    assert np.histogram(places[alive.numpy() & ~kept], bins)[0].tolist() == list(found.pruned)
    assert np.arcsinh(np.array(found.edges) / found.width) == pytest.approx(bins, abs=1e-9)


def test_score_histogram__of_both_signs__shows_many_orders_of_magnitude() -> None:
    """Neither are most scores in one bin around zero, nor does a decade at the ends take up one."""
    given = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 1e-6
    given[:2] = torch.tensor([1.0, -1.0])
    found, _ = histogram({"a": given}, 2500)
    assert max(kept + pruned for kept, pruned in zip(found.kept, found.pruned, strict=True)) < 2500
    assert found.edges[-1] / found.edges[-2] < 10


class OfTwo(Ranks):
    """Stands for the first of two ranks, the other of which has scores of zero only."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.tensor([float("inf"), 0.0, 0.0, float("inf")], dtype=torch.float64)])


def test_score_histogram__range_is_that_of_all_ranks() -> None:
    given = scores(torch.float32)
    assert histogram_of(given, 2000, ranks=OfTwo())[0] == histogram_of(given, 2000)[0]
    signed = {name: score - 1 for name, score in given.items()}
    assert histogram_of(signed, 2000, ranks=OfTwo())[0] == histogram_of(signed, 2000)[0]
