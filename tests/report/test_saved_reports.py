"""A report comes back equal from plain types, JSON and checkpoints; odd ones are one clear error."""

import io
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import fits
import lightning.pytorch as pl
import pytest
import torch
from fits import ConvModule
from reports import ACTIVE, MASKS, full_report, small_report
from torch import nn

from lightning_drive import Masks, PruningReport, save_sparse
from lightning_drive.core.rounds import Round


@pytest.mark.parametrize("active", [ACTIVE, None], ids=["paths", "no_paths"])
def test_to_dict__round_trip(active: Masks | None) -> None:
    """Through JSON, and through a checkpoint that may hold plain types only."""
    report = small_report(active, warnings=["one", "two"])
    assert PruningReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    file = io.BytesIO()
    torch.save(report.to_dict(), file)
    file.seek(0)
    assert PruningReport.from_dict(torch.load(file, weights_only=True)) == report


@pytest.mark.parametrize(
    "other",
    [
        {"seconds": 1.0},
        {"warnings": ("new",)},
        {"layers": full_report().layers[::-1]},
        {"rounds": ()},
        {"scores": None},
        {"acceleration": None},
        {"cuts": ()},
    ],
    ids=lambda other: next(iter(other)),
)
def test_to_dict__holds_every_field(other: dict[str, Any]) -> None:
    changed = replace(full_report(), **other)
    assert changed.to_dict() != full_report().to_dict()
    assert PruningReport.from_dict(changed.to_dict()) == changed


def test_to_dict__is_json() -> None:
    """JSON loses nothing: it returns equal values, lists and all."""
    values = full_report().to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert PruningReport.from_dict(values) == full_report()
    assert set(values) == {field.name for field in fields(PruningReport)}


def test_to_dict__earlier_versions_can_read_what_they_know() -> None:
    assert {"acceleration", "cuts"}.isdisjoint(small_report().to_dict())


def test_texts__without_acceleration() -> None:
    """What was measured of training is printed by itself; a report of a pruning reads as ever."""
    plain = replace(full_report(), acceleration=None)
    assert str(full_report()) == str(plain)
    assert full_report().to_markdown() == plain.to_markdown()
    assert full_report().to_html() == plain.to_html()


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
    report = PruningReport.from_dict(values)
    assert report == small_report(warnings=["one"])
    assert (report.multiply_adds, report.dense_bytes, report.phases, report.rounds) == (None, None, {}, ())
    assert report.pictures == ["density"]
    assert "MACs" not in str(report)


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


def layer(**changes: Any) -> dict[str, Any]:
    """A layer of a report, as a file has it."""
    return {"name": "fc.weight", "shape": [10, 130], "num_weights": 1300, "num_kept": 3, "num_active": 2, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"layers": []}, "it has no layers, or one of them twice", id="no_layers"),
        pytest.param({"layers": [layer(), layer()]}, "it has no layers, or one of them twice", id="twice"),
        pytest.param(
            {"layers": [layer(num_weights=1299)]}, r"cannot have 1299 weights in the shape \(10, 130\)", id="shape"
        ),
        pytest.param(
            {"layers": [layer(shape=[0], num_weights=0, num_kept=0, num_active=0)]}, "cannot have 0 weights", id="none"
        ),
        pytest.param({"layers": [layer(num_kept=1301)]}, "more kept weights than weights", id="kept"),
        pytest.param({"layers": [layer(num_active=4)]}, "or more active ones than kept ones", id="active"),
        pytest.param(
            {"rounds": [{"index": 1, "threshold": 0.1, "removed": [5]}]}, "its rounds are not of 2", id="rounds"
        ),
        pytest.param({"num_parameters": 1587}, "fewer weights in all than prunable ones", id="parameters"),
    ],
)
def test_from_dict__contradiction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^The PruningReport contradicts itself: .*{message}.* Take another copy"):
        PruningReport.from_dict({**full_report().to_dict(), **changes})


def test_from_dict__contradiction_of_scores() -> None:
    values = full_report().to_dict()
    values["scores"]["kept"].pop()
    with pytest.raises(ValueError, match="contradicts itself: its histogram of scores has more bins of kept ones"):
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
