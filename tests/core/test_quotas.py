"""Numbers are divided exactly, in proportion, and never grow where the total shrinks."""

import random
from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
import reference

from lightning_drive.core import quotas
from lightning_drive.core.quotas import Quota

SHAPES: dict[str, tuple[int, ...]] = {
    "first": (16, 3, 3, 3),
    "second": (32, 16, 3, 3),
    "depthwise": (32, 1, 3, 3),
    "head": (10, 32),
}


@pytest.mark.parametrize("seed", range(300))
def test_proportional__is_handed_out_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"layer{index}" for index in range(rng.randint(1, 7))]
    shares = {name: rng.choice([0, 1, rng.randint(1, 9), rng.randint(1, 400)]) for name in names}
    most = {name: rng.choice([0, 1, rng.randint(1, 9), rng.randint(1, 60)]) for name in names}
    total = rng.randint(0, sum(most.values()) + 2)
    assert quotas.proportional(shares, total, most) == reference.handed_out(shares, total, most)


@pytest.mark.parametrize("seed", range(20))
def test_proportional__nests(seed: int) -> None:
    """However the total falls, nobody gets more than before, also where what is left is all that anyone can have."""
    rng = random.Random(seed)
    shares = {str(index): rng.randint(1, 50) for index in range(rng.randint(2, 6))}
    sizes = {name: rng.randint(1, 80) for name in shares}
    before = sizes
    for total in range(sum(sizes.values()), -1, -1):
        counts = quotas.proportional(shares, total, sizes)
        assert sum(counts.values()) == total
        assert all(counts[name] <= before[name] for name in counts)
        assert counts == quotas.proportional(shares, total, before)
        assert total < len(shares) or min(counts.values()) >= 1
        before = counts


def densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """The densities of Evci et al.: raise all by one factor, clip those beyond 1, and raise the others instead."""
    dense: set[str] = set()
    while True:
        others = {name: shape for name, shape in shapes.items() if name not in dense}
        left = density * sum(map(prod, shapes.values())) - sum(prod(shapes[name]) for name in dense)
        epsilon = left / sum(sum(shape) / prod(shape) * prod(shape) for shape in others.values())
        found = {name: epsilon * sum(shape) / prod(shape) for name, shape in others.items()}
        beyond = {name for name, share in found.items() if share > 1}
        if not beyond:
            return {name: found.get(name, 1.0) for name in shapes}
        dense |= beyond


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.1, 0.05, 0.02])
def test_erk__is_its_paper(density: float) -> None:
    """Every parameter has its density to within a weight, and all together exactly what a global ranking keeps."""
    sizes = quotas.num_weights(SHAPES)
    found = {quota.name: quota.num_kept for quota in quotas.erdos_renyi_kernel("", SHAPES, density, sizes)}
    assert sum(found.values()) == round(sum(sizes.values()) * density)
    for name, share in densities(SHAPES, density).items():
        assert abs(found[name] - sizes[name] * share) <= 1, name


def test_erk__by_hand() -> None:
    """Sums of dimensions 25, 54, 39 and 42, sizes 432, 4608, 288 and 320; the last two are dense at a half."""
    found = [*quotas.erdos_renyi_kernel("", SHAPES, 0.5, quotas.num_weights(SHAPES))]
    assert found == [
        Quota("first", ("first",), 432),
        Quota("second", ("second",), 2824 - 432 - 288 - 320),
        Quota("depthwise", ("depthwise",), 288),
        Quota("head", ("head",), 320),
    ]
    found = [*quotas.erdos_renyi_kernel("", SHAPES, 0.02, quotas.num_weights(SHAPES))]
    assert [quota.num_kept for quota in found] == [18, 38, 27, 30]  # of 17.66, 38.14, 27.54 and 29.66


def test_erk__what_cannot_be_kept_goes_to_the_others() -> None:
    """A parameter that an earlier search emptied keeps what it has, and the total is as exact as before."""
    alive = {**quotas.num_weights(SHAPES), "head": 0, "first": 3}
    found = {quota.name: quota.num_kept for quota in quotas.erdos_renyi_kernel("", SHAPES, 0.1, alive)}
    assert (found["head"], found["first"], sum(found.values())) == (0, 3, round(5648 * 0.1))


def test_erk__odd_shapes() -> None:
    """A vector has density 1 as long as that of nothing else is above it; a number alone is kept."""
    shapes: dict[str, tuple[int, ...]] = {"scale": (), "vector": (7,), "matrix": (30, 30)}
    found = {
        quota.name: quota.num_kept
        for quota in quotas.erdos_renyi_kernel("", shapes, 0.1, {**quotas.num_weights(shapes)})
    }
    assert found == {"scale": 1, "vector": 7, "matrix": round(908 * 0.1) - 8}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (quotas.together, [Quota("group", ("a", "b"), 10)]),
        (quotas.same_density, [Quota("a", ("a",), 1), Quota("b", ("b",), 10)]),
    ],
)
def test_rules(rule: Any, expected: list[Quota]) -> None:
    shapes = {"a": (2, 2), "b": (12, 8)}
    assert [*rule("group", shapes, 0.1, {"a": 4, "b": 96})] == expected
    assert [quota.num_kept for quota in rule("group", shapes, 0.1, {"a": 1, "b": 2})] in ([3], [1, 2])
