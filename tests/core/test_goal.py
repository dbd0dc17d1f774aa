"""A goal checks itself, and says how many weights are left after each round, for each way to rank them."""

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from lightning_drive.core import schedules
from lightning_drive.core.goal import Goal, Group
from lightning_drive.core.quotas import Quota


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


SHAPES = {"a": (10, 10), "b": (30, 30), "c.d": (5, 4)}
SIZES = {"a": 100, "b": 900, "c.d": 20}


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cubic", lambda done: done])
def test_quotas__are_those_of_the_schedule(schedule: Any) -> None:
    goal = Goal(0.9, schedule)
    half = {"a": 100, "b": 400, "c.d": 10}
    for index in range(1, 6):
        for start, begun in (({}, 0.0), (half, 0.5)):
            density = schedules.density(schedule, index, 5, 0.9, begun)
            assert goal.quotas(SHAPES, index, 5, start=start) == [Quota("", ("a", "b", "c.d"), round(1020 * density))]


@pytest.mark.parametrize(
    ("goal", "sizes", "rounds", "expected"),
    [
        pytest.param(Goal(0.99), [100, 900], 2, (100, 10), id="global"),
        pytest.param(Goal(0.9, "linear", "layerwise"), [2, 8], 1, (2,), id="layerwise_keeps_one_each"),
        pytest.param(Goal(0.9, "linear", "erk"), [2, 8], 1, (1,), id="erk_keeps_as_many_as_global"),
        pytest.param(Goal(0.9, "linear"), [2, 8], 1, (1,), id="global_keeps_one"),
        pytest.param(Goal(0.0), [7], 3, (7, 7, 7), id="dense"),
        pytest.param(Goal({"0": 0.5, "*": 0.9}, "linear"), [100, 900], 2, (570, 140), id="mapping"),
        pytest.param(Goal(0.8, lambda done: done**2), [1000], 2, (800, 200), id="function"),
    ],
)
def test_kept(goal: Goal, sizes: list[int], rounds: int, expected: tuple[int, ...]) -> None:
    assert goal.kept({str(index): (size,) for index, size in enumerate(sizes)}, rounds) == expected


# --- a mapping


@pytest.mark.parametrize(
    ("sparsity", "groups"),
    [
        ({"a": 0.5, "*": 0.9}, [Group("a", ("a",), 0.5), Group("*", ("b", "c.d"), 0.9)]),
        ({"*": 0.9, "a": 0.5}, [Group("a", ("a",), 0.5), Group("*", ("b", "c.d"), 0.9)]),
        ({"[ab]": 0.5, "b": 0.7, "*": 0.9}, [Group("[ab]", ("a", "b"), 0.5), Group("*", ("c.d",), 0.9)]),
        (
            {"b": 0.7, "[ab]": 0.5, "c.*": 0.0},
            [*map(Group, ("b", "[ab]", "c.*"), (("b",), ("a",), ("c.d",)), (0.7, 0.5, 0.0))],
        ),
        ({"*": 0.9}, [Group("", ("a", "b", "c.d"), 0.9)]),
        ({"*": 0.9, "?": 0.5, "c*": 0}, [Group("?", ("a", "b"), 0.5), Group("c*", ("c.d",), 0.0)]),
        (0.9, [Group("", ("a", "b", "c.d"), 0.9)]),
    ],
    ids=str,
)
def test_groups(sparsity: Any, groups: list[Group]) -> None:
    """The first pattern that matches decides, and the rest is the rest wherever it stands, as in sorted YAML."""
    goal = Goal(sparsity)
    assert goal.groups(SHAPES) == groups
    assert goal.groups(SHAPES) == Goal(goal.sparsity).groups(SHAPES)


@pytest.mark.parametrize("scope", ["global", "layerwise", "erk"])
@pytest.mark.parametrize("schedule", ["exponential", "cubic"])
def test_quotas__scope_applies_within_groups(scope: Any, schedule: Any) -> None:
    """Every group has the quotas that it would have by itself."""
    goal = Goal({"b": 0.7, "*": 0.95}, schedule, scope)
    for index in range(1, 5):
        expected = []
        for name, names, sparsity in (("b", ["b"], 0.7), ("*", ["a", "c.d"], 0.95)):
            own = Goal(sparsity, schedule, scope).quotas({each: SHAPES[each] for each in names}, index, 4)
            expected += [quota._replace(name=quota.name or name) for quota in own]
        assert goal.quotas(SHAPES, index, 4) == expected


def test_quotas__never_more_than_are_alive() -> None:
    """What is gone stays gone: counts fall to what is there, by a group or by a parameter."""
    alive = {"a": 3, "b": 5, "c.d": 0}
    assert [Goal(0.5).quotas(SHAPES, 1, 1, alive=alive)] == [[Quota("", ("a", "b", "c.d"), 8)]]
    for scope in ("layerwise", "erk"):
        found = Goal(0.5, scope=scope).quotas(SHAPES, 1, 1, alive=alive)  # type: ignore[arg-type]
        assert [(quota.name, quota.num_kept) for quota in found] == [("a", 3), ("b", 5)]


def test_overall_sparsity() -> None:
    assert Goal(0.3).overall_sparsity(SHAPES) == 0.3
    assert Goal({"b": 0.7, "*": 0.5}).overall_sparsity(SHAPES) == pytest.approx((630 + 60) / 1020)


def test_check_start() -> None:
    goal = Goal({"b": 0.7, "*": 0.5})
    goal.check_start(SHAPES, {"a": 50, "b": 270, "c.d": 10})
    with pytest.raises(ValueError, match=r"have sparsity 0.711111 in 'b', more than the `sparsity` of 0.7 asked"):
        goal.check_start(SHAPES, {"a": 100, "b": 260, "c.d": 20})
    with pytest.raises(ValueError, match=r"already have sparsity 0.5, more than the `sparsity` of 0.4 asked"):
        Goal(0.4).check_start(SHAPES, {name: size // 2 for name, size in SIZES.items()})


def test_check_start__rounds_as_the_scope_does() -> None:
    """Half of five weights is two, in each of a hundred parameters: these are as many as are asked for."""
    shapes = {str(index): (5,) for index in range(100)}
    Goal(0.5, scope="layerwise").check_start(shapes, dict.fromkeys(shapes, 2))
    with pytest.raises(ValueError, match=r"already have sparsity 0.6, more than"):
        Goal(0.5).check_start(shapes, dict.fromkeys(shapes, 2))


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        ({}, ValueError, "at least one glob pattern to one, got an empty mapping"),
        (
            {"a": 90},
            ValueError,
            r"`sparsity\['a'\]` is the fraction removed .* in \[0, 1\), got 90. For 90 % pass 0.9",
        ),
        ({"*": 1.0}, ValueError, r"`sparsity\['\*'\]` .* must be in \[0, 1\), got 1.0"),
        ({"*": -0.1}, ValueError, r"must be in \[0, 1\), got -0.1"),
        ({"*": float("nan")}, ValueError, r"must be in \[0, 1\), got nan"),
        ({"*": "0.9"}, TypeError, r"`sparsity\['\*'\]` .* must be a number in \[0, 1\), got '0.9'"),
        ({"a": {"b": 0.9}}, TypeError, r"`sparsity\['a'\]` .* must be a number in \[0, 1\), got a dict"),
        ({1: 0.9}, TypeError, "glob patterns over parameter names, .* got a mapping with 1 among its patterns"),
        (
            [("a", 0.9)],
            TypeError,
            "number in .*, or a mapping from glob patterns to such numbers, got a list",
        ),
    ],
    ids=str,
)
def test_mapping__error(sparsity: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Goal(sparsity)


def test_groups__error() -> None:
    message = r"no pattern that matches 'a', 'c.d'. Add '\*' for the rest, such as {..., '\*': 0} to leave it dense"
    with pytest.raises(ValueError, match=message):
        Goal({"b": 0.5}).groups(SHAPES)


def test_mapping__is_plain() -> None:
    """Of numbers and texts of numpy, nothing is left; what is given is not kept."""
    given = {"*": np.float64(0.5), np.str_("b"): np.array(0.25)}
    sparsity: Any = Goal(given).sparsity  # type: ignore[arg-type]
    given["*"] = np.float64(0.9)
    assert list(sparsity.items()) == [("b", 0.25), ("*", 0.5)]
    assert {type(each) for pair in sparsity.items() for each in pair} == {str, float}


# --- a function


def test_function__is_a_schedule() -> None:
    """The identity is the linear schedule, bit for bit, and the cube of what is left the cubic one."""
    for name, function in (("linear", lambda done: done), ("cubic", lambda done: 1 - (1 - done) ** 3)):
        for rounds in (1, 3, 50):
            named, own = (Goal(0.987, schedule).kept(SHAPES, rounds) for schedule in (name, function))  # type: ignore[arg-type]
            assert named == own


def test_check_schedule() -> None:
    """It is asked for what the rounds are, in their order, and nothing else."""
    asked: list[float] = []
    goal = Goal(0.5, lambda done: (asked.append(done), done)[1])  # type: ignore[func-returns-value]
    goal.check_schedule(4)
    assert asked == [0.25, 0.5, 0.75, 1.0]
    Goal(0.5).check_schedule(4)


def test_settings() -> None:
    """Plain types, in which what differs in what is pruned differs, and nothing else."""
    goal = Goal({"b": 0.5, "*": 0.9}, np.sqrt, "erk")
    assert goal.settings(4) == {
        "sparsity": [["b", 0.5], ["*", 0.9]],
        "schedule": [0.5, 0.5**0.5, 0.75**0.5, 1.0],
        "scope": "erk",
    }
    assert Goal(0.5).settings(7) == {"sparsity": 0.5, "schedule": "exponential", "scope": "global"}
    assert Goal({"a*": 0.5, "*b": 0.9}).settings(1) != Goal({"*b": 0.9, "a*": 0.5}).settings(1)
    assert Goal({"*": 0.5, "b": 0.9}).settings(1) == Goal({"b": 0.9, "*": 0.5}).settings(1)
