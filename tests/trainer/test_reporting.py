"""What a pruning has to say is printed once: as a warning or in the report, and for all its cuts together."""

import warnings
from collections.abc import Callable
from pathlib import Path

import fits
import pytest
from torch import nn

from lightning_drive import IMPPruningCallback, KeepZerosCallback, SynFlowPruningCallback
from lightning_drive.callbacks.hooks import PruningCallback


class WithUnused(fits.ConvModule):
    """Has a layer that is never used, and a table that is larger than all that is prunable."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.unused = nn.Embedding(7, 300), nn.Linear(30, 30)


MAKE: dict[str, Callable[[], PruningCallback]] = {
    "DRIVE": lambda: fits.drive(sparsity=0.999),
    "SynFlow": lambda: SynFlowPruningCallback(sparsity=0.9, rounds=3),
    "IMP": lambda: IMPPruningCallback(sparsity=0.5, cycles=3, epochs_per_cycle=1),
    "Gradual": lambda: fits.gradual(sparsity=0.99, start_epoch=0),
    "Gradual_by_drive": lambda: fits.gradual(sparsity=0.99, start_epoch=0, criterion="drive"),
    "KeepZeros": KeepZerosCallback,
}


@pytest.mark.parametrize("method", MAKE)
def test_warnings__once(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where Python would print a warning again and again."""
    module, callback = WithUnused(), MAKE[method]()
    if method == "KeepZeros":
        nn.init.zeros_(module.features[4].weight[:4])
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO", logger="lightning.pytorch"):
        warnings.simplefilter("always")
        fits.fit(tmp_path, module, callback)
    report, printed = callback.report, [*(str(warning.message) for warning in caught), caplog.text]
    assert report is not None
    assert report.warnings
    assert len(set(report.warnings)) == len(report.warnings)
    for text in report.warnings:
        assert sum(one.count(text) for one in printed) == 1, text
        assert f"! {text}" in str(report)
