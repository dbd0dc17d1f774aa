"""A goal checks itself, and says how many weights are left after each round, for each way to rank them."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from lightning_drive.core import schedules
from lightning_drive.core.goal import Goal


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        pytest.param({"sparsity": 90}, ValueError, r"must be in \[0, 1\), got 90. For 90 % pass 0.9.", id="percent"),
        pytest.param({"sparsity": 1.0}, ValueError, r"must be in \[0, 1\), got 1.0", id="all"),
        pytest.param({"sparsity": "0.9"}, TypeError, "must be a number", id="text"),
        pytest.param({"sparsity": 0.5, "schedule": "square"}, ValueError, "`schedule` must be", id="schedule"),
        pytest.param({"sparsity": 0.5, "scope": "local"}, ValueError, "`scope` must be", id="scope"),
    ],
)
def test_goal__refuses(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Goal(**settings)


def test_goal__is_frozen_and_plain() -> None:
    goal = Goal(True - 0.5)
    assert type(goal.sparsity) is float
    with pytest.raises(FrozenInstanceError):
        goal.sparsity = 0.1  # type: ignore[misc]


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_density__is_that_of_the_schedule(schedule: Any) -> None:
    goal = Goal(0.9, schedule)
    for index in range(1, 6):
        assert goal.density(index, 5) == schedules.SCHEDULES[schedule](index, 5, 0.9, 0.0)
        assert goal.density(index, 5, start=0.5) == schedules.SCHEDULES[schedule](index, 5, 0.9, 0.5)
    assert goal.density(1, 5, start=0.5) < goal.density(1, 5)


@pytest.mark.parametrize(
    ("goal", "sizes", "rounds", "expected"),
    [
        pytest.param(Goal(0.99), [100, 900], 2, (100, 10), id="global"),
        pytest.param(Goal(0.9, "linear", "layerwise"), [2, 8], 1, (2,), id="layerwise_keeps_one_each"),
        pytest.param(Goal(0.9, "linear"), [2, 8], 1, (1,), id="global_keeps_one"),
        pytest.param(Goal(0.0), [7], 3, (7, 7, 7), id="dense"),
    ],
)
def test_kept(goal: Goal, sizes: list[int], rounds: int, expected: tuple[int, ...]) -> None:
    assert goal.kept(iter(sizes), rounds) == expected
