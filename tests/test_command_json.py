"""`report --json` prints JSON that any program can read, with the numbers that the report prints as text."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lightning_drive import PruningReport, command_json
from lightning_drive.core.rounds import Round
from lightning_drive.report.parts import CycleReport, LayerReport

KEYS = [
    *("schema_version", "callback", "sparsity", "effective_sparsity", "overall_sparsity"),
    *("totals", "report", "tensors"),
]
LAYERS = (
    LayerReport("a.weight", (2, 4), num_weights=8, num_kept=2, num_active=1, itemsize=4, multiply_adds=80),
    LayerReport("b.weight", (3, 4), num_weights=12, num_kept=8, num_active=7, itemsize=4, multiply_adds=12),
)
COSTS: dict[str, Any] = {"seconds": 0.25, "epoch": 1, "step": 7, "num_parameters": 25, "other_multiply_adds": 9}
REPORT = PruningReport("SNIP()", LAYERS, digest="", warnings=("a",), **COSTS)


def read(text: str) -> Any:
    """Parse JSON as strict programs do: NaN and infinities are none."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_of_report() -> None:
    """Worked out by hand."""
    printed = read(command_json.of_report("SNIPPruningCallback", REPORT))
    assert list(printed) == KEYS
    assert (printed["schema_version"], printed["callback"]) == (1, "SNIPPruningCallback")
    assert (printed["sparsity"], printed["effective_sparsity"], printed["overall_sparsity"]) == (0.5, 0.6, 0.4)
    assert printed["totals"] == {
        "weights": 20,
        "kept": 10,
        "active": 8,
        "parameters": 25,
        "multiply_adds": 92,
        "nonzero_multiply_adds": 28,
        "other_multiply_adds": 9,
        "dense_bytes": 80,
        "nonzero_bytes": 43,
    }
    assert PruningReport.from_dict(printed["report"]) == REPORT
    assert printed["tensors"] is None


def test_of_report__unknown() -> None:
    """What an old report does not know is null."""
    layer = LayerReport("a.weight", (2, 4), num_weights=8, num_kept=2, num_active=None)
    printed = read(command_json.of_report("", replace(REPORT, layers=(layer,), num_parameters=None)))
    assert (printed["callback"], printed["sparsity"]) == (None, 0.75)
    known = {name: total for name, total in printed["totals"].items() if total is not None}
    assert known == {"weights": 8, "kept": 2, "other_multiply_adds": 9}
    assert printed["effective_sparsity"] is printed["overall_sparsity"] is None


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_of_report__numbers_that_json_cannot_write(odd: float) -> None:
    """A metric that was not finite, or a threshold of a round that had none, is null."""
    cycle = CycleReport(1, 10, {"rounds": odd}, {"val_loss": odd, "val_acc": 0.5})
    report = replace(REPORT, cycles=(cycle,), rounds=(Round(1, odd, (6, 4)),))
    printed = read(command_json.of_report("IMPPruningCallback", report))["report"]
    assert printed["cycles"][0]["metrics"] == {"val_loss": None, "val_acc": 0.5}
    assert printed["cycles"][0]["phases"] == {"rounds": None}
    assert printed["rounds"][0]["threshold"] is None


@pytest.mark.parametrize("zeros", [3, None])
def test_of_zeros(zeros: int | None) -> None:
    counts = [
        {"name": "a", "shape": [2, 2], "numbers": 4, "zeros": zeros},
        {"name": "b", "shape": [1], "numbers": 1, "zeros": 1},
    ]
    printed = read(command_json.of_zeros("", counts))
    assert list(printed) == KEYS
    assert printed["totals"] == {"numbers": 5, "zeros": None if zeros is None else 4}
    assert printed["tensors"] == counts
    assert {name for name in KEYS if printed[name] is None} == {
        *("callback", "report", "sparsity", "effective_sparsity", "overall_sparsity")
    }
