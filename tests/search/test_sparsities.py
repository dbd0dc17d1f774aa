"""`find_masks` with a sparsity for each group of parameters, other densities, and a schedule that is a function."""

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import models
import pytest
import reference
import torch
from searches import search
from torch import Tensor, nn

from lightning_drive import DRIVE, SNIP, Magnitude, Masks, Random, SynFlow, find_masks
from lightning_drive.network import prunable

History = list[dict[str, Tensor]]
NAMES = ["conv1.weight", "conv2.weight", "fc.weight"]
GOALS: dict[str, dict[str, Any]] = {
    "mapping": {"sparsity": {"conv1.*": 0.5, "*": 0.9}},
    "mapping_layerwise": {"sparsity": {"*": 0.9, "fc.*": 0.25}, "scope": "layerwise"},
    "mapping_erk": {"sparsity": {"fc.*": 0.0, "conv*": 0.8}, "scope": "erk", "schedule": "linear"},
    "erk": {"sparsity": 0.85, "scope": "erk"},
    "function": {"sparsity": 0.85, "schedule": lambda done: math.sin(done * math.pi / 2)},
    "all": {"sparsity": {"*v1*": 0.5, "conv*": 0.7, "*": 0.8}, "scope": "erk", "schedule": lambda done: done**0.5},
}


def conv_net(seed: int = 0) -> tuple[nn.Module, list[models.Batch]]:
    module = models.randomised(models.ConvNet(), seed).double()
    return module, models.make_batches(2, 6, 6, count=7, size=16, seed=seed, dtype=torch.float64)


def history_of(module: nn.Module, method: Any, **settings: Any) -> History:
    """The masks after every round. Tiny networks lose layers and hit zeros: that has tests of its own."""
    history: History = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        masks = find_masks(module, method, on_round=lambda _, masks: history.append(dict(masks)), **settings)
    assert masks == Masks(history[-1])
    return history


def assert_equal(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert list(one) == list(two)
        assert all(one[name].equal(two[name]) for name in one)


# --- the papers' algorithms, by an oracle


@pytest.mark.parametrize("goal", GOALS)
def test_drive_and_snip(goal: str) -> None:
    module, batches = conv_net()
    for method, settings in ((DRIVE(rounds=5), {"rounds": 5}), (SNIP(), {"rounds": 1, "snip": True})):
        expected = reference.drive(module, NAMES, batches, models.loss_fn, **settings, **GOALS[goal])
        assert_equal(history_of(module, method, batches=batches, loss_fn=models.loss_fn, **GOALS[goal]), expected)


@pytest.mark.parametrize("goal", GOALS)
def test_synflow(goal: str) -> None:
    module, batches = conv_net(seed=3)
    expected = reference.synflow(module, NAMES, (2, 6, 6), rounds=6, **GOALS[goal])
    assert_equal(history_of(module, SynFlow(rounds=6), batches=batches, **GOALS[goal]), expected)


@pytest.mark.parametrize("seed", range(60))
def test_magnitude__random_goals(seed: int) -> None:
    """Of networks, patterns, scopes and schedules drawn at random: the masks of the oracle, exact and nested."""
    rng = random.Random(seed)
    module = models.randomised(models.MLP(*(rng.randint(1, 9) for _ in range(rng.randint(2, 6)))), seed)
    weights = prunable.prunable_parameters(module)
    patterns = [*rng.sample([*weights], rng.randint(0, len(weights) - 1)), "*"]
    rng.shuffle(patterns)
    sparsity = {pattern: rng.choice([0.0, 0.5, 0.9, rng.random()]) for pattern in patterns}
    settings: dict[str, Any] = {
        "sparsity": rng.choice([sparsity, rng.random()]),
        "scope": rng.choice(["global", "layerwise", "erk"]),
        "schedule": rng.choice(["exponential", "linear", lambda done: done**2, lambda done: 1.0]),
    }
    rounds = rng.randint(1, 8)
    ones = reference.ones_like_weights(module, [*weights])
    scores = {name: weight.detach().abs() for name, weight in weights.items()}
    expected = reference.prune(lambda *_: scores, ones, rounds=rounds, **settings)
    found = history_of(module, Magnitude(rounds=rounds), **settings)
    assert_equal(found, expected)
    for before, after in zip([ones, *found], found, strict=False):
        assert all((after[name] <= before[name]).all() for name in after)


# --- what is the same


@pytest.mark.parametrize("scope", ["global", "layerwise", "erk"])
def test_one_group_is_no_group(scope: str) -> None:
    module, batches = conv_net()
    settings: dict[str, Any] = {"scope": scope, "batches": batches, "loss_fn": models.loss_fn}
    number = history_of(module, DRIVE(rounds=4), sparsity=0.9, **settings)
    for sparsity in ({"*": 0.9}, {"*.weight": 0.9}, {"*": 0.3, "*.weight": 0.9}):
        assert_equal(history_of(module, DRIVE(rounds=4), sparsity=sparsity, **settings), number)


def test_erk__keeps_as_many_as_global_in_every_round() -> None:
    counts = []
    for scope in ("erk", "global"):
        history = history_of(models.MLP(40, 30, 20, 10), Random(rounds=30), sparsity=0.993, scope=scope)
        counts.append([Masks(masks).num_kept for masks in history])
    assert counts[0] == counts[1]
    assert counts[0][-1] == round(2000 * 0.007)


def test_groups_do_not_see_each_other() -> None:
    """Scores of one group that are a million times larger take nothing from another."""
    module = models.randomised(models.MLP(10, 10, 10))
    masks = find_masks(module, Magnitude(), sparsity={"0.*": 0.7, "2.*": 0.9})
    with torch.no_grad():
        module[0].weight *= 1e6
    assert find_masks(module, Magnitude(), sparsity={"0.*": 0.7, "2.*": 0.9}) == masks
    assert [int(mask.sum()) for mask in masks.values()] == [30, 10]


def test_dense_group() -> None:
    """A sparsity of 0 keeps all of a group, which has masks like the others."""
    masks = find_masks(models.MLP(10, 10, 10), Magnitude(rounds=3), sparsity={"0.*": 0, "*": 0.9})
    assert [int(mask.sum()) for mask in masks.values()] == [100, 10]


def test_order_of_parameters_stays() -> None:
    """Whatever the order of the patterns is."""
    module = models.MLP(5, 5, 5, 5)
    masks = find_masks(module, Magnitude(), sparsity={"4.*": 0.1, "2.*": 0.5, "0.*": 0.9})
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]


# --- going on from masks


@pytest.mark.parametrize("scope", ["global", "layerwise", "erk"])
def test_continues(scope: str) -> None:
    """Every group goes on from its own sparsity; a layer that has less than its share gives the rest to others."""
    module = models.MLP(10, 10, 10, 10, bias=False)
    start = find_masks(module, Random(seed=1), sparsity={"0.*": 0.5, "2.*": 0.9, "4.*": 0.2})
    history = history_of(
        module,
        Random(rounds=2, seed=2),
        sparsity={"0.*": 0.75, "*": 0.8},
        masks=start,
        schedule="linear",
        scope=scope,
    )
    first, rest = ([[int(masks[name].sum()) for name in masks] for masks in history][index] for index in (0, 1))
    assert first[0] == round(100 * (0.5 + 0.25) / 2)
    assert rest[0] == 25
    if scope == "layerwise":
        assert (first[1:], rest[1:]) == ([10, 32], [10, 20])  # 45 % are left, and 32.5 % are due
    else:
        assert (sum(first[1:]), sum(rest[1:])) == (round(200 * (0.45 + 0.2) / 2), 40)
        assert scope == "global" or (first[1:], rest[1:]) == ([10, 55], [10, 30])
    for masks in history:
        assert all((masks[name] <= start[name]).all() for name in masks)


def test_continues__error() -> None:
    """In one of the groups more is gone than is asked for, though not in all together."""
    module = models.MLP(10, 10, 10, bias=False)
    start = find_masks(module, Random(), sparsity={"0.*": 0.9, "*": 0.0})
    with pytest.raises(ValueError, match=r"already have sparsity 0.9 in '0.\*', more than the `sparsity` of 0.8 asked"):
        find_masks(module, Random(), sparsity={"0.*": 0.8, "*": 0.95}, masks=start)


def test_continues_as_one_run() -> None:
    """Three rounds to the square roots of the densities and three more are six rounds."""
    module, batches = conv_net()
    settings: dict[str, Any] = {"loss_fn": models.loss_fn}
    half, whole = ({"conv1.*": 0.5, "*": 0.6}, {"conv1.*": 0.75, "*": 0.84})
    expected = history_of(module, DRIVE(rounds=6), sparsity=whole, batches=batches[:6], **settings)
    first = history_of(module, DRIVE(rounds=3), sparsity=half, batches=batches[:3], **settings)
    rest = history_of(module, DRIVE(rounds=3), sparsity=whole, batches=batches[3:6], masks=Masks(first[-1]), **settings)
    assert_equal([*first, *rest], expected)


# --- what is said


def test_history__of_groups() -> None:
    """More than one ranking has no threshold in common; the counts are those of every parameter all the same."""
    module = models.MLP(10, 10, 10)
    names = [*prunable.prunable_parameters(module)]
    for sparsity, known in (({"0.*": 0.5, "*": 0.9}, False), ({"*": 0.9}, True), (0.9, True)):
        found = search(module, Magnitude(rounds=2), parameters=names, sparsity=sparsity)
        assert [each.threshold is not None for each in found.rounds] == [known] * 2
    [_, last] = search(module, Magnitude(rounds=2), parameters=names, sparsity={"0.*": 0.5, "*": 0.9}).rounds
    assert last.removed == (round(100 * 0.5**0.5) - 50, round(100 * 0.1**0.5) - 10)


def test_zero_cut__names_the_group() -> None:
    module = models.MLP(10, 10, 10, bias=False)
    with torch.no_grad():
        module[2].weight[:, 1:] = 0
    message = r"only 10 weights in '\[2-9\]\*' had a score above zero, fewer than the 20 to keep"
    with pytest.warns(UserWarning, match=message):
        find_masks(module, Magnitude(), sparsity={"[2-9]*": 0.8, "*": 0.5})


def test_erk__fewer_weights_than_layers() -> None:
    """The total is exact, and the layers that are lost are named, also where they had weights until then."""
    module = models.MLP(4, 4, 4, 4, 4)
    with pytest.warns(UserWarning, match="Layer collapse: no weight is left in '4.weight', '6.weight'"):
        masks = find_masks(module, Magnitude(), sparsity=0.97, scope="erk")
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1, 0, 0]


class WithDead(nn.Sequential):
    """A layer that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        self.dead = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](self[0](x)))


@pytest.mark.parametrize("scope", ["global", "erk"])
def test_unreached__has_a_pattern_of_its_own(scope: str) -> None:
    """It is left out, and the others are as without it."""
    module, batches = models.randomised(WithDead()), models.make_batches(6)
    settings: dict[str, Any] = {"scope": scope, "batches": batches, "loss_fn": models.loss_fn}
    with pytest.warns(UserWarning, match="'dead.weight'"):
        masks = find_masks(module, DRIVE(rounds=3), sparsity={"dead.*": 0.5, "0.*": 0.8, "*": 0.9}, **settings)
    others = find_masks(module, DRIVE(rounds=3), sparsity={"0.*": 0.8, "*": 0.9}, exclude=["dead.*"], **settings)
    assert masks == others
    assert [int(mask.sum()) for mask in masks.values()] == [round(72 * 0.2), round(36 * 0.1)]


# --- what is wrong is said before anything is read


class Falling:
    """A schedule that falls in the middle."""

    def __call__(self, done: float) -> float:
        return done if done < 0.75 or done == 1 else 0.5


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"sparsity": {"conv3.*": 0.5, "*": 0.9}},
            ValueError,
            r"`sparsity` pattern 'conv3.\*' matches no .* mean 'conv",
        ),
        ({"sparsity": {"*.bias": 0.5, "*": 0.9}}, ValueError, r"matches only parameters that are not pruned \("),
        (
            {"sparsity": {"conv*": 0.5, "conv1.*": 0.1, "*": 0.9}},
            ValueError,
            r"'conv1.\*' is never used, since .* is matched by 'conv\*' before it. Put it before that",
        ),
        (
            {"sparsity": {"conv1.*": 0.5}},
            ValueError,
            r"no pattern that matches 'conv2.weight', 'fc.weight'. Add '\*' for the rest",
        ),
        ({"sparsity": {"fc.*": 0.5, "*": 0.9}, "exclude": ["fc.*"]}, ValueError, "only parameters that are not pr"),
        ({"sparsity": {"*": 90}}, ValueError, r"`sparsity\['\*'\]` is the fraction removed .* For 90 % pass 0.9"),
        ({"sparsity": 0.5, "schedule": Falling()}, ValueError, "'Falling', .* must never fall, got 0.7 at 0.7 and 0.5"),
        ({"sparsity": 0.5, "schedule": lambda done: done / 2}, ValueError, "must end at 1, got 0.5 at 1"),
        (
            {"sparsity": 0.5, "schedule": "quick"},
            ValueError,
            r"`schedule` must be one of 'exponential', .* or a function",
        ),
        ({"sparsity": 0.5, "schedule": 3}, ValueError, "`schedule` must be one of 'exponential', .* got 3"),
        ({"sparsity": 0.5, "scope": "local"}, ValueError, "`scope` must be one of 'global', 'layerwise', 'erk', got"),
    ],
)
def test_error(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    def batches() -> Iterator[models.Batch]:
        raise AssertionError("a batch was read")
        yield

    module = models.ConvNet()
    before = models.fingerprint(module)
    with pytest.raises(error, match=message):
        find_masks(module, DRIVE(rounds=10), batches=batches(), loss_fn=models.loss_fn, **settings)
    assert models.changes(module, before) == []


def test_frozen__may_have_a_pattern() -> None:
    """It is not pruned now, as without a pattern; without a pattern for it nothing is missing, either."""
    module = models.ConvNet()
    module.conv1.requires_grad_(False)
    expected = find_masks(module, Magnitude(), sparsity={"conv2.*": 0.5, "*": 0.9})
    assert list(expected) == NAMES[1:]
    assert find_masks(module, Magnitude(), sparsity={"conv1.*": 0.1, "conv2.*": 0.5, "*": 0.9}) == expected
    assert find_masks(module, Magnitude(), sparsity={"fc.*": 0.9, "conv2.*": 0.5}) == expected


def test_names_with_brackets() -> None:
    """A pattern is a pattern: a name with its signs is matched where they are escaped."""
    module = nn.Sequential(nn.ModuleDict({"a[0]": nn.Linear(10, 10)}), nn.Linear(10, 10))
    masks = find_masks(module, Magnitude(), sparsity={"0.a[[]0].*": 0.5, "*": 0.9})
    assert [int(mask.sum()) for mask in masks.values()] == [50, 10]
