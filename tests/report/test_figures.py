"""Pictures show the numbers of the report, with labels that can be read."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from reports import HISTOGRAM, MASKS, full_report, small_report

from lightning_drive import Masks, PruningReport
from lightning_drive.core.rounds import Round, ScoreHistogram
from lightning_drive.report.figures import Picture
from lightning_drive.report.parts import CutReport, CycleReport, LayerReport


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


@pytest.mark.parametrize("kind", get_args(Picture))
def test_plot__without_matplotlib(kind: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", ".figure", ".colors", ".ticker", ".patheffects"):
        monkeypatch.setitem(sys.modules, f"matplotlib{name}", None)
    with pytest.raises(ModuleNotFoundError, match="needs matplotlib: `pip install matplotlib`"):
        full_report().plot(tmp_path / "picture.png", kind)


NAMES = {"short": "network.{}.weight", "long": "model.backbone.encoder.stage{}.convolution.weight"}


def report_of(num_layers: int, names: str, num_rounds: int) -> PruningReport:
    """Return a report of layers that come down to 2 %, and of every third one that ends up empty half way."""
    sizes = [40 * 10 ** (index % 4) for index in range(num_layers)]

    def left(done: int) -> list[int]:
        lost = [index % 3 == 1 and 2 * done >= num_rounds for index in range(num_layers)]
        return [
            0 if gone else round(size * 0.02 ** (done / num_rounds)) for gone, size in zip(lost, sizes, strict=True)
        ]

    def removed(index: int) -> tuple[int, ...]:
        return tuple(had - has for had, has in zip(left(index - 1), left(index), strict=True))

    metric = "validation/multiclass_accuracy_of_the_top_five" if names == "long" else "val_accuracy"
    parts = [(index, sum(left(index)), {metric: 0.97531 + 1e-5 * index}) for index in range(1, num_rounds + 1)]
    return replace(
        full_report(),
        layers=tuple(
            LayerReport(NAMES[names].format(index), (size,), size, kept, None)
            for index, (size, kept) in enumerate(zip(sizes, left(num_rounds), strict=True))
        ),
        rounds=tuple(Round(index, 2e-3, removed(index)) for index, _, _ in parts),
        cycles=tuple(CycleReport(index, kept, {}, metrics) for index, kept, metrics in parts),
        cuts=tuple(CutReport(index, 2 + index / 4, 0, kept, metrics) for index, kept, metrics in parts),
    )


@pytest.mark.parametrize(
    ("kind", "num_layers"),
    [
        *((kind, num_layers) for kind in ("density", "rounds") for num_layers in (1, 3, 20, 54)),
        *(("scores", 3), ("cycles", 3), ("cuts", 3)),
    ],
)
@pytest.mark.parametrize(("names", "num_rounds"), [("short", 2), ("long", 100)])
def test_figure(kind: Picture, num_layers: int, names: str, num_rounds: int) -> None:
    """Axes say what they show; text stays inside the picture, and no two texts of an axis or of panels overlap."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    figure = report_of(num_layers, names, num_rounds).figure(kind)
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    panels = [*figure.axes, *(child for panel in figure.axes for child in panel.child_axes)]
    assert all(panel.get_ylabel() or panel.get_xlabel() for panel in panels)
    inside = figure.bbox.padded(1)
    texts, around = [], [figure._suptitle] if figure._suptitle else []
    for panel in panels:
        around += [panel.title, panel.xaxis.label, panel.yaxis.label]
        for place, axis in enumerate((panel.xaxis, panel.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_ticklabels() if low <= tick.get_position()[place] <= high]
            shown = [tick for tick in ticks if tick.get_text() and tick.get_visible()]
            assert len(shown) != 1 or num_layers == 1
            assert not overlapping(shown, renderer)
            texts += shown
        texts += panel.texts
    around = [text for text in around if text.get_text()]
    assert not overlapping(around, renderer)
    assert not [(one, other) for one in around for other in texts if overlapping([one, other], renderer)]
    for text in [*texts, *around]:
        box = text.get_window_extent(renderer)
        assert inside.contains(box.x0, box.y0), text.get_text()
        assert inside.contains(box.x1, box.y1), text.get_text()


def overlapping(texts: Sequence[Any], renderer: Any) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    return [(one, other) for (one, first), (other, second) in combinations(boxes, 2) if first.overlaps(second)]


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
    assert ticks == ["-100", "-10", "-1", "0", "1", "10", "100", "1,000"]


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
    assert matplotlib.colors.to_hex(bottom.get_facecolor()) == "#cc0000"
    assert bottom.patch.get_hatch()
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
    silent = replace(full_report(), cuts=tuple(replace(cut, metrics={}) for cut in full_report().cuts))
    assert len(silent.figure("cuts").axes) == 1


@pytest.mark.parametrize(
    ("unit", "changes"),
    [("round", {"cycles": (), "cuts": ()}), ("cycle", {"cycle": 2, "cuts": ()}), ("cut", {"cycles": ()})],
)
def test_figure__names_what_the_method_does(unit: str, changes: dict[str, Any]) -> None:
    """IMP has cycles, gradual pruning has cuts, and all others have rounds."""
    pytest.importorskip("matplotlib")
    report = replace(full_report(), **changes)
    top, bottom, _ = report.figure("rounds").axes
    assert (top.get_ylabel(), bottom.get_xlabel()) == (f"weights removed\nin the {unit}", unit)
    [axes] = report.figure("scores").axes
    assert axes.get_title() == f"Scores of the weights that were left for the last {unit} of DRIVE"
    assert axes.patches[1].get_label().startswith(f"pruned in this {unit}: ")


def test_figure__of_a_single_round() -> None:
    """A single round, cycle or cut is no curve; its scores are those of all weights."""
    pytest.importorskip("matplotlib")
    full = full_report()
    report = replace(full, rounds=full.rounds[:1], cycles=full.cycles[:1], cuts=full.cuts[:1], cycle=1)
    assert report.pictures == ["density", "scores"]
    assert report.figure("scores").axes[0].get_title() == "Scores of all weights in the only cycle of DRIVE"
    with pytest.raises(ValueError, match="has a single round, cycle or cut"):
        report.figure("rounds")


@pytest.mark.parametrize("num_kept", [1, 1000])
def test_figure__axes_end_where_data_can(num_kept: int) -> None:
    """There is nothing beyond 100 %, and a point there is whole."""
    pytest.importorskip("matplotlib")
    layers = (
        LayerReport("a.weight", (1000,), 1000, 1000, None),
        LayerReport("b.weight", (10**6,), 10**6, num_kept, None),
    )
    [density] = replace(full_report(), layers=layers).figure("density").axes
    assert density.get_xlim()[1] == 100
    assert not density.lines[1].get_clip_on()
    report = report_of(3, "short", 4)
    assert report.figure("cycles").axes[0].get_xlim()[0] == 100
    cuts, _ = report.figure("cuts").axes
    assert (cuts.get_xlim(), cuts.get_ylim()) == ((0, 3), (0, 100))


def test_figure__nothing_removed() -> None:
    """A sparsity of 0 is no reason to fail."""
    pytest.importorskip("matplotlib")
    report = replace(full_report(), rounds=(Round(1, 0.0, (0, 0)), Round(2, 0.0, (0, 0))))
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
