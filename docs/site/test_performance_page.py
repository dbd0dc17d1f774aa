"""The page of measurements says what the committed results say."""

import json

import pytest
from benchmarks import page
from benchmarks.page import Figure

RESULTS = json.loads(page.RESULTS.read_text(encoding="utf-8"))
FIGURE = Figure(
    "steps", "a step", "s", ours=[2.0, 3.0, 2.2], peers={"dense": [2.0, 2.0, 2.0], "other": [4.0, 4.0, 4.0]}, goal=1.2
)


def test_page() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, RESULTS) == text


def test_filled__place_error() -> None:
    """Nothing that was measured is left out, and no table is left empty."""
    text = page.PAGE.read_text(encoding="utf-8")
    without = {**RESULTS, "benchmarks": RESULTS["benchmarks"][:1]}
    with pytest.raises(ValueError, match=r"The page has places for \['growth', .*, but there are results for"):
        page.filled(text, without)


def test_table() -> None:
    """The median of ratios, pair by pair; the goal is about the first peer."""
    assert page.table([FIGURE]).splitlines()[2:] == [
        "| a step | 2.2 s | **1.10** (1.00-1.50) | dense (2 s) | 1.20 met |  |",
        "|  |  | 0.55 (0.50-0.75) | other (4 s) |  |  |",
    ]


@pytest.mark.parametrize(("limit", "text"), [(None, ""), (1.0, "1.00 **missed**"), (1.1, "1.10 met")])
def test_goal(limit: float | None, text: str) -> None:
    figure = Figure("steps", "a step", "s", ours=[1.1], peers={"dense": [1.0]}, goal=limit)
    assert page.goal(figure) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 s"),
        (2.5e-6, "s", "2.5 µs"),
        (0.0312, "s", "31.2 ms"),
        (1234567, "bytes", "1.23 MB"),
        (12, "bytes", "12 B"),
        (0.8125, "copies of the weights", "0.81 copies of the weights"),
    ],
)
def test_amount(value: float, unit: str, text: str) -> None:
    assert page.amount(value, unit) == text


def test_merged() -> None:
    """A part that was measured again takes the place of what it was; anything from elsewhere is refused."""
    first, second = RESULTS["benchmarks"][:2]
    again = {**second, "extra_info": {**second["extra_info"], "ours": [1e9]}}
    new = {**first, "fullname": "another"}
    found = page.merged(RESULTS, {**RESULTS, "benchmarks": [new, again]})["benchmarks"]
    assert found == [first, again, *RESULTS["benchmarks"][2:], new]
    other = {**RESULTS, "machine_info": {**RESULTS["machine_info"], "threads": 99}}
    with pytest.raises(ValueError, match="Results of different machines or versions do not go together: threads"):
        page.merged(RESULTS, other)
