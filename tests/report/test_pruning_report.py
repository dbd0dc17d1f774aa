"""A report says in words, numbers, plain types and pictures what the masks say."""

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from fits import ConvModule
from torch import nn

from lightning_drive import Masks, PruningReport, save_sparse
from lightning_drive.core.history import Round, ScoreHistogram
from lightning_drive.report.figures import Picture
from lightning_drive.report.parts import CycleReport, LayerReport

CONV = torch.zeros(8, 4, 3, 3, dtype=torch.bool)
CONV[0] = True
FC = torch.zeros(10, 130, dtype=torch.bool)
MASKS = Masks({"conv.weight": CONV, "fc.weight": FC})
ACTIVE = Masks({"conv.weight": CONV & (torch.arange(3) < 2), "fc.weight": FC})


def report(active: Masks | None = ACTIVE, warnings: Sequence[str] = ()) -> PruningReport:
    return PruningReport.of(
        MASKS, active, method="DRIVE(rounds=100)", seconds=12.34, epoch=5, step=1955, warnings=warnings
    )


HISTOGRAM = ScoreHistogram(-4.0, -1.0, (0,) * 30 + (1, 5) * 15, (0, 3) * 15 + (0,) * 30, kept_below=0, pruned_below=2)


def full_report(**others: Any) -> PruningReport:
    """With all there can be in one: costs, phases, rounds, scores and cycles."""
    return replace(
        report(warnings=["Layer collapse: no weight is left in 'fc.weight'."]),
        layers=(
            LayerReport("conv.weight", (8, 4, 3, 3), 288, 36, 24, itemsize=4, multiply_adds=288 * 64),
            LayerReport("fc.weight", (10, 130), 1300, 0, 0, itemsize=2, multiply_adds=1300),
        ),
        phases={"warmup": 83.14, "rounds": 12.0, "batch_norm": 0.34},
        rounds=(Round(1, 1e-3, (100, 700)), Round(2, 2e-3, (152, 600))),
        scores=HISTOGRAM,
        cycles=(
            CycleReport(1, 788, {"training": 2.5}, {"val_loss": 0.5, "val_accuracy": 0.9}),
            CycleReport(2, 36, {"training": 2.5}, {"val_loss": 0.75}),
        ),
        other_multiply_adds=2_000,
        **others,
    )


def test_of() -> None:
    assert report().layers == (
        LayerReport("conv.weight", (8, 4, 3, 3), num_weights=288, num_kept=36, num_active=24),
        LayerReport("fc.weight", (10, 130), num_weights=1300, num_kept=0, num_active=0),
    )
    assert report().digest == MASKS.digest()


def test_report__measures() -> None:
    found = report()
    assert (found.num_weights, found.num_kept) == (1588, 36)
    assert found.density == 36 / 1588
    assert found.sparsity == 1552 / 1588 == MASKS.sparsity
    assert found.effective_sparsity == 1564 / 1588 == ACTIVE.sparsity
    assert [layer.density for layer in found.layers] == [0.125, 0.0]


def test_report__paths_unknown() -> None:
    found = report(active=None)
    assert found.effective_sparsity is None
    assert [layer.num_active for layer in found.layers] == [None, None]
    assert "effective sparsity not measured" in str(found)


def test_str() -> None:
    """Worked out by hand."""
    assert str(report(warnings=["Layer collapse: no weight is left in 'fc.weight'."])).splitlines() == [
        "Pruned by DRIVE(rounds=100) at the start of epoch 5 (step 1955) in 12.3 s",
        "parameter    shape    weights  kept  density  active",
        "conv.weight  8x4x3x3      288    36   12.50%  66.67%",
        "fc.weight    10x130     1,300     0    0.00%       -",
        "all                     1,588    36    2.27%  66.67%",
        "sparsity 97.73%, effective sparsity 98.49% (active: kept and on a path from input to output)",
        "! Layer collapse: no weight is left in 'fc.weight'.",
    ]


def test_of__costs() -> None:
    found = PruningReport.of(
        MASKS,
        None,
        method="SNIP()",
        seconds=0.0,
        epoch=0,
        step=0,
        warnings=[],
        itemsizes={"conv.weight": 4, "fc.weight": 2},
        multiply_adds={"conv.weight": 18_432, "fc.weight": None},
        phases={"rounds": 1.0},
    )
    assert [(layer.itemsize, layer.multiply_adds) for layer in found.layers] == [(4, 18_432), (2, None)]
    assert found.phases == {"rounds": 1.0}


def test_report__costs() -> None:
    """Non-zero multiply-adds by density; non-zero bytes are the kept weights and one bit for each weight."""
    conv, fc = full_report().layers
    assert (conv.nonzero_multiply_adds, fc.nonzero_multiply_adds) == (36 * 64, 0)
    assert (conv.dense_bytes, conv.nonzero_bytes) == (288 * 4, 36 * 4 + 36)
    assert (fc.dense_bytes, fc.nonzero_bytes) == (1300 * 2, 163)
    found = full_report()
    assert (found.multiply_adds, found.nonzero_multiply_adds) == (18_432 + 1300, 2304)
    assert (found.dense_bytes, found.nonzero_bytes) == (1152 + 2600, 180 + 163)


def test_report__costs_unknown() -> None:
    """One layer that is not known, and neither is the sum; nothing is invented."""
    conv, fc = full_report().layers
    found = replace(full_report(), layers=(conv, replace(fc, multiply_adds=None, itemsize=None)))
    assert (found.multiply_adds, found.nonzero_multiply_adds) == (None, None)
    assert (found.dense_bytes, found.nonzero_bytes) == (None, None)
    lines = str(found).splitlines()
    assert lines[3].split()[-2:] == ["?", "?"]
    assert not [line for line in lines if "of one sample" in line or "in memory;" in line]


def test_str__costs() -> None:
    """Worked out by hand."""
    assert str(full_report(control="shuffle", cycle=2)).splitlines() == [
        "Pruned by DRIVE(rounds=100), cycle 2, at the start of epoch 5 (step 1955) in 12.3 s",
        "control: the masks were shuffled within each parameter",
        "parameter    shape    weights  kept  density  active   MACs  non-zero MACs",
        "conv.weight  8x4x3x3      288    36   12.50%  66.67%  18.4k           2.3k",
        "fc.weight    10x130     1,300     0    0.00%       -   1.3k              0",
        "all                     1,588    36    2.27%  66.67%  19.7k           2.3k",
        "sparsity 97.73%, effective sparsity 98.49% (active: kept and on a path from input to output)",
        "multiply-adds of one sample (MACs; one is 2 FLOPs): 19.7k dense, 2.3k by non-zero weights, and 2k without"
        " prunable weights",
        "prunable weights: 3.75kB dense, as they are in memory; 343B if stored as non-zero ones and a mask of 1 bit per"
        " weight",
        "seconds: warmup 83.1, rounds 12.0, BatchNorm 0.3",
        "! Layer collapse: no weight is left in 'fc.weight'.",
    ]


STRANGE = 'blocks[red]|<b>&"quoted".weight'


def strange_report() -> PruningReport:
    """Names and warnings that mean something to Markdown, HTML and rich."""
    layers = (replace(full_report().layers[0], name=STRANGE), full_report().layers[1])
    return replace(full_report(), layers=layers, warnings=("[bold]<script>alert(1)</script>\nnext line",))


def test_to_markdown() -> None:
    lines = strange_report().to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| parameter | shape | weights | kept | density | active | MACs | non-zero MACs | bytes | non-zero bytes |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: |",
        r'| `blocks[red]\|<b>&"quoted".weight` | 8x4x3x3 | 288 | 36 | 12.50% | 66.67% | 18.4k | 2.3k | 1.15k | 180 |',
        "| `fc.weight` | 10x130 | 1,300 | 0 | 0.00% | - | 1.3k | 0 | 2.6k | 163 |",
        "| **all** |  | **1,588** | **36** | **2.27%** | **66.67%** | **19.7k** | **2.3k** | **3.75k** | **343** |",
    ]
    assert lines[lines.index(table[0]) - 1] == lines[lines.index(table[-1]) + 1] == ""
    assert lines[-1] == r"- ! [bold]\<script>alert(1)\</script> next line"


class Cells(HTMLParser):
    """Reads tags and the text of cells back, and refuses tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1].append(data)


def test_to_html() -> None:
    """A fragment that a parser reads back, in which names and warnings are text."""
    found = strange_report().to_html()
    cells = Cells()
    cells.feed(found)
    assert cells.open == []
    assert cells.seen == {"div", "p", "table", "thead", "tbody", "tfoot", "tr", "th", "td", "b"}
    assert cells.rows[1][:3] == [STRANGE, "8x4x3x3", "288"]
    assert cells.rows[-1][-2:] == ["3.75k", "343"]
    assert "&lt;script&gt;" in found
    assert not re.search(r"https?:|<link|<style|<script", found)
    assert strange_report()._repr_html_() == found


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (120, ["parameter", "shape", "weights", "kept", "density", "active", "MACs", "non-zero MACs"]),
        (80, ["parameter", "kept", "density", "active", "MACs", "non-zero MACs"]),
        (58, ["parameter", "kept", "density", "active"]),
    ],
)
def test_rich(width: int, columns: list[str]) -> None:
    """A table that fits, every cell in one piece, and no name taken for markup."""
    console_module = pytest.importorskip("rich.console")
    console = console_module.Console(file=io.StringIO(), width=width, color_system=None)
    console.print(strange_report())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    cells = [line.split() for line in lines]
    assert " ".join(columns).split() in cells
    numbers = {"kept": "36", "density": "12.50%", "active": "66.67%", "MACs": "18.4k", "non-zero MACs": "2.3k"}
    wide = ["8x4x3x3", "288"] if "shape" in columns else []
    assert [STRANGE, *wide, *(numbers[title] for title in columns if title in numbers)] in cells
    [total] = [row for row in cells if row[:1] == ["all"]]
    assert total[: 4 + bool(wide)] == ["all", *(["1,588"] if wide else []), "36", "2.27%", "66.67%"]
    assert any("[bold]<script>" in line for line in lines)


@pytest.mark.parametrize("active", [ACTIVE, None], ids=["paths", "no_paths"])
def test_to_dict__round_trip(active: Masks | None) -> None:
    """Through JSON, and through a checkpoint that may hold plain types only."""
    found = report(active, warnings=["one", "two"])
    assert PruningReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    file = io.BytesIO()
    torch.save(found.to_dict(), file)
    file.seek(0)
    assert PruningReport.from_dict(torch.load(file, weights_only=True)) == found


@pytest.mark.parametrize(
    "other",
    [
        {"seconds": 1.0},
        {"warnings": ("new",)},
        {"layers": full_report().layers[::-1]},
        {"rounds": ()},
        {"scores": None},
    ],
    ids=lambda other: next(iter(other)),
)
def test_to_dict__holds_every_field(other: dict[str, Any]) -> None:
    changed = replace(full_report(), **other)
    assert changed.to_dict() != full_report().to_dict()
    assert PruningReport.from_dict(changed.to_dict()) == changed


def test_to_dict__is_json() -> None:
    """JSON loses nothing: what it gives back is equal, lists and all."""
    values = full_report().to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert PruningReport.from_dict(values) == full_report()
    assert set(values) == {field.name for field in fields(PruningReport)}


def test_from_dict__earlier_version() -> None:
    """As 0.1.0 wrote it, before there were costs, phases, rounds and cycles."""
    values = {
        "method": "DRIVE(rounds=100)",
        "layers": [
            {"name": "conv.weight", "shape": [8, 4, 3, 3], "num_weights": 288, "num_kept": 36, "num_active": 24},
            {"name": "fc.weight", "shape": [10, 130], "num_weights": 1300, "num_kept": 0, "num_active": 0},
        ],
        "seconds": 12.34,
        "epoch": 5,
        "step": 1955,
        "digest": MASKS.digest(),
        "warnings": ["one"],
        "control": "none",
        "cycle": None,
    }
    found = PruningReport.from_dict(values)
    assert found == report(warnings=["one"])
    assert (found.multiply_adds, found.dense_bytes, found.phases, found.rounds) == (None, None, {}, ())
    assert found.pictures == ["density"]
    assert "MACs" not in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda values: values.update(colour=1), r"PruningReport has fields .*\(colour\).*newer", id="field"
        ),
        pytest.param(lambda values: values["layers"][0].update(colour=1), r"LayerReport has fields", id="layer_field"),
        pytest.param(lambda values: values.pop("method"), r"PruningReport is not complete: .*'method'", id="missing"),
        pytest.param(lambda values: values.pop("layers"), r"PruningReport is not complete: .*'layers'", id="no_layers"),
    ],
)
def test_from_dict__error(change: Callable[[dict[str, Any]], object], message: str) -> None:
    values = full_report().to_dict()
    change(values)
    with pytest.raises(ValueError, match=message):
        PruningReport.from_dict(values)


def test_to_dict__is_small() -> None:
    """A hundred rounds on the layers of ResNet-18 take few kilobytes of a checkpoint, as many as a bias or two."""
    sizes = [1_728, *[36_864] * 4, 73_728, *[147_456] * 3, 294_912, *[589_824] * 3, 1_179_648, *[2_359_296] * 3, 5_120]
    rounds = tuple(
        Round(
            index,
            1.234567e-5 * index,
            tuple(round(size * 0.04 * 0.96**index) for size in [*sizes, 8_192, 32_768, 131_072]),
        )
        for index in range(1, 101)
    )
    file = io.BytesIO()
    torch.save(replace(full_report(), rounds=rounds).to_dict(), file)
    assert len(rounds[0].removed) == 21
    assert file.tell() < 13_000


def saved(folder: Path) -> tuple[Path, PruningReport | None]:
    """A real checkpoint, of a run with the callback."""
    callback = fits.drive(warmup_epochs=1)
    trainer = fits.trainer(folder, callback, max_epochs=2, limit_train_batches=1)
    trainer.fit(ConvModule(), fits.loader())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt", callback.report


def test_from_checkpoint(tmp_path: Path) -> None:
    path, expected = saved(tmp_path)
    assert expected is not None
    assert PruningReport.from_checkpoint(path) == PruningReport.from_checkpoint(str(path)) == expected
    assert torch.load(path, weights_only=True)["callbacks"]["DRIVEPruningCallback"]["report"] == expected.to_dict()


def test_from_checkpoint__folder(tmp_path: Path) -> None:
    """Sharded training writes a folder, with all that is not weights in one of its files."""
    path, expected = saved(tmp_path)
    (tmp_path / "sharded").mkdir()
    path.rename(tmp_path / "sharded" / "meta.pt")
    assert PruningReport.from_checkpoint(tmp_path / "sharded") == expected


def test_from_checkpoint__not_pruned(tmp_path: Path) -> None:
    every = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fits.trainer(tmp_path, fits.drive(), every, limit_train_batches=1, max_epochs=3).fit(ConvModule(), fits.loader())
    with pytest.raises(
        ValueError, match=r"epoch=0.ckpt' \(epoch 0, step 1\) holds no report yet: DRIVEPruningCallback"
    ):
        PruningReport.from_checkpoint(tmp_path / "epoch=0.ckpt")
    assert PruningReport.from_checkpoint(tmp_path / "epoch=2.ckpt").epoch == 2


def write(folder: Path, content: object) -> Path:
    torch.save(content, folder / "file.ckpt")
    return folder / "file.ckpt"


def sparse(folder: Path) -> Path:
    save_sparse({"weight": torch.zeros(3)}, folder / "file.safetensors")
    return folder / "file.safetensors"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda folder: folder / "none.ckpt", FileNotFoundError, "There is no file", id="no_file"),
        pytest.param(
            lambda folder: write(folder, nn.Linear(2, 2).state_dict()),
            ValueError,
            "of a Lightning Trainer",
            id="weights",
        ),
        pytest.param(
            lambda folder: write(folder, {"callbacks": {"EarlyStopping": {}}, "epoch": 3, "global_step": 9}),
            ValueError,
            r"\(epoch 3, step 9\) holds no report: it was saved without a pruning callback.*: EarlyStopping",
            id="no_pruning_callback",
        ),
        pytest.param(sparse, ValueError, "of a Lightning Trainer", id="sparse_file_without"),
    ],
)
def test_from_checkpoint__error(
    make: Callable[[Path], Path], error: type[Exception], message: str, tmp_path: Path
) -> None:
    """What else a file can be is in `test_checkpoints`."""
    path = make(tmp_path)
    with pytest.raises(error, match=message) as raised:
        PruningReport.from_checkpoint(path)
    assert str(path) in str(raised.value)


def test_report__of_a_run(tmp_path: Path) -> None:
    """Costs, phases and rounds are those of the run."""
    callback = fits.drive()
    fits.trainer(tmp_path, callback).fit(ConvModule(), fits.loader())
    found = callback.report
    assert found is not None
    assert {layer.name: layer.multiply_adds for layer in found.layers} == {
        "features.0.weight": 64 * 6 * 9,
        "features.4.weight": 16 * 8 * 6 * 9,
        "head.weight": 512,
    }
    assert (found.other_multiply_adds, found.dense_bytes) == (0, 4 * fits.NUM_PRUNABLE)
    assert list(found.phases) == ["warmup", "rounds", "measuring", "batch_norm", "commit"]
    assert all(seconds > 0 for seconds in found.phases.values())
    assert found.seconds == pytest.approx(
        found.phases["rounds"] + found.phases["measuring"] + found.phases["batch_norm"], abs=0.1
    )
    assert [each.index for each in found.rounds] == [1, 2, 3, 4, 5]
    removed = [sum(column) for column in zip(*(each.removed for each in found.rounds), strict=True)]
    assert removed == [layer.num_weights - layer.num_kept for layer in found.layers]
    assert found.pictures == ["density", "rounds", "scores"]


class NeedsNumbers(ConvModule):
    """Multiply-adds can be counted, but its ``forward`` cannot go on with signals in place of numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.max() == images.min():
            raise ValueError("an image of one colour")
        return super().forward(images)


@pytest.mark.parametrize(
    ("module", "counted", "note"),
    [
        (NeedsNumbers, True, r"Effective sparsity was not measured: paths .* training calls .*an image of one colour"),
    ],
)
def test_report__not_measured(module: Callable[[], ConvModule], counted: bool, note: str, tmp_path: Path) -> None:
    """Training goes on, and one note says why; nothing is invented."""
    callback = fits.drive(warmup_epochs=0)
    fits.trainer(tmp_path, callback, max_epochs=1).fit(module(), fits.loader())
    found = callback.report
    assert found is not None
    assert (found.multiply_adds is not None, found.effective_sparsity) == (counted, None)
    assert found.dense_bytes is not None
    assert re.match(note, found.warnings[0])
    assert len(found.warnings) == 1 + (not counted)
    assert all(text.startswith("Multiply-adds were not measured: ") for text in found.warnings[1:])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_report__resumed_warmup(tmp_path: Path) -> None:
    """Of a warm-up that was resumed, only part of the time is known: it says nothing."""
    every = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fits.trainer(tmp_path, fits.drive(), every, max_epochs=3).fit(ConvModule(), fits.loader())
    callback, every = fits.drive(), pl.callbacks.ModelCheckpoint(tmp_path, filename="resumed-{epoch}", save_top_k=-1)
    fits.trainer(tmp_path, callback, every).fit(ConvModule(), fits.loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callback.report is not None
    assert list(callback.report.phases) == ["rounds", "measuring", "batch_norm", "commit"]


@pytest.mark.parametrize(
    "masks", [MASKS, Masks({"a": torch.ones(2, 2, dtype=torch.bool)})], ids=["empty_layer", "dense"]
)
def test_plot(masks: Masks, tmp_path: Path) -> None:
    """A PNG that can be read back and shows more than a blank page; many layers make it taller."""
    image_module = pytest.importorskip("matplotlib.image")
    found = PruningReport.of(masks, None, method="SNIP()", seconds=0.0, epoch=0, step=0, warnings=[])
    found.plot(tmp_path / "density.png")
    pixels = image_module.imread(tmp_path / "density.png")
    assert pixels.shape[1] > 600
    assert pixels.std() > 0.05

    many = replace(found, layers=found.layers * 30)
    many.plot(str(tmp_path / "many.png"))
    assert image_module.imread(tmp_path / "many.png").shape[0] > 2 * pixels.shape[0]


def test_plot__leaves_pyplot_alone(tmp_path: Path) -> None:
    """No global figure is left open, and no backend chosen."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums(), pyplot.get_backend()
    report().plot(tmp_path / "density.svg")
    assert (pyplot.get_fignums(), pyplot.get_backend()) == before
    assert "<svg" in (tmp_path / "density.svg").read_text()


def test_plot__without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="needs matplotlib: `pip install matplotlib`"):
        report().plot(tmp_path / "density.png")


def test_report__of_imp(tmp_path: Path) -> None:
    """Every cycle is a round, with its seconds, and with what was logged last before its cut, the monitored first."""
    seen: list[float] = []

    class Module(ConvModule):
        def on_validation_epoch_end(self) -> None:
            seen.append(self.trainer.callback_metrics["val_loss"].item())

    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    callback = fits.CALLBACKS["IMP"]()
    fits.trainer(tmp_path, callback, best).fit(Module(), fits.loader())
    found = callback.report
    assert found is not None
    assert [each.index for each in found.rounds] == [each.cycle for each in found.cycles] == [1, 2]
    removed = [sum(each.removed) for each in found.rounds]
    assert [each.num_kept for each in found.cycles] == [998 - removed[0], 998 - sum(removed)] == [446, 200]
    assert [next(iter(each.metrics.items())) for each in found.cycles] == [("val_loss", loss) for loss in seen[:2]]
    assert not [name for each in found.cycles for name in each.metrics if name.startswith("pruning/")]
    assert [list(each.phases) for each in found.cycles] == [
        ["training", "rounds", "measuring", "batch_norm", "commit"]
    ] * 2
    assert found.phases == found.cycles[-1].phases
    assert found.pictures == ["density", "rounds", "scores", "cycles"]
    found.figure("cycles", metric="train_accuracy")


@pytest.mark.parametrize("kind", ["density", "rounds", "scores", "cycles"])
@pytest.mark.parametrize("num_layers", [1, 2, 54])
def test_figure(kind: Picture, num_layers: int, tmp_path: Path) -> None:
    """Axes say what they show; text stays inside the picture, and that of layers apart from each other."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    layers = tuple(
        replace(full_report().layers[index % 2], name=f"network.stage{index}.convolution.weight")
        for index in range(num_layers)
    )
    rounds = tuple(replace(each, removed=(each.removed * 27)[:num_layers]) for each in full_report().rounds)
    figure = replace(full_report(), layers=layers, rounds=rounds).figure(kind)
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes = figure.axes[:2] if kind == "rounds" else figure.axes
    assert all(each.get_ylabel() for each in axes)
    assert axes[-1].get_xlabel()
    inside = figure.bbox.padded(1)
    texts = [figure._suptitle] if figure._suptitle else []
    for each in figure.axes:
        texts += [each.title, each.xaxis.label, each.yaxis.label, *each.texts]
        for place, axis in enumerate((each.xaxis, each.yaxis)):
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


def test_figure__nothing_removed() -> None:
    """A sparsity of 0 is no reason to fail."""
    pytest.importorskip("matplotlib")
    found = replace(full_report(), rounds=(Round(1, 0.0, (0, 0)),))
    assert len(found.figure("rounds").axes) == 3
    assert len(found.figure("scores").axes[0].lines) == 0


@pytest.mark.parametrize(
    ("kind", "metric", "message"),
    [
        ("cycle", None, r"`kind` must be one of 'density', 'rounds', 'scores', 'cycles', got 'cycle'"),
        ("scores", None, r"does not have the data for the picture 'scores', only for density, cycles"),
        ("cycles", "loss", r"`metric` must be one that was logged \(val_loss, val_accuracy\), got 'loss'"),
    ],
)
def test_figure__error(kind: Any, metric: str | None, message: str) -> None:
    found = replace(full_report(), rounds=(), scores=None)
    with pytest.raises(ValueError, match=message):
        found.figure(kind, metric=metric)


@pytest.mark.parametrize("method", [fits.drive, fits.CALLBACKS["IMP"]], ids=["drive", "imp"])
def test_report__overall_sparsity(method: Callable[[], Any], tmp_path: Path) -> None:
    """Pruned weights as a fraction of all that the module has, each once: biases, norms, frozen and tied ones, too."""

    class Module(ConvModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(50, 20).requires_grad_(False)
            self.table = nn.Embedding(7, 3)
            self.same_table = self.table

    module, callback = Module(), method()
    fits.trainer(tmp_path, callback).fit(module, fits.loader())
    found = callback.report
    assert found is not None
    zeros = sum(int((module.get_parameter(layer.name) == 0).sum()) for layer in found.layers)
    total = sum(parameter.numel() for parameter in module.parameters())
    assert found.num_parameters == total
    assert found.overall_sparsity == zeros / total < found.sparsity
    assert f"overall sparsity {zeros / total:.2%}, of all {total:,} weights" in str(found)
    assert f"overall sparsity {zeros / total:.2%}" in found.to_markdown()
    assert f"overall sparsity {zeros / total:.2%}" in found.to_html()
    assert PruningReport.from_dict(found.to_dict()) == found
    assert method().plan(module).overall_sparsity == found.overall_sparsity


def test_report__overall_sparsity_unknown() -> None:
    """Reports of earlier versions do not have it; one that cannot be is an error."""
    values = full_report().to_dict()
    del values["num_parameters"]
    older = PruningReport.from_dict(values)
    assert older.overall_sparsity is None
    assert "overall" not in str(older)
    assert replace(older, num_parameters=3176).overall_sparsity == older.sparsity / 2
    with pytest.raises(ValueError, match="its module has fewer weights in all than prunable ones"):
        PruningReport.from_dict({**values, "num_parameters": 1587})
