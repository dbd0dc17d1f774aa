"""The least of several runs counts, and what is out of the question is not run again; the clock is the test's."""

from collections import Counter
from collections.abc import Callable

import pytest

from lightning_drive.acceleration import choice, timing


class Clock:
    """Stands still but for what work says that it takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.runs: Counter[str] = Counter()
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Make work that takes these seconds, run by run, and the last of them from then on."""

        def run() -> None:
            self.now += seconds[min(self.runs[name], len(seconds) - 1)]
            self.runs[name] += 1

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_least_seconds__without_the_first_run(clock: Clock) -> None:
    works = {"a": clock.work("a", 0.1, 3e-3, 2e-3, 4e-3), "b": clock.work("b", 1e-3, 3e-3)}
    assert timing.least_seconds(works) == pytest.approx({"a": 2e-3, "b": 3e-3})


def test_least_seconds__until_it_is_clear(clock: Clock) -> None:
    """All run twice at least, so that one slow run decides nothing; then what took twice as long is dropped."""
    works = {"a": clock.work("a", 1e-3), "b": clock.work("b", 1e-3, 5e-3, 1.5e-3), "c": clock.work("c", 3e-3)}
    assert timing.least_seconds(works) == pytest.approx({"a": 1e-3, "b": 1.5e-3, "c": 3e-3})
    assert clock.runs["c"] == 3
    assert clock.runs["a"] == clock.runs["b"] > 3
    works = {"d": clock.work("d", 1e-3), "e": clock.work("e", 3e-3)}
    timing.least_seconds(works)
    assert clock.runs["d"] == clock.runs["e"] == 3  # nothing is left to compare with


def test_least_seconds__not_for_long(clock: Clock) -> None:
    timing.least_seconds({"a": clock.work("a", 1.0), "b": clock.work("b", 1.0)})
    assert clock.runs == {"a": 3, "b": 3}


def test_least_seconds__equally_often_on_all_ranks(clock: Clock) -> None:
    timing.least_seconds({"a": clock.work("a", 1e-3), "b": clock.work("b", 1.0)}, runs=4)
    assert clock.runs == {"a": 5, "b": 5}


@pytest.mark.parametrize(("sparse", "form"), [(0.94e-3, "lines"), (0.96e-3, "dense"), (2e-3, "dense")])
def test_fastest__by_a_margin(clock: Clock, sparse: float, form: str) -> None:
    works = {"windows": clock.work("windows", 3e-3), "lines": clock.work("lines", sparse)}
    chosen = choice.fastest("layer", 0.9, clock.work("dense", 1e-3), works)
    assert (chosen.form, chosen.dense_seconds) == (form, pytest.approx(1e-3))
    assert chosen.sparse_seconds == pytest.approx(sparse)


def test_fastest__no_forms(clock: Clock) -> None:
    chosen = choice.fastest("layer", 0.9, clock.work("dense", 1e-3), {})
    assert (chosen.form, chosen.reason) == ("dense", "no sparse form gives its outputs")
