"""The lines below the table state what is known, and name what is not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fits
import pytest
from fits import ConvModule
from reports import full_report, small_report
from torch import nn

from lightning_drive import PruningReport


def test_report__paths_unknown() -> None:
    report = small_report(active=None)
    assert report.effective_sparsity is None
    assert [layer.num_active for layer in report.layers] == [None, None]
    assert "effective sparsity not measured" in str(report)


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
    report = callback.report
    assert report is not None
    zeros = sum(int((module.get_parameter(layer.name) == 0).sum()) for layer in report.layers)
    total = sum(parameter.numel() for parameter in module.parameters())
    assert report.num_parameters == total
    assert report.overall_sparsity == zeros / total < report.sparsity
    assert f"overall sparsity {zeros / total:.2%}, of all {total:,} weights" in str(report)
    assert f"overall sparsity {zeros / total:.2%}" in report.to_markdown()
    assert f"overall sparsity {zeros / total:.2%}" in report.to_html()
    assert PruningReport.from_dict(report.to_dict()) == report
    assert method().plan(module).overall_sparsity == report.overall_sparsity


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
