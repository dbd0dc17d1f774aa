"""The records of a report count what masks keep, and never invent a number."""

from dataclasses import replace

from reports import ACTIVE, MASKS, full_report, small_report

from lightning_drive import PruningReport
from lightning_drive.report.parts import LayerReport


def test_of() -> None:
    assert small_report().layers == (
        LayerReport("conv.weight", (8, 4, 3, 3), num_weights=288, num_kept=36, num_active=24),
        LayerReport("fc.weight", (10, 130), num_weights=1300, num_kept=0, num_active=0),
    )
    assert small_report().digest == MASKS.digest()


def test_of__costs() -> None:
    report = PruningReport.of(
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
    assert [(layer.itemsize, layer.multiply_adds) for layer in report.layers] == [(4, 18_432), (2, None)]
    assert report.phases == {"rounds": 1.0}


def test_report__measures() -> None:
    report = small_report()
    assert (report.num_weights, report.num_kept) == (1588, 36)
    assert report.density == 36 / 1588
    assert report.sparsity == 1552 / 1588 == MASKS.sparsity
    assert report.effective_sparsity == 1564 / 1588 == ACTIVE.sparsity
    assert [layer.density for layer in report.layers] == [0.125, 0.0]


def test_report__costs() -> None:
    """Non-zero multiply-adds by density; non-zero bytes are the kept weights and one bit for each weight."""
    conv, fc = full_report().layers
    assert (conv.nonzero_multiply_adds, fc.nonzero_multiply_adds) == (36 * 64, 0)
    assert (conv.dense_bytes, conv.nonzero_bytes) == (288 * 4, 36 * 4 + 36)
    assert (fc.dense_bytes, fc.nonzero_bytes) == (1300 * 2, 163)
    report = full_report()
    assert (report.multiply_adds, report.nonzero_multiply_adds) == (18_432 + 1300, 2304)
    assert (report.dense_bytes, report.nonzero_bytes) == (1152 + 2600, 180 + 163)


def test_report__costs_unknown() -> None:
    """One layer that is not known, and neither is the sum; nothing is invented."""
    conv, fc = full_report().layers
    report = replace(full_report(), layers=(conv, replace(fc, multiply_adds=None, itemsize=None)))
    assert (report.multiply_adds, report.nonzero_multiply_adds) == (None, None)
    assert (report.dense_bytes, report.nonzero_bytes) == (None, None)
    lines = str(report).splitlines()
    assert lines[3].split()[-2:] == ["?", "?"]
    assert not [line for line in lines if "of one sample" in line or "in memory;" in line]
