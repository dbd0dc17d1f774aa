"""What every benchmark can rely on: the paper's networks, all cores, a quiet Lightning, and a line in the table."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import page
from benchmarks.page import Figure

sys.path.append(str(page.ROOT / "examples"))

Taken = tuple[list[float], dict[str, list[float]]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Replace the fixture of the tests: here all cores take part."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    lightning.setLevel(level)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def figure(benchmark: Any, capfd: pytest.CaptureFixture[str]) -> Callable[..., Figure]:
    """Return a function that takes measurements and puts them down as a line of the table."""

    def record(group: str, case: str, unit: str, take: Callable[[], Taken], **more: Any) -> Figure:
        ours, peers = benchmark.pedantic(take)
        found = Figure(group, case, unit, ours, peers, **more)
        benchmark.extra_info.update(found.to_dict())
        with capfd.disabled():
            print(f"\n{group}: {page.sentence(found)}")
        return found

    return record


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["threads"] = torch.get_num_threads()
    machine_info["versions"] = page.versions()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Write the tables of the pages, where the results are those that the pages are made from."""
    page.stamp(output_json)
    if Path(config.getoption("benchmark_json").name).resolve() == page.RESULTS:
        page.write(output_json)
