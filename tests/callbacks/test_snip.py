"""SNIP through a Trainer is one shot on the first batch and, in rounds, DRIVE without a warm-up."""

from pathlib import Path
from typing import Any

import fits
import pytest
from fits import ConvModule

from lightning_drive import (
    SNIP,
    DRIVEPruningCallback,
    SNIPPruningCallback,
    find_masks,
)


def test_snip__defaults(tmp_path: Path) -> None:
    """One shot on the first batch, on the initial weights."""
    callback = SNIPPruningCallback(sparsity=0.9)
    fits.fit(tmp_path, ConvModule(), callback)
    expected = find_masks(ConvModule(), SNIP(), sparsity=0.9, batches=fits.loader(), loss_fn=fits.loss_fn)
    assert callback.masks == expected
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.step) == (0, 0)
    assert callback.report.method == "SNIP(rounds=1, batches_per_round=1, mode='train')"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("batches_per_round", [1, 2])
def test_snip__iterative_is_drive_without_warmup(tmp_path: Path, batches_per_round: int, mode: str) -> None:
    settings: dict[str, Any] = {
        "sparsity": 0.9, "warmup_epochs": 0, "rounds": 6, "batches_per_round": batches_per_round, "mode": mode
    }  # fmt: skip
    snip, drive = SNIPPruningCallback(**settings), DRIVEPruningCallback(**settings)
    modules = [fits.fit(tmp_path, ConvModule(), callback).lightning_module for callback in (snip, drive)]
    assert snip.masks == drive.masks
    assert fits.equal_states(*map(fits.state_of, modules))
    once = SNIPPruningCallback(sparsity=0.9, batches_per_round=batches_per_round, mode=mode)  # type: ignore[arg-type]
    fits.fit(tmp_path, ConvModule(), once)
    assert once.masks != snip.masks


def test_snip__after_warmup(tmp_path: Path) -> None:
    callback = SNIPPruningCallback(sparsity=0.9, warmup_epochs=2)
    fits.fit(tmp_path, ConvModule(), callback)
    assert callback.report is not None
    assert (callback.report.epoch, callback.report.step) == (2, 6)
