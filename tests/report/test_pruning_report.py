"""The report of a run has the costs, phases, rounds and metrics of that run."""

import re
from collections.abc import Callable
from pathlib import Path

import fits
import lightning.pytorch as pl
import pytest
import torch
from fits import ConvModule

from lightning_drive.report import labels


def test_report__of_a_run(tmp_path: Path) -> None:
    """Costs, phases and rounds are those of the run."""
    callback = fits.drive()
    fits.trainer(tmp_path, callback).fit(ConvModule(), fits.loader())
    report = callback.report
    assert report is not None
    assert {layer.name: layer.multiply_adds for layer in report.layers} == {
        "features.0.weight": 64 * 6 * 9,
        "features.4.weight": 16 * 8 * 6 * 9,
        "head.weight": 512,
    }
    assert (report.other_multiply_adds, report.dense_bytes) == (0, 4 * fits.NUM_PRUNABLE)
    assert list(report.phases) == ["warmup", "rounds", "measuring", "batch_norm", "commit"]
    assert report.phases.keys() <= labels.PHASES.keys()
    assert all(seconds > 0 for seconds in report.phases.values())
    assert report.seconds == pytest.approx(
        report.phases["rounds"] + report.phases["measuring"] + report.phases["batch_norm"], abs=0.1
    )
    assert [pruning_round.index for pruning_round in report.rounds] == [1, 2, 3, 4, 5]
    removed = [sum(column) for column in zip(*(pruning_round.removed for pruning_round in report.rounds), strict=True)]
    assert removed == [layer.num_weights - layer.num_kept for layer in report.layers]
    assert report.pictures == ["density", "rounds", "scores"]


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
    """Training goes on, one note has the reason, and nothing is invented."""
    callback = fits.drive(warmup_epochs=0)
    fits.trainer(tmp_path, callback, max_epochs=1).fit(module(), fits.loader())
    report = callback.report
    assert report is not None
    assert (report.multiply_adds is not None, report.effective_sparsity) == (counted, None)
    assert report.dense_bytes is not None
    assert re.match(note, report.warnings[0])
    assert len(report.warnings) == 1 + (not counted)
    assert all(text.startswith("Multiply-adds were not measured: ") for text in report.warnings[1:])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_report__resumed_warmup(tmp_path: Path) -> None:
    """The time of a warm-up that was resumed is known only in part, and left out."""
    every = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fits.trainer(tmp_path, fits.drive(), every, max_epochs=3).fit(ConvModule(), fits.loader())
    callback, every = fits.drive(), pl.callbacks.ModelCheckpoint(tmp_path, filename="resumed-{epoch}", save_top_k=-1)
    fits.trainer(tmp_path, callback, every).fit(ConvModule(), fits.loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callback.report is not None
    assert list(callback.report.phases) == ["rounds", "measuring", "batch_norm", "commit"]


def test_report__of_imp(tmp_path: Path) -> None:
    """Every cycle is a round, with its seconds, and with what was logged last before its cut, the monitored first."""
    seen: list[float] = []

    class Module(ConvModule):
        def on_validation_epoch_end(self) -> None:
            seen.append(self.trainer.callback_metrics["val_loss"].item())

    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    callback = fits.CALLBACKS["IMP"]()
    fits.trainer(tmp_path, callback, best).fit(Module(), fits.loader())
    report = callback.report
    assert report is not None
    assert (
        [pruning_round.index for pruning_round in report.rounds] == [cycle.cycle for cycle in report.cycles] == [1, 2]
    )
    removed = [sum(pruning_round.removed) for pruning_round in report.rounds]
    assert [cycle.num_kept for cycle in report.cycles] == [998 - removed[0], 998 - sum(removed)] == [446, 200]
    assert [next(iter(cycle.metrics.items())) for cycle in report.cycles] == [("val_loss", loss) for loss in seen[:2]]
    assert not [name for cycle in report.cycles for name in cycle.metrics if name.startswith("pruning/")]
    assert [list(cycle.phases) for cycle in report.cycles] == [
        ["training", "rounds", "measuring", "batch_norm", "commit"]
    ] * 2
    assert report.phases == report.cycles[-1].phases
    assert report.phases.keys() <= labels.PHASES.keys()
    assert report.pictures == ["density", "rounds", "scores", "cycles"]
    report.figure("cycles", metric="train_accuracy")
