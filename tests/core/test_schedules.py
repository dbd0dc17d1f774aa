"""Densities fall from dense to exactly what was asked for, and are fractions of all weights, never of the survivors."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from lightning_drive.core import schedules

EACH = pytest.mark.parametrize("schedule", list(schedules.SCHEDULES.values()), ids=list(schedules.SCHEDULES))
SPARSITIES = [0.0, 0.1, 0.5, 0.9, 0.98, 0.993, 0.9999]


@pytest.mark.parametrize(
    ("round_index", "num_rounds", "sparsity", "expected"),
    [
        pytest.param(1, 1, 0.9, 0.1, id="one_shot"),
        pytest.param(1, 3, 0.999, 0.1, id="a_tenth_per_round_1"),
        pytest.param(2, 3, 0.999, 0.01, id="a_tenth_per_round_2"),
        pytest.param(3, 3, 0.999, 0.001, id="a_tenth_per_round_3"),
        # DRIVE at 90 % in 100 rounds: 2.276 % of the survivors per round, not 99.9 % in the first one
        pytest.param(1, 100, 0.9, 1 - 0.022763, id="first_of_a_hundred"),
        pytest.param(7, 100, 0.0, 1.0, id="dense"),
    ],
)
def test_exponential(round_index: int, num_rounds: int, sparsity: float, expected: float) -> None:
    assert schedules.exponential(round_index, num_rounds, sparsity) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("round_index", "expected"), [(1, 0.775), (2, 0.55), (3, 0.325), (4, 0.1)])
def test_linear(round_index: int, expected: float) -> None:
    assert schedules.linear(round_index, 4, 0.9) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("round_index", "expected"), [(1, 0.4796875), (2, 0.2125), (3, 0.1140625), (4, 0.1)])
def test_cubic(round_index: int, expected: float) -> None:
    assert schedules.cubic(round_index, 4, 0.9) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_rounds", [1, 7, 100])
def test_cubic__is_that_of_zhu_and_gupta(num_rounds: int) -> None:
    """In their words: sparsities, from the fraction of the window that is over."""
    for sparsity, start in ((0.98, 0.0), (0.98, 0.5)):
        for k in range(1, num_rounds + 1):
            theirs = sparsity + (start - sparsity) * (1 - k / num_rounds) ** 3
            assert 1 - schedules.cubic(k, num_rounds, sparsity, start) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("exponential", [0.5 * 0.2, 0.5 * 0.04]), ("linear", [0.26, 0.02]), ("cubic", [0.08, 0.02])],
    ids=str,
)
def test_schedules__start(name: str, expected: list[float]) -> None:
    found = [schedules.SCHEDULES[name](k, 2, 0.98, 0.5) for k in (1, 2)]
    assert found == pytest.approx(expected, rel=1e-12)


@EACH
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("num_rounds", [1, 2, 7, 100])
class TestScheduleProperties:
    def test_ends_exactly(self, schedule: Any, sparsity: float, num_rounds: int) -> None:
        assert schedule(num_rounds, num_rounds, sparsity, 0.0) == 1 - sparsity

    def test_falls(self, schedule: Any, sparsity: float, num_rounds: int) -> None:
        densities = [schedule(k, num_rounds, sparsity, 0.0) for k in range(1, num_rounds + 1)]
        assert sorted(densities, reverse=True) == densities
        assert 1 - sparsity <= min(densities)
        assert max(densities) <= 1

    def test_can_be_interrupted(self, schedule: Any, sparsity: float, num_rounds: int) -> None:
        """Starting again from the sparsity after half of the rounds gives the other half, but for the steepest."""
        if schedule is schedules.cubic:  # it is steep at its start, wherever that is
            return
        half = (num_rounds + 1) // 2
        reached = 1 - schedule(half, num_rounds, sparsity, 0.0)
        later = [schedule(k, num_rounds, sparsity, 0.0) for k in range(half + 1, num_rounds + 1)]
        again = [schedule(k, num_rounds - half, sparsity, reached) for k in range(1, num_rounds - half + 1)]
        assert again == pytest.approx(later, rel=1e-9)


def test_exponential__same_share_of_survivors() -> None:
    densities = [1.0] + [schedules.exponential(k, 10, 0.9) for k in range(1, 11)]
    shares = [after / before for before, after in pairwise(densities)]
    assert shares == pytest.approx([math.exp(math.log(0.1) / 10)] * 10, rel=1e-12)


@EACH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((0, 3, 0.9, 0.0), r"`round_index` must be in 1..3 \(`num_rounds`\), got 0", id="round_0"),
        pytest.param((4, 3, 0.9, 0.0), r"`round_index` must be in 1..3 \(`num_rounds`\), got 4", id="round_past_end"),
        pytest.param((1, 3, 1.0, 0.0), r"must be in \[0, 1\), got 1.0", id="sparsity_1"),
        pytest.param((1, 3, 0.9, 0.95), r"`start` .* must be in \[0, 0.9\], got 0.95", id="start_above_end"),
        pytest.param((1, 3, 0.9, -0.1), r"`start` .* must be in \[0, 0.9\], got -0.1", id="start_negative"),
    ],
)
def test_schedules__error(schedule: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


# --- a function


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_density__of_a_function(start: float) -> None:
    """In its own words: from the start, so much of the way to the sparsity."""
    for index in range(1, 8):
        expected = 1 - (start + (0.9 - start) * math.sin(index / 7 * math.pi / 2))
        assert schedules.density(lambda done: math.sin(done * math.pi / 2), index, 7, 0.9, start) == pytest.approx(
            expected
        )


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_density__by_name(name: Any) -> None:
    assert schedules.density(name, 2, 5, 0.9, 0.25) == schedules.SCHEDULES[name](2, 5, 0.9, 0.25)


@pytest.mark.parametrize("num_rounds", [1, 3, 7, 100])
@pytest.mark.parametrize(
    "function",
    [
        lambda done: 1.0,
        lambda done: done,
        lambda done: np.float32(done),
        lambda done: torch.tensor(done).sqrt(),
        lambda done: 1 - (1 - done) ** 3,
        lambda done: (1 - math.exp(-5 * done)) / (1 - math.exp(-5)),
        lambda done: round(done),
        lambda done: done * (1 + 1e-12),
        lambda done: done * (1 - 1e-12),
    ],
)
def test_function__ends_exactly(function: Any, num_rounds: int) -> None:
    """Rounding of its arithmetic is no reason to refuse it, and does not reach the count."""
    reached = schedules.fractions_reached(function, num_rounds)
    assert len(reached) == num_rounds
    assert {type(each) for each in reached} == {float}
    assert all(0 <= each <= 1 for each in reached)
    assert schedules.density(function, num_rounds, num_rounds, 0.9) == 1 - 0.9


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda done: 1 - done, ValueError, "must never fall, got 0.75 at 0.25 and 0.5 at 0.5"),
        (lambda done: done / 2, ValueError, "must end at 1, got 0.5 at 1"),
        (lambda done: 2 * done, ValueError, "must return a number from 0 to 1, got 1.5 at 0.75"),
        (lambda done: done - 0.5, ValueError, "must return a number from 0 to 1, got -0.25 at 0.25"),
        (lambda done: math.nan, ValueError, "must return a number from 0 to 1, got nan at 0.25"),
        (lambda done: math.inf, ValueError, "must return a number from 0 to 1, got inf at 0.25"),
        (lambda done: None, TypeError, "`schedule` must be a function that returns a number from 0 to 1, got None"),
        (lambda done: "1", TypeError, "returns a number from 0 to 1, got '1'"),
        (lambda done: True, TypeError, "returns a number from 0 to 1, got True"),
        (lambda done, rounds: done, ValueError, "must take it, but raised TypeError: .* at 0.25"),
        ({0.5: 1.0}.__getitem__, ValueError, "must take it, but raised KeyError: 0.25 at 0.25"),
        (complex, TypeError, "returns a number from 0 to 1, got a complex"),
    ],
)
def test_function__error(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        schedules.fractions_reached(function, 4)


def test_function__error_names_it() -> None:
    with pytest.raises(ValueError, match=r"`schedule` is a function, 'falling', of the fraction of the rounds"):
        schedules.fractions_reached(falling, 4)


def falling(done: float) -> float:
    return 1 - done


@pytest.mark.parametrize(
    ("num_weights", "density", "expected"),
    [
        (1000, 0.02, 20),
        (1000, 0.0204, 20),
        (1000, 0.0206, 21),
        (10, 1 - 0.9, 1),
        (10, 0.001, 1),
        (7, 1.0, 7),
        (1, 0, 1),
    ],
)
def test_num_kept(num_weights: int, density: float, expected: int) -> None:
    assert schedules.num_kept(num_weights, density) == expected


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.5, 0.999999, np.float64(0.9)])
def test_check_sparsity(sparsity: float) -> None:
    schedules.check_sparsity(sparsity)


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        pytest.param(90, ValueError, r"must be in \[0, 1\), got 90. For 90 % pass 0.9", id="percent"),
        pytest.param(1.0, ValueError, r"must be in \[0, 1\), got 1.0", id="one"),
        pytest.param(1, ValueError, r"must be in \[0, 1\), got 1", id="one_int"),
        pytest.param(-0.1, ValueError, r"must be in \[0, 1\), got -0.1", id="negative"),
        pytest.param(float("nan"), ValueError, r"must be in \[0, 1\), got nan", id="nan"),
        pytest.param(float("inf"), ValueError, r"must be in \[0, 1\), got inf", id="inf"),
        pytest.param("0.9", TypeError, r"must be a number in \[0, 1\), got '0.9'", id="text"),
        pytest.param(None, TypeError, r"must be a number in \[0, 1\), got None", id="none"),
        pytest.param(True, TypeError, r"must be a number in \[0, 1\), got True", id="bool"),
    ],
)
def test_check_sparsity__error(sparsity: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        schedules.check_sparsity(sparsity)
