"""Pictures show the numbers of the report, with labels that can be read."""

import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import HISTOGRAM, MASKS, full_report, small_report

from lightning_drive import Masks, PruningReport
from lightning_drive.core.rounds import Round, ScoreHistogram
from lightning_drive.report.figures import Picture


@pytest.mark.parametrize(
    "masks", [MASKS, Masks({"a": torch.ones(2, 2, dtype=torch.bool)})], ids=["empty_layer", "dense"]
)
def test_plot(masks: Masks, tmp_path: Path) -> None:
    """A PNG that can be read back and shows more than a blank page; many layers make it taller."""
    image_module = pytest.importorskip("matplotlib.image")
    report = PruningReport.of(masks, None, method="SNIP()", seconds=0.0, epoch=0, step=0, warnings=[])
    report.plot(tmp_path / "density.png")
    pixels = image_module.imread(tmp_path / "density.png")
    assert pixels.shape[1] > 600
    assert pixels.std() > 0.05

    many = replace(report, layers=report.layers * 30)
    many.plot(str(tmp_path / "many.png"))
    assert image_module.imread(tmp_path / "many.png").shape[0] > 2 * pixels.shape[0]


def test_plot__leaves_pyplot_alone(tmp_path: Path) -> None:
    """No global figure is left open, and no backend chosen."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums(), pyplot.get_backend()
    small_report().plot(tmp_path / "density.svg")
    assert (pyplot.get_fignums(), pyplot.get_backend()) == before
    assert "<svg" in (tmp_path / "density.svg").read_text()


def test_plot__without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="needs matplotlib: `pip install matplotlib`"):
        small_report().plot(tmp_path / "density.png")


@pytest.mark.parametrize("kind", ["density", "rounds", "scores", "cycles"])
@pytest.mark.parametrize("num_layers", [1, 2, 54])
def test_figure(kind: Picture, num_layers: int, tmp_path: Path) -> None:
    """Axes say what they show; text stays inside the picture, and that of layers apart from each other."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    layers = tuple(
        replace(full_report().layers[index % 2], name=f"network.stage{index}.convolution.weight")
        for index in range(num_layers)
    )
    rounds = tuple(replace(one, removed=(one.removed * 27)[:num_layers]) for one in full_report().rounds)
    figure = replace(full_report(), layers=layers, rounds=rounds).figure(kind)
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes = figure.axes[:2] if kind == "rounds" else figure.axes
    assert all(panel.get_ylabel() for panel in axes)
    assert axes[-1].get_xlabel()
    inside = figure.bbox.padded(1)
    texts = [figure._suptitle] if figure._suptitle else []
    for panel in figure.axes:
        texts += [panel.title, panel.xaxis.label, panel.yaxis.label, *panel.texts]
        for place, axis in enumerate((panel.xaxis, panel.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_ticklabels() if low <= tick.get_position()[place] <= high]
            boxes = [tick.get_window_extent(renderer) for tick in ticks if tick.get_text()]
            assert not [one for one, two in pairwise(boxes) if one.overlaps(two)]
            texts += ticks
    for text in filter(lambda text: text.get_text(), texts):
        box = text.get_window_extent(renderer)
        assert inside.contains(box.x0, box.y0), text.get_text()
        assert inside.contains(box.x1, box.y1), text.get_text()


def test_figure__scores() -> None:
    """The bars are the counts, kept and pruned, and the line is at the threshold."""
    pytest.importorskip("matplotlib")
    [axes] = full_report().figure("scores").axes
    kept, pruned = axes.patches
    assert tuple(kept.get_data().values) == HISTOGRAM.kept
    assert tuple(pruned.get_data().values - kept.get_data().values) == HISTOGRAM.pruned
    assert tuple(pruned.get_data().baseline) == HISTOGRAM.kept
    assert (kept.get_data().edges[0], kept.get_data().edges[-1]) == pytest.approx((1e-4, 1e-1))
    [line] = axes.lines
    assert line.get_xdata()[0] == 2e-3
    assert "2 are lower" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("threshold", "name"), [(-0.5, "threshold: -0.5"), (0.0, "threshold: 0"), (30, "threshold: 30")]
)
def test_figure__scores_of_both_signs(threshold: float, name: str) -> None:
    """The axis has both signs, linear around 0; the bars and the line are at the scores that they stand for."""
    pytest.importorskip("matplotlib")
    signed = ScoreHistogram(-8.0, 10.0, (0,) * 30 + (1,) * 30, (2,) * 30 + (0,) * 30, 0, 0, width=0.25)
    report = replace(full_report(), scores=signed, rounds=(Round(1, threshold, (100, 700)),))
    [axes] = report.figure("scores").axes
    kept, pruned = axes.patches
    edges = [0.25 * math.sinh(place) for place in (-8.0, 1.0, 10.0)]
    assert [kept.get_data().edges[index] for index in (0, 30, 60)] == pytest.approx(edges)
    assert (sum(kept.get_data().values), sum(pruned.get_data().values)) == (30, 90)
    shown = axes.transData.transform([(edge, 0) for edge in kept.get_data().edges])[:, 0]
    assert [end - start for start, end in pairwise(shown)] == pytest.approx([(shown[-1] - shown[0]) / 60] * 60)
    [line] = axes.lines
    assert (line.get_xdata()[0], line.get_label()) == (threshold, name)
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert "0" in ticks
    assert any(text.startswith("$-10") for text in ticks)


def test_figure__rounds() -> None:
    """A column for each round, a row for each layer, in percent of its weights; empty layers have no colour."""
    matplotlib = pytest.importorskip("matplotlib")
    top, bottom, bar = full_report().figure("rounds").axes
    assert list(top.lines[0].get_ydata()) == [800, 752]
    [image] = bottom.images
    values = image.get_array()
    assert values[0].tolist() == pytest.approx([100 * 188 / 288, 100 * 36 / 288])
    assert values[1, 0] == pytest.approx(100 * 600 / 1300)
    assert values.mask.tolist() == [[False, False], [False, True]]
    assert matplotlib.colors.to_hex(bottom.get_facecolor()) == "#d55e00"
    assert bar.get_xlabel() == "weights left in the layer (%), red: nothing"


def test_figure__cycles() -> None:
    """Over what was left during the cycle, not after its cut; the first metric by default."""
    pytest.importorskip("matplotlib")
    [axes] = full_report().figure("cycles").axes
    assert list(axes.lines[0].get_xdata()) == pytest.approx([100, 100 * 788 / 1588])
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.75]
    assert axes.get_ylabel().startswith("val_loss")
    [axes] = full_report().figure("cycles", metric="val_accuracy").axes
    assert list(axes.lines[0].get_ydata()) == [0.9]


def test_figure__cuts() -> None:
    """Sparsities step up at the cuts, and a metric stands where an epoch ended; without one there is no axis for it."""
    pytest.importorskip("matplotlib")
    axes, other = full_report().figure("cuts").axes
    assert list(axes.lines[0].get_xdata()) == [0, 1.5, 2]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0, 100 * 800 / 1588, 100 * 1552 / 1588])
    assert [*other.lines[0].get_xdata(), *other.lines[0].get_ydata()] == [2, 0.5]
    assert other.get_ylabel() == "val_loss"
    _, other = full_report().figure("cuts", metric="val_accuracy").axes
    assert list(other.lines[0].get_ydata()) == [0.9]
    silent = replace(full_report(), cuts=full_report().cuts[:1])
    assert len(silent.figure("cuts").axes) == 1


def test_figure__nothing_removed() -> None:
    """A sparsity of 0 is no reason to fail."""
    pytest.importorskip("matplotlib")
    report = replace(full_report(), rounds=(Round(1, 0.0, (0, 0)),))
    assert len(report.figure("rounds").axes) == 3
    assert len(report.figure("scores").axes[0].lines) == 0


@pytest.mark.parametrize(
    ("kind", "metric", "message"),
    [
        ("cycle", None, r"`kind` must be one of 'density', 'rounds', 'scores', 'cycles', 'cuts', got 'cycle'"),
        ("scores", None, r"does not have the data for the picture 'scores', only for density, cycles, cuts"),
        ("cycles", "loss", r"`metric` must be one that was logged \(val_loss, val_accuracy\), got 'loss'"),
    ],
)
def test_figure__error(kind: Any, metric: str | None, message: str) -> None:
    report = replace(full_report(), rounds=(), scores=None)
    with pytest.raises(ValueError, match=message):
        report.figure(kind, metric=metric)
