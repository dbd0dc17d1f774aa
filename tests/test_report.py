"""A report says in words, numbers, plain types and a picture what the masks say."""

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_drive import Masks, PruningReport
from lightning_drive.report import LayerReport

CONV = torch.zeros(8, 4, 3, 3, dtype=torch.bool)
CONV[0] = True
FC = torch.zeros(10, 130, dtype=torch.bool)
MASKS = Masks({"conv.weight": CONV, "fc.weight": FC})
ACTIVE = Masks({"conv.weight": CONV & (torch.arange(3) < 2), "fc.weight": FC})


def report(active: Masks | None = ACTIVE, warnings: Sequence[str] = ()) -> PruningReport:
    return PruningReport.of(
        MASKS, active, method="DRIVE(rounds=100)", seconds=12.34, epoch=5, step=1955, warnings=warnings
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


@pytest.mark.parametrize("active", [ACTIVE, None], ids=["paths", "no_paths"])
def test_to_dict__round_trip(active: Masks | None) -> None:
    """Through JSON, and through a checkpoint that may hold plain types only."""
    found = report(active, warnings=["one", "two"])
    assert PruningReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    file = io.BytesIO()
    torch.save(found.to_dict(), file)
    file.seek(0)
    assert PruningReport.from_dict(torch.load(file, weights_only=True)) == found


@pytest.mark.parametrize("other", [{"seconds": 1.0}, {"warnings": ("new",)}, {"layers": ()}], ids=str)
def test_to_dict__holds_every_field(other: dict[str, object]) -> None:
    changed = replace(report(), **other)
    assert changed.to_dict() != report().to_dict()
    assert PruningReport.from_dict(changed.to_dict()) == changed


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
