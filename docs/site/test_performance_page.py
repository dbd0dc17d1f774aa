"""The pages of measurements say what the committed results say."""

import json

import pytest
from benchmarks import page
from benchmarks.page import Figure

RESULTS = json.loads(page.RESULTS.read_text(encoding="utf-8"))
FIGURE = Figure(
    "steps", "a step", "s", ours=[2.0, 3.0, 2.2], peers={"dense": [2.0, 2.0, 2.0], "other": [4.0, 4.0, 4.0]}, goal=1.2
)


def texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in page.PAGES]


def test_pages() -> None:
    assert page.filled(texts(), RESULTS) == texts()


def test_filled__place_error() -> None:
    """Nothing that was measured is left out, and no table is left empty, unless it says so."""
    without = {**RESULTS, "benchmarks": RESULTS["benchmarks"][:1]}
    with pytest.raises(ValueError, match=r"The pages have places for \['.*'\], but there are results for"):
        page.filled(texts(), without)


def test_filled__not_measured() -> None:
    """A place may wait for its first results, and has its table when they come."""
    begins, ends = (mark.format("steps") for mark in page.MARKS)
    paper = "\n".join(mark.format("paper") for mark in page.MARKS)
    waiting = f"{begins}\n\n{page.NOT_MEASURED}\n\n{ends}\n{paper}"
    text = waiting + "\n" + "\n".join(mark.format("machine") for mark in page.MARKS)
    [still] = page.filled([text], {**RESULTS, "benchmarks": []})
    assert still.count(page.NOT_MEASURED) == 2
    [first] = [result for result in RESULTS["benchmarks"] if result["extra_info"]["group"] == "steps"][:1]
    [measured] = page.filled([still], {**RESULTS, "benchmarks": [first]})
    assert page.NOT_MEASURED not in measured
    assert first["extra_info"]["case"] in measured


def test_filled__machines_error() -> None:
    """Ratios of different machines do not stand in one table."""
    first, *others = RESULTS["benchmarks"]
    other = {**first, "extra_info": {**first["extra_info"], "machine": "another"}}
    with pytest.raises(ValueError, match=r"do not go in one table \(\w+\): .*another"):
        page.filled(texts(), {**RESULTS, "benchmarks": [other, *others]})


def test_machine() -> None:
    """Each table is of one machine, which the page names with it if there is another."""
    one, two = ({"extra_info": {"group": name, "machine": name, "date": "D", "revision": "R"}} for name in "ab")
    assert page.machine({**RESULTS, "benchmarks": [one]}, ["a"]) == "Measured on a; D (revision R)."
    both = page.machine({**RESULTS, "benchmarks": [one, two, one]}, ["a", "b"])
    assert both == "Measured on a (a); D (revision R).\n\nMeasured on b (b); D (revision R)."


def test_table() -> None:
    """The median of ratios, pair by pair; the goal is about the first peer."""
    assert page.table([FIGURE]).splitlines()[2:] == [
        "| a step | 2.2 s | **1.10** (1.00-1.50) | dense (2 s) | 1.20 met |  |",
        "|  |  | 0.55 (0.50-0.75) | other (4 s) |  |  |",
    ]


def test_speeds() -> None:
    """Rows are cases, columns are sparsities; cells with other peers have a row in a second table."""
    one = Figure("inference", "MLP", "s", [1.0], {"dense": [1.5]}, note="briefly trained", column="90 %")
    two = Figure("inference", "MLP", "s", [1.0], {"dense": [2.5], "onnx": [2.0]}, 1 / 3, "briefly trained", "98 %")
    three = Figure("inference", "VGG", "s", [1.0], {"dense": [4.0]}, 1 / 3, column="98 %")
    assert page.part([one, two, three]).splitlines() == [
        "| times as fast as dense | its time | 90 % | 98 % |",
        "| --- | ---: | ---: | ---: |",
        "| MLP | 2 s | **1.50** | **2.50** (3.0 **missed**) |",
        "| VGG | 4 s |  | **4.00** (3.0 met) |",
        "",
        "| times as fast as | onnx |",
        "| --- | ---: |",
        "| MLP, 98 % | 2.00 |",
        "",
        "briefly trained",
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
    """A part that was measured again takes the place of what it was; each result knows its machine."""
    first, second = RESULTS["benchmarks"][:2]
    again = {**second, "extra_info": {**second["extra_info"], "ours": [1e9]}}
    new = {**first, "fullname": "another"}
    merged = page.merged(RESULTS, {"benchmarks": [new, again]})["benchmarks"]
    assert merged == [first, again, *RESULTS["benchmarks"][2:], new]
    assert first["extra_info"]["machine"] == page.described(RESULTS["machine_info"])
