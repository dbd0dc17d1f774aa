"""The report of forms shows the same table in text, Markdown, HTML and a terminal, and the reasons once each."""

import io

import pytest
from rich.console import Console

from lightning_drive.report.acceleration_report import AccelerationReport, LayerForm, all_dense

LAYERS = (
    LayerForm("conv|1", 0.9, "lines", 0.002, 0.001),
    LayerForm("fc", 0.5, dense_seconds=0.001, sparse_seconds=0.003),
    LayerForm("a", 0.8, reason="<why>"),
    LayerForm("b", 0.7, reason="<why>"),
)
REPORT = AccelerationReport("training step", LAYERS, threads=2, dense_seconds=0.006, seconds=0.004)


def test_text() -> None:
    assert str(REPORT).splitlines() == [
        "training step: 1 of 4 layers with zeros in a sparse form, 1.50 times as fast as dense (2 threads)",
        "layer   form   sparsity  dense ms  sparse ms",
        "conv|1  lines    90.00%     2.000      1.000",
        "fc      dense    50.00%     1.000      3.000",
        "a       dense    80.00%                     ",
        "b       dense    70.00%                     ",
        "all                         6.000      4.000",
        "not measured: a, b: <why>",
    ]


def test_notes__faster_one_by_one() -> None:
    """A layer that is faster alone and stays dense has a reason: the whole, if no other is sparse."""
    left = LayerForm("left", 0.9, dense_seconds=0.007, sparse_seconds=0.001)
    [note] = AccelerationReport("training step", (left,), threads=2, dense_seconds=0.006, seconds=0.006).notes
    assert note.startswith("all layers stay dense: all together are no faster")
    assert AccelerationReport("training step", (left, LAYERS[0]), threads=2).notes == ()
    assert AccelerationReport("training step", (LAYERS[1],), threads=2).notes == ()


def test_to_markdown() -> None:
    lines = REPORT.to_markdown().splitlines()
    assert lines[0] == REPORT.headline
    assert r"| `conv\|1` | lines | 90.00% | 2.000 | 1.000 |" in lines
    assert lines[-1] == r"- not measured: a, b: \<why>"


def test_to_html() -> None:
    assert "not measured: a, b: &lt;why&gt;" in REPORT._repr_html_() == REPORT.to_html()
    assert REPORT.to_html().count("<tr>") == 6


def test_terminal() -> None:
    file = io.StringIO()
    Console(file=file, width=100).print(REPORT)
    assert REPORT.headline in file.getvalue()
    assert "not measured: a, b: <why>" in file.getvalue()


@pytest.mark.parametrize("seconds", [(None, None), (0.006, None), (0.006, 0.0)])
def test_speedup__not_known(seconds: tuple[float | None, float | None]) -> None:
    report = AccelerationReport("inference", LAYERS, 1, *seconds)
    assert report.speedup is None
    assert report.headline == "inference: 1 of 4 layers with zeros in a sparse form (1 thread)"


def test_all_dense__keeps_what_was_measured() -> None:
    [conv, *others] = all_dense(LAYERS)
    assert (conv.form, conv.dense_seconds, conv.sparse_seconds) == ("dense", 0.002, 0.001)
    assert others == list(LAYERS[1:])
